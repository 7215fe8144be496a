"""Time and peak memory of preparing and converting a model: python benchmarks/prepare_convert.py

Makes a GPT-NeoX model of random weights (and of it a checkpoint in float32), runs the real commands in processes of
their own, and before each the reference: a copy with fsync of the files that the command reads, and one SHA-256 pass
over the copy. Goals: at most twice the reference's time, and at most two layers (as the model stores them) plus 300 MB
of memory, interpreter and torch included.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from openchatkit.formats import checkpoint
from openchatkit.formats.hf_model import PICKLED, WEIGHTS
from openchatkit.formats.layer_shards import CONFIG, LayerShards, shard_file
from openchatkit.formats.tensor_file import TensorSpec, tensor_bytes, write_stream
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import shard_names
from openchatkit.paths import ROOT
from openchatkit.storage import sha256, sync

MB = 1_000_000
PREPARE = ROOT / "tools" / "convert_from_hf_gptneox.py"
CONVERT = ROOT / "tools" / "convert_to_hf_gptneox.py"
# Runs a script as `python SCRIPT` would, and at its end writes the most memory that its process ever had resident.
MEASURED = """
import atexit, resource, runpy, sys
def report(path=sys.argv[1]):
    try:
        peak = int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    open(path, "w").write(str(peak))
atexit.register(report)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Row:
    """What one command took, beside the reference on the bytes that it reads; the figures of every repetition."""

    name: str
    size: int
    seconds: list[float]
    reference: list[float]
    peaks: list[int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=1024)
    parser.add_argument("--num-layers", type=int, default=16)
    parser.add_argument("--vocab-size", type=int, default=50432)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--repeat", type=int, default=3, help="the table shows medians")
    parser.add_argument(
        "--folder", type=Path, help="a folder on the disk to measure; the system's temporary if not given"
    )
    args = parser.parse_args()
    raw = {
        "model_type": "gpt_neox",
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.num_layers,
        "num_attention_heads": args.hidden_size // 64,
        "intermediate_size": 4 * args.hidden_size,
    }
    with tempfile.TemporaryDirectory(prefix="prepare_convert_", dir=args.folder) as name:
        work = Path(name)
        layer = make_model(work, raw, getattr(torch, args.dtype))
        make_tokenizer(work / "safetensors")
        shutil.copy(work / "safetensors" / CONFIG, work / "pickled")
        rows = [
            measure("prepare", work / "safetensors" / WEIGHTS, prepare(work, "safetensors"), args.repeat),
            measure("prepare, from pickled", work / "pickled" / PICKLED, prepare(work, "pickled"), args.repeat),
        ]
        make_checkpoint(work / "shards_safetensors" / "safetensors", work / "ckpt")
        convert = [CONVERT, "--ckpt-path", work / "ckpt", "--save-path", work / "hf"]
        weights = work / "ckpt" / "checkpoint_1"
        rows += [
            measure("convert", weights, convert, args.repeat),
            measure("convert --fp16", weights, [*convert, "--fp16"], args.repeat),
        ]
        start = work / "start.py"
        start.write_text("import torch")
        starts = [run_measured([start])[0] for _ in range(args.repeat)]
    print_table(rows, layer=layer)
    print(f"Of each command's time, starting python and importing torch: {statistics.median(starts):.2f} seconds.")


def prepare(work: Path, source: str) -> list[str | Path]:
    """The command that prepares the model in `work / source`."""
    return [PREPARE, "--model-name", work / source, "--save-dir", work / f"shards_{source}"]


def make_model(work: Path, raw: dict, dtype: torch.dtype) -> int:
    """Write one model of random weights as safetensors and pickled; returns the bytes of one layer."""
    config = config_from_hf(raw)
    kind = family(config)
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {}
    for shard in shard_names(config.num_layers):
        for name, shape in kind.parameter_shapes(config, shard).items():
            count = torch.Size(shape).numel()
            tensors[kind.hf_key(shard, name)] = block.repeat(-(-count // len(block)))[:count].reshape(shape)
    for folder in ("safetensors", "pickled"):
        (work / folder).mkdir()
        (work / folder / CONFIG).write_text(json.dumps(raw))
    specs = {key: TensorSpec(dtype, tuple(tensor.shape)) for key, tensor in tensors.items()}
    write_stream(work / "safetensors" / WEIGHTS, specs, lambda key: [tensor_bytes(tensors[key])])
    torch.save({key: tensor.clone() for key, tensor in tensors.items()}, work / "pickled" / PICKLED)
    return sum(spec.nbytes for key, spec in specs.items() if kind.from_hf_key(key)[0] == "layer_00000")


def make_tokenizer(folder: Path) -> None:
    """The smallest tokenizer that a converted model can carry."""
    vocabulary = {"<|endoftext|>": 0, "a": 1}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))


def make_checkpoint(shards: Path, root: Path) -> None:
    """A checkpoint with the prepared weights in float32, as training writes it, but without optimizer state."""
    prepared = LayerShards.open(shards)
    temporary = checkpoint.begin(root, 1)
    records = []
    for shard in prepared.shards:
        weights = {name: tensor.float() for name, tensor in prepared.read(shard).items()}
        records.append(checkpoint.write_weights(temporary, shard, weights))
    checkpoint.finish(
        temporary, root, 1, state={}, records=records, raw_config=prepared.raw_config, tokenizer_from=shards
    )


def measure(name: str, source: Path, command: list[str | Path], repeat: int) -> Row:
    """Run the reference on `source` (a file, or a folder of shards) and the command, in turns."""
    files = [source] if source.is_file() else sorted(source.glob(shard_file("*")))
    row = Row(name, sum(file.stat().st_size for file in files), [], [], [])
    output = Path(command[4])
    for _ in range(repeat):
        shutil.rmtree(output, ignore_errors=True)
        os.sync()
        row.reference.append(copy_and_hash(files, output))
        os.sync()
        seconds, peak = run_measured(command)
        row.seconds.append(seconds)
        row.peaks.append(peak)
    return row


def run_measured(command: list[str | Path]) -> tuple[float, int]:
    """Seconds that a command took in a process of its own, and the most bytes it had resident."""
    with tempfile.NamedTemporaryFile() as report:
        started = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", MEASURED, report.name, *map(str, command)],
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - started
        if run.returncode:
            raise SystemExit(f"{' '.join(map(str, command))} failed:\n{run.stderr}")
        return seconds, int(Path(report.name).read_text())


def copy_and_hash(files: list[Path], target: Path) -> float:
    """Seconds to copy files with fsync and to read the copies once through SHA-256."""
    target.mkdir(parents=True)
    started = time.perf_counter()
    for file in files:
        shutil.copyfile(file, target / file.name)
        sync(target / file.name)
        sha256(target / file.name)
    seconds = time.perf_counter() - started
    shutil.rmtree(target)
    return seconds


def print_table(rows: list[Row], *, layer: int) -> None:
    """Medians of the times, the ratio of medians, and the highest peak, beside the goals."""
    bound = 2 * layer + 300 * MB
    print(
        f"{'command':<24}{'MB':>8}{'seconds':>10}{'copy+hash':>11}{'ratio':>7}{'goal':>6}{'peak MB':>9}{'goal MB':>9}"
    )
    for row in rows:
        seconds, reference = statistics.median(row.seconds), statistics.median(row.reference)
        print(
            f"{row.name:<24}{row.size / MB:>8.0f}{seconds:>10.2f}{reference:>11.2f}{seconds / reference:>7.2f}{2:>6}"
            f"{max(row.peaks) / MB:>9.0f}{bound / MB:>9.0f}"
        )


if __name__ == "__main__":
    main()
