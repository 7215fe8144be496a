"""Measure how long a model takes to be found, loaded, moved to a device and run once, and the memory it fills.

Every model has a process of its own, so that memory, imports and caches of one do not count for the next. The keys of
the results are those of the original kit. Libraries and the GPU are ready before the first clock starts.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from openchatkit import cli
from openchatkit.errors import USER_ERROR, UserError
from openchatkit.progress import bar
from openchatkit.storage import write_text

if TYPE_CHECKING:
    import torch

_MIB = 1 << 20
PROMPT = "<human>: Hello, how are you today?\n<bot>:"
_T = TypeVar("_T")


def measure(name: str, device: "torch.device", *, repeat: int) -> dict[str, float]:
    """Measure seconds and MiB of one model, loaded as it is stored, in this process, which should have loaded no other.

    `inference_sec` is the first pass over a short prompt, `inference_warm_sec` the mean of `repeat` more. On the CPU
    the transfer takes no time and no GPU memory. UserError when there is no such model, or it does not load.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from openchatkit.formats import hf_model
    from openchatkit.inference.loading import model_folders
    from openchatkit.loading import hardware, model_kinds, pretrained

    def timed(action: Callable[[], _T]) -> tuple[_T, float]:
        hardware.synchronize(device)
        start = time.perf_counter()
        result = action()
        hardware.synchronize(device)
        return result, time.perf_counter() - start

    def load(kind: Any, folder: Path, **more: object) -> Any:
        with pretrained.one_line_errors(folder):
            return kind.from_pretrained(folder, **pretrained.LOCAL, **more)

    begun = time.perf_counter()
    small, tokenizer_download = timed(lambda: hf_model.fetch(name, weights=False))
    tokenizer, tokenizer_load = timed(lambda: load(AutoTokenizer, small))
    found, model_download = timed(lambda: model_folders.find_model(name))
    if found.kind != model_kinds.HUGGING_FACE:
        raise UserError(f"{name} is a {found.kind}: expected a Hugging Face model; tools/convert_to_hf_*.py make one")
    before = hardware.main_memory_in_use()
    model, load_to_ram = timed(lambda: _read_weights(load(AutoModelForCausalLM, found.path, dtype="auto").eval()))
    main_memory = hardware.main_memory_in_use() - before
    held, transfer = _gpu_memory(device), 0.0
    if device.type != "cpu":
        model, transfer = timed(lambda: model.to(device))
    gpu_memory = _gpu_memory(device) - held
    tokens = torch.tensor([tokenizer.encode(PROMPT)], device=device)
    with torch.inference_mode():
        _, first = timed(lambda: model(tokens))
        _, warm = timed(lambda: _repeat(lambda: model(tokens), repeat))
    return {
        "tokenizer_download_sec": tokenizer_download,
        "tokenizer_load_sec": tokenizer_load,
        "model_download_sec": model_download,
        "model_load_to_ram_sec": load_to_ram,
        "model_main_memory_MB": main_memory / _MIB,
        "model_transfer_to_gpu_sec": transfer,
        "model_gpu_memory_MB": gpu_memory / _MIB,
        "inference_sec": first,
        "inference_warm_sec": warm / repeat,
        "total_sec": time.perf_counter() - begun,
    }


def benchmark(models: dict[str, str], output: Path, *, device: str, repeat: int) -> dict[str, dict[str, float]]:
    """Measure each model of {name: path or hub name}, one after the other, in processes of their own.

    `output` is written after each, so that a model that cannot be loaded does not cost the others their results.
    """
    results: dict[str, dict[str, float]] = {}
    with bar(len(models), "loading", unit="model") as progress:
        for name, path in models.items():
            results[name] = _measure_in_process(name, path, device, repeat)
            assert all(map(math.isfinite, results[name].values())), results
            try:
                write_text(output, json.dumps(results, indent=2) + "\n")
            except OSError as error:
                raise UserError(f"--output {output} cannot be written: {error.strerror}") from error
            progress.update()
    return results


def _read_models(path: Path) -> dict[str, str]:
    """Read the input file, {name: path or hub name}; UserError when it holds anything else."""
    try:
        models = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--input {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"--input {path} is not JSON: {error}") from error
    if not isinstance(models, dict) or not models or not all(isinstance(value, str) for value in models.values()):
        raise UserError(f'--input {path}: expected an object of models such as {{"pythia": "EleutherAI/pythia-1.4b"}}')
    return models


def _measure_in_process(name: str, path: str, device: str, repeat: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result"
        command = [
            sys.executable,
            "-c",
            f"from {__name__} import child; child()",
            path,
            device,
            str(repeat),
            str(result),
        ]
        done = subprocess.run(command, stderr=subprocess.PIPE, encoding="utf-8", errors="replace", check=False)
        if done.returncode == 0:
            numbers: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))
            return numbers
    said = (done.stderr.strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
    if done.returncode == USER_ERROR:
        raise UserError(f"{name}: {said}")
    ended = f"status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}, perhaps out of memory"
    raise UserError(f"{name}: measuring {path} ended with {ended}: {said}")


def child() -> None:
    """Run as the process of one model, whose arguments are path, device, repetitions and the file for the result."""

    @cli.command
    def run(argv: Sequence[str] | None = None) -> None:
        from openchatkit.inference.engine import engine
        from openchatkit.inference.loading import loader

        path, device, repeat, result = argv or []
        loader.silence_libraries()
        try:
            numbers = measure(path, _initialise(device), repeat=int(repeat))
        except (RuntimeError, MemoryError) as error:
            if engine.is_out_of_memory(error):
                raise UserError(f"{path} does not fit into the memory of {device}") from error
            raise
        write_text(Path(result), json.dumps(numbers))

    run(sys.argv[1:])


def _repeat(action: Callable[[], object], times: int) -> None:
    for _ in range(times):
        action()


def _initialise(name: str) -> "torch.device":
    """Return the device, with its context made, so that no clock measures that; UserError when there is none."""
    import torch

    from openchatkit.loading import hardware

    try:
        device = torch.device(name)
        torch.ones(8, 8, device=device).mm(torch.ones(8, 8, device=device))
        hardware.synchronize(device)
    except (RuntimeError, AssertionError, NotImplementedError, AttributeError) as error:
        raise UserError(f"--device {name} cannot be used here (pass -d cpu?): {str(error).splitlines()[0]}") from error
    return device


def _read_weights(model: Any) -> Any:
    """Read every page of the weights: of a memory-mapped file, nothing is in main memory before that."""
    for tensor in (*model.parameters(), *model.buffers()):
        flat = tensor.detach().reshape(-1)
        flat[:: max(1, os.sysconf("SC_PAGESIZE") // tensor.element_size())].sum()
    return model


def _gpu_memory(device: "torch.device") -> int:
    """Return the bytes of tensors on a GPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return torch.mps.current_allocated_memory() if device.type == "mps" else 0


def _print_table(results: dict[str, dict[str, float]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("", box=box.SIMPLE)
    for name in results:
        table.add_column(name, justify="right")
    for key in next(iter(results.values())):
        table.add_row(key, *(f"{numbers[key]:.{1 if key.endswith('MB') else 4}f}" for numbers in results.values()))
    Console().print(table)


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the file as it grows, print a table."""
    parser = cli.Parser(
        prog="tools/model_load_benchmark.py",
        description="Measure how long models take to load and to answer once, and the memory they fill.",
    )
    parser.add_argument("-i", "--input", type=Path, required=True, help="JSON file, {name: folder or hub name}")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write, {name: {key: number}}")
    parser.add_argument("-d", "--device", default="cuda:0", help="cuda:0, cpu, ...")
    parser.add_argument("-r", "--repeat-infer", type=cli.positive_int, default=30, help="warm passes to average")
    args = parser.parse_args(argv)
    if args.output.is_dir():
        raise UserError(f"--output {args.output} is a folder: expected the name of a file to write")
    _print_table(benchmark(_read_models(args.input), args.output, device=args.device, repeat=args.repeat_infer))
