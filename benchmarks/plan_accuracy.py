"""Predicted speed and memory of short CPU runs against what they were, for several layouts: the line after 20 steps.

    python benchmarks/plan_accuracy.py

Each run is the training command itself, one process a rank and one thread each, on a model that starts at random. Speed
is of use only on a machine that does nothing else, with a core for each rank.
"""

import argparse
import re
import subprocess
import tempfile
from pathlib import Path

from _text_model import add_size_flags, one_thread, training_command, write_model

from openchatkit.paths import ROOT

LAYOUTS = {
    "one process": "",
    "1f1b": "--pipeline-group-size 2 --pp-mode 1f1b",
    "interleaved": "--pipeline-group-size 2 --pp-mode interleaved",
    "zero-bubble": "--pipeline-group-size 2 --pp-mode zero-bubble --activation-checkpointing none",
    "allreduce": "--data-group-size 2",
    "sharded": "--data-group-size 2 --dp-mode sharded",
    "tensor group": "--tensor-group-size 2",
    "tokens split": "--tensor-group-size 2 --sequence-parallel",
    "documents": "--tensor-group-size 2 --packing documents",
}
LINE = re.compile(
    r"after \d+ steps: ([\d,]+) tokens/s, predicted ([\d,]+) .*; ([\d.]+) GiB on the fullest rank, predicted ([\d.]+)"
)


def run(folder: Path, flags: str, options: argparse.Namespace) -> tuple[float, float, float, float]:
    """Train; return tokens a second and GiB, each as measured and as predicted."""
    ranks = 2 if "group-size" in flags else 1
    with tempfile.TemporaryDirectory() as out:
        command = training_command(folder, Path(out) / "ckpt", options, ranks=ranks)
        command += ["--total-steps", "20", "--batch-size", "8", "--micro-batch-size", str(options.micro_batch_size)]
        command += flags.split()
        ended = subprocess.run(command, cwd=ROOT, env=one_thread(), capture_output=True, text=True, check=False)
    found = LINE.search(ended.stderr)
    assert found is not None, ended.stderr[-2000:]
    speed, predicted, held, counted = (float(number.replace(",", "")) for number in found.groups())
    return speed, predicted, held, counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_size_flags(parser, layers=8, width=384, vocabulary=8192, seq_length=64)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--only", choices=LAYOUTS, action="append", help="layouts; not given: all")
    options = parser.parse_args()
    print("| layout | tokens/s | predicted | | GiB | predicted | |\n|-|-|-|-|-|-|-|")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, options)
        for name in options.only or LAYOUTS:
            speed, predicted, held, counted = run(model, LAYOUTS[name], options)
            cells = [name, f"{speed:,.0f}", f"{predicted:,.0f}", f"{predicted / speed - 1:+.0%}"]
            cells += [f"{held:.2f}", f"{counted:.2f}", f"{counted / held - 1:+.0%}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
