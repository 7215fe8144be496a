"""Making and opening GPT-NeoX's order of a store, and blending, beside loops in C++: python benchmarks/neox_order.py

GPT-NeoX makes its arrays with numpy, which shuffles documents and rows, and C++, which walks through the documents to
find where each row begins, and through the samples to blend; it writes them with numpy.save. The peer here does the
same with the same numpy and loops of our own, compiled with -O3 by the C++ compiler that is on the PATH. Documents have
50 tokens on average, and a run goes through them `--passes` times, in rows of 2,048. One core; a process for each
measurement, whose memory is anonymous memory (RssAnon), sampled every 5 ms. Opening is of arrays that are there.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from _token_stores import anonymous_memory, write_store
from loguru import logger

from openchatkit.data import neox_order
from openchatkit.data.blending import blend
from openchatkit.data.dataset import Dataset
from openchatkit.data.options import DataOptions
from openchatkit.data.samples.source import Content, MixtureSource
from openchatkit.formats.token_store import TokenStore

SEQ_LENGTH = 2048
LOOPS = """
#include <cstdint>
extern "C" void find_rows(
    const int32_t* sizes, const int32_t* documents, int64_t rows, int64_t length, int32_t* begins) {
  int64_t document = 0, offset = 0;
  for (int64_t row = 0; row <= rows; ++row) {
    begins[2 * row] = document; begins[2 * row + 1] = offset;
    if (row == rows) break;
    for (offset += length; offset >= sizes[documents[document]];) offset -= sizes[documents[document++]];
  }
}
extern "C" void blend(const double* shares, int64_t sources, int64_t samples, uint8_t* turns, int64_t* numbers) {
  int64_t given[256] = {0};
  for (int64_t sample = 0; sample < samples; ++sample) {
    const double number = sample ? sample : 1;
    int64_t best = 0;
    double most = shares[0] * number - given[0];
    for (int64_t source = 1; source < sources; ++source) {
      const double behind = shares[source] * number - given[source];
      if (behind > most) { most = behind; best = source; }
    }
    turns[sample] = best; numbers[sample] = given[best]++;
  }
}
"""
WEIGHTS = {"2": [0.7, 0.3], "3": [0.2, 0.3, 0.5], "22": list(1 / np.arange(1, 23))}


def pointer(array: np.ndarray) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def make_as_kit(prefix: Path, wanted: int) -> None:
    """Open the data set and read its first batch, which makes the arrays if they are not there."""
    store = TokenStore(prefix)
    content = Content(store, prefix.name, store.documents, trained_tokens=len(store.tokens))
    source = MixtureSource(prefix.name, 1.0, [content], loss_on="all", number=0, seed=1, cache_dir=prefix.parent)
    options = DataOptions(
        prefix.parent, data_cache=prefix.parent, seq_length=SEQ_LENGTH, data_order="neox", wanted=wanted
    )
    packed, turns, again = neox_order.arrange([source], options, padding=0, weighted=False)
    Dataset([source], packed, options, interleaving=turns, epoch_samples=again, fingerprint="").batch(0, 4)


def make_as_peer(prefix: Path, wanted: int) -> None:
    loops = ctypes.CDLL(str(prefix.parent / "loops.so"))
    store, generator = TokenStore(prefix), np.random.RandomState(1)
    tokens, sizes = len(store.tokens), np.ascontiguousarray(store.sizes)
    passes = -(-(wanted * SEQ_LENGTH + 1) // tokens)
    documents = np.mgrid[0:passes, 0 : store.documents][1].reshape(-1).astype(np.int32)
    generator.shuffle(documents)
    rows = (passes * tokens - 1) // SEQ_LENGTH
    begins = np.empty((rows + 1, 2), np.int32)
    loops.find_rows(
        pointer(sizes), pointer(documents), ctypes.c_int64(rows), ctypes.c_int64(SEQ_LENGTH), pointer(begins)
    )
    order = np.arange(rows, dtype=np.uint32)
    generator.shuffle(order)
    for name, array in (("documents", documents), ("begins", begins), ("order", order)):
        np.save(prefix.parent / name, array)


def measure(what: str, prefix: Path, wanted: int) -> dict[str, float]:
    """Return the seconds that something takes, those of the processor, and the peak of memory above the beginning."""
    before = peak = anonymous_memory()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_memory())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    begin, busy = time.perf_counter(), time.process_time()
    (make_as_peer if what == "peer" else make_as_kit)(prefix, wanted)
    seconds, busy = time.perf_counter() - begin, time.process_time() - busy
    done.set()
    thread.join()
    return {"seconds": seconds, "busy": busy, "memory": peak - before}


def print_orders(folder: Path, counts: list[int], passes: int) -> None:
    print("| documents | what | seconds | of the processor | anonymous memory, MB |\n| --- | --- | --- | --- | --- |")
    for count in counts:
        prefix = folder / f"store-{count}"
        write_store(prefix, count, mean=50, masked=False)
        wanted = passes * len(TokenStore(prefix).tokens) // SEQ_LENGTH - passes
        for what in ("peer", "made", "opened"):
            command = [sys.executable, __file__, "--measure", what, str(prefix), str(wanted)]
            found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            times = f"{found['seconds']:.2f} | {found['busy']:.2f}"
            print(f"| {count:,} | {what} | {times} | {found['memory'] / 1e6:.0f} |", flush=True)


def print_blending(folder: Path, samples: int) -> None:
    loops = ctypes.CDLL(str(folder / "loops.so"))
    print("| sources | million samples/s, peer | kit |\n| --- | --- | --- |")
    for name, weights in WEIGHTS.items():
        shares = np.array(weights) / sum(weights)
        turns, numbers = np.empty(samples, np.uint8), np.empty(samples, np.int64)
        begin = time.process_time()
        loops.blend(
            pointer(shares), ctypes.c_int64(len(shares)), ctypes.c_int64(samples), pointer(turns), pointer(numbers)
        )
        peer = time.process_time() - begin
        begin = time.process_time()
        for _ in blend(weights, samples):
            pass
        kit = time.process_time() - begin
        print(f"| {name} | {samples / peer / 1e6:.0f} | {samples / kit / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, nargs="+", default=[100_000, 10_000_000])
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--samples", type=int, default=20_000_000, help="to blend")
    parser.add_argument("--measure", nargs=3, metavar=("WHAT", "PREFIX", "WANTED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    if args.measure:
        what, prefix, wanted = args.measure
        print(json.dumps(measure(what, Path(prefix), int(wanted))))
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "loops.cpp").write_text(LOOPS)
        command = ["c++", "-O3", "-shared", "-fPIC", "-o", str(folder / "loops.so"), str(folder / "loops.cpp")]
        subprocess.run(command, check=True)
        print_orders(folder, args.documents, args.passes)
        print()
        print_blending(folder, args.samples)


if __name__ == "__main__":
    main()
