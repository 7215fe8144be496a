"""What saves cost a run, and how soon it ends when a rank dies or freezes.

    python benchmarks/save_stall.py

Two ranks, one thread each, train a model that starts at random. Saves: the same steps without any, with blocking ones
(`--checkpoint-in-background false`) and with those beside the steps, taking turns. Every time is that of the run's own
log: "steps waited" for a save, and the sum of all steps and waits but for the last save, which nothing could hide.

Ends: rank 1 is killed (SIGKILL) or frozen (SIGSTOP) in the middle of steps; until the line that names it, and until the
launcher has ended. A frozen one cannot be noticed before `--heartbeat-timeout`.
"""

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from _text_model import add_size_flags, one_thread, training_command, write_model

from openchatkit.paths import ROOT

WAYS = {
    "none": "--checkpoint-steps 0",
    "blocking": "--checkpoint-steps {every} --checkpoint-in-background false",
    "beside the steps": "--checkpoint-steps {every}",
}
SAVED = re.compile(r"saved \S+ \(([^)]*)\)(?:: steps waited| in) ([\d.]+) s")


def make_command(folder: Path, out: Path, options: argparse.Namespace, flags: str) -> list[str]:
    """Return the command of a run of two ranks, with its checkpoints in a new folder."""
    command = training_command(folder, out, options, ranks=2)
    command += ["--batch-size", str(options.batch_size), "--micro-batch-size", str(options.batch_size)]
    return [*command, "--data-group-size", "2", "--dp-mode", "sharded", *flags.split()]


def read_steps(out: Path) -> list[float]:
    """Return the seconds of the steps that a run has taken so far."""
    path = out / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line)["seconds"] for line in lines if line.endswith("\n")]


def time_saves(folder: Path, options: argparse.Namespace, way: str) -> tuple[str, list[float], float]:
    """Train; return a checkpoint's size, the wait for each save but the last, and the sum of steps and these waits."""
    flags = f"--total-steps {options.steps} " + WAYS[way].format(every=options.every)
    with tempfile.TemporaryDirectory(dir=options.disk) as disk:
        out = Path(disk) / "ckpt"
        ended = subprocess.run(
            make_command(folder, out, options, flags), cwd=ROOT, env=one_thread(), capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr[-2000:]
        seconds = read_steps(out)
    found = SAVED.findall(ended.stderr)
    waits = [float(wait) for _, wait in found[:-1]]
    return found[-1][0], waits, sum(seconds[1:]) + sum(waits)


def time_end(folder: Path, options: argparse.Namespace, sign: int) -> tuple[float, float]:
    """Return the seconds from a signal to rank 1 until the line that names it, and until the launcher has ended."""
    flags = f"--total-steps 1000000 --heartbeat-timeout {options.heartbeat_timeout}"
    with tempfile.TemporaryDirectory(dir=options.disk) as disk:
        out, log = Path(disk) / "ckpt", Path(disk) / "log"
        with open(log, "w") as errors:
            command = make_command(folder, out, options, flags)
            process = subprocess.Popen(command, cwd=ROOT, env=one_thread(), stderr=errors)
        try:
            for _ in poll(process, log):
                if len(read_steps(out)) >= 5:
                    break
            time.sleep(2.5)  # until a beat has said that steps are being taken
            found = subprocess.run(
                ["pgrep", "-P", str(process.pid), "-f", "[-]-rank 1 "], capture_output=True, text=True, check=True
            )
            os.kill(int(found.stdout), sign)
            started, named = time.monotonic(), None
            while process.poll() is None:
                if named is None and re.search(r"error: rank 1 on ", log.read_text()):
                    named = time.monotonic() - started
                time.sleep(0.01)
            ended = time.monotonic() - started
            assert re.search(r"error: rank 1 on ", log.read_text()), log.read_text()[-2000:]
            return ended if named is None else named, ended
        finally:
            process.kill()  # its guard kills the ranks
            process.wait()


def poll(process: subprocess.Popen, log: Path) -> Iterator[None]:
    """Yield now and then for as long as a process runs; its end is an error."""
    while process.poll() is None:
        yield
        time.sleep(0.05)
    raise AssertionError(log.read_text()[-2000:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_flags(parser, layers=6, width=512, vocabulary=16384, seq_length=256)
    parser.add_argument("--batch-size", type=int, default=2, help="rows of a replica")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--every", type=int, default=5, help="steps between saves")
    parser.add_argument("--heartbeat-timeout", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--disk", type=Path, help="where checkpoints go; not given: the folder for temporary files")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder, options)
        found: dict[str, list[tuple[str, list[float], float]]] = {way: [] for way in WAYS}
        for _ in range(options.rounds):
            for way in WAYS:
                found[way].append(time_saves(folder, options, way))
        print_saves(found)
        print("\n| rank 1 is | named after | the launcher has ended after |\n|-|-|-|")
        for name, sign in (("killed", signal.SIGKILL), ("frozen", signal.SIGSTOP)):
            ends = [time_end(folder, options, sign) for _ in range(options.rounds)]
            named, ended = (", ".join(f"{seconds:.1f} s" for seconds in each) for each in zip(*ends, strict=True))
            after = f" ({options.heartbeat_timeout} s of which are --heartbeat-timeout)" if name == "frozen" else ""
            print(f"| {name} | {named}{after} | {ended} |", flush=True)


def print_saves(found: dict[str, list[tuple[str, list[float], float]]]) -> None:
    """Print a line for each way of saving: the median wait for a save, and the best total of all rounds."""
    [size, *_] = {size for runs in found.values() for size, _, _ in runs}
    plain = min(total for _, _, total in found["none"])
    blocking = statistics.median(wait for _, waits, _ in found["blocking"] for wait in waits)
    print(f"A checkpoint has {size}.\n")
    print("| saves | steps waited for one | of a blocking one | steps and waits | slower by |\n|-|-|-|-|-|")
    for way, runs in found.items():
        waits, total = [wait for _, of_run, _ in runs for wait in of_run], min(total for _, _, total in runs)
        cells = [way, "", "", f"{total:.2f} s", f"{total / plain - 1:.1%}" if way != "none" else ""]
        if waits:
            cells[1:3] = [f"{statistics.median(waits):.3f} s", f"{statistics.median(waits) / blocking:.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
