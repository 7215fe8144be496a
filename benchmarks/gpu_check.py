"""Correctness and speed on one GPU, in parts of which each is a process with a time limit: bash benchmarks/gpu_check.sh

Prints a row for each result as it comes and keeps them in a folder: rows.jsonl, results.json, and results.md with a
table for each part. Parts come in the order of their worth, so that being cut off costs the last ones. Exit status 0
means that nothing failed and nothing was cut. `--device cpu` runs all that exists there, at toy size.
"""

import argparse
import dataclasses
import importlib
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from _gpu_check import report, rows, runner
from _gpu_check.runner import Part

# cuBLAS sums in one order only with a workspace of this kind, which it reads when it starts.
_REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
PARTS = (
    Part("machine", 15, 60),
    Part("correctness", 50, 90),
    Part("deterministic", 15, 45, _REPEATABLE),
    Part("profile", 15, 45),
    Part("trainer", 60, 120),
    Part("attention", 30, 60),
    Part("loss", 20, 45),
    Part("training", 150, 180),
    Part("decoding", 90, 120),
    Part("snapshot", 20, 40),
)
NAMES = [part.name for part in PARTS]


def main() -> int:
    """Run the parts, or with --only the one that this process is for."""
    options = parse()
    if options.only:
        return run_one(options)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "rows.jsonl"
    path.unlink(missing_ok=True)
    about = {"device": options.device, "size": options.size, "seconds": options.seconds, "parts": options.parts}

    def write() -> None:
        report.write(options.output, rows.read(path), about)

    def command(part: Part, seconds: float) -> Sequence[str]:
        places = ["--device", options.device, "--size", options.size, "--output", str(options.output)]
        return [sys.executable, __file__, "--only", part.name, "--seconds", str(seconds), *places]

    # Ended from outside, it must not leave a part running on the card.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    chosen = [part for part in PARTS if part.name in options.parts]
    if options.device == "cpu":
        # The limits are for a GPU; a CPU takes as long as it takes, within --seconds.
        chosen = [dataclasses.replace(part, limit=options.seconds) for part in chosen]
    found = runner.run(chosen, command, seconds=options.seconds, folder=options.output, after=write)
    print(f"\n{report.markdown(found)}\n{len(found)} rows in {options.output}", flush=True)
    return report.exit_status(found)


def run_one(options: argparse.Namespace) -> int:
    """Run one part in this process; a failed check is a row, so only a crash is another exit status than 0."""
    path = options.output / "rows.jsonl"
    context = rows.Context(options.only, path, device=options.device, size=options.size, seconds=options.seconds)
    part = importlib.import_module(f"_gpu_check.{options.only}")
    if options.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            rows.append(path, rows.Row(options.only, "all", rows.FAILED, "torch finds no CUDA device"))
            return 0
    part.run(context)
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_parts, default=NAMES, help=f"some of {','.join(NAMES)} (default: all)")
    parser.add_argument("--seconds", type=float, default=480, help="for everything together")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=("toy", "full"), help="default: toy on the CPU, else full")
    default = Path(os.environ.get("OUT") or Path(tempfile.gettempdir()) / "openchatkit-gpu-check")
    parser.add_argument("--output", type=Path, default=default, help=f"folder for the results ({default})")
    parser.add_argument("--only", choices=NAMES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size = options.size or ("toy" if options.device == "cpu" else "full")
    options.output = options.output.resolve()
    return options


def _parts(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in NAMES]:
        raise argparse.ArgumentTypeError(f"no part {wrong[0]!r}; there are {', '.join(NAMES)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
