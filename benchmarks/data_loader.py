"""The loader's tokens a second, and its memory over the number of documents: python benchmarks/data_loader.py

Stores are synthetic: random tokens, sizes drawn from a log-normal distribution (median 150 tokens for the rates) or a
geometric one (mean 20 tokens for the memory). Rates are of one core, the median of `--repeats` runs taken in turns.
Memory is anonymous memory (RssAnon, so without the page cache that maps are served from), sampled every 5 ms in a
process of its own that reads 2,000 batches of 4 scattered over three epochs, in rising order, as a run does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from _token_stores import anonymous_memory, write_store
from loguru import logger

from openchatkit.data.dataset import Dataset
from openchatkit.data.mixture import Interleaving
from openchatkit.data.options import LOSS_ON, PACKINGS, DataOptions
from openchatkit.data.samples.packing import pack
from openchatkit.data.samples.source import Content, MixtureSource
from openchatkit.formats.token_store import TokenStore

SEQ_LENGTH = 2048
EPOCHS, BATCHES, BATCH_SIZE = 3, 2000, 4
NEEDED = 10_000  # tokens a second that a core may train on


def open_dataset(prefix: Path, packing: str, loss_on: str) -> Dataset:
    """A data set of one store, as training opens it."""
    store = TokenStore(prefix)
    content = Content(store, prefix.name, store.documents, trained_tokens=len(store.tokens) // 2)
    source = MixtureSource(prefix.name, 1.0, [content], loss_on=loss_on, number=0, seed=1, cache_dir=prefix.parent)
    options = DataOptions(prefix.parent, seq_length=SEQ_LENGTH, packing=packing, loss_on=loss_on)
    packed = pack(source, SEQ_LENGTH, packing=packing, padding=0)
    turns = Interleaving.by_weight([1.0], seed=1)
    return Dataset([source], [packed], options, interleaving=turns, epoch_samples=packed.samples, fingerprint="")


def measure(prefix: Path, packing: str) -> dict[str, float]:
    """Seconds to open the store, the data set and the first batch, and the peak of memory over the epochs."""
    peak, done = anonymous_memory(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_memory())

    begin = time.perf_counter()
    TokenStore(prefix)
    times = [time.perf_counter() - begin]
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    begin = time.perf_counter()
    data = open_dataset(prefix, packing, "all")
    times.append(time.perf_counter() - begin)
    begin = time.perf_counter()
    data.batch(0, BATCH_SIZE)
    times.append(time.perf_counter() - begin)
    samples = EPOCHS * data.epoch_samples
    for batch in range(BATCHES):
        data.batch(batch * (samples - BATCH_SIZE) // BATCHES, BATCH_SIZE)
    done.set()
    thread.join()
    return dict(zip(("store", "dataset", "batch"), times, strict=True)) | {"peak": peak}


def print_rates(folder: Path, repeats: int) -> None:
    """Tokens a second of each packing, with and without masks."""
    prefix = folder / "rates"
    write_store(prefix, 100_000, mean=None, masked=True)
    datasets = {
        (packing, loss_on): open_dataset(prefix, packing, loss_on) for packing in PACKINGS for loss_on in LOSS_ON
    }
    rates: dict[tuple[str, str], list[float]] = {key: [] for key in datasets}
    for repeat in range(repeats + 1):  # the first only builds the orders
        for key, data in datasets.items():
            begin = time.perf_counter()
            tokens = data.batch(512 * repeat, 512).tokens.numel()
            rates[key].append(tokens / (time.perf_counter() - begin))
    print(f"| batch, rows of {SEQ_LENGTH} | million tokens/s | times {NEEDED:,} tokens/s | padding |")
    print("| --- | --- | --- | --- |")
    for (packing, loss_on), found in rates.items():
        rate, (packed,) = statistics.median(found[1:]), datasets[packing, loss_on].packed
        print(f"| {packing}, {loss_on} | {rate / 1e6:.1f} | {rate / NEEDED:,.0f} | {packed.waste:.2%} |")


def print_memory(folder: Path, counts: list[int]) -> None:
    """Times to open and peaks of memory, a process for each."""
    print("| documents | packing | open store, s | open data set, s | first batch, s | peak anonymous memory, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for count in counts:
        prefix = folder / f"memory-{count}"
        write_store(prefix, count, mean=20, masked=False)
        for packing in PACKINGS:
            command = [sys.executable, __file__, "--measure", str(prefix), packing]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
            times = " | ".join(f"{result[name]:.3f}" for name in ("store", "dataset", "batch"))
            print(f"| {count:,} | {packing} | {times} | {result['peak'] / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--documents", type=int, nargs="+", default=[10_000, 10_000_000])
    parser.add_argument("--measure", nargs=2, metavar=("PREFIX", "PACKING"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="ERROR")
    if args.measure:
        print(json.dumps(measure(Path(args.measure[0]), args.measure[1])))
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        print_rates(Path(name), args.repeats)
        print()
        print_memory(Path(name), args.documents)


if __name__ == "__main__":
    main()
