"""Training tokens per second and peak memory against transformers.Trainer and litgpt: same model, batch and precision.

    python benchmarks/train_throughput.py --shapes 14m 70m 160m
    python benchmarks/train_throughput.py --shapes 14m 70m --compile --litgpt ../litgpt/bin/python

Every measurement is a process of its own; the contestants take turns, and the median of their steps counts. With a GPU,
`--shapes auto` takes the widest GPT-NeoX that fits it with Adam and prints the share of the card's matrix rate.
litgpt has its own dependencies, so it is given as an interpreter that has it and torch: its model, loss and loop of
`litgpt pretrain`, which compiles the model; `--compile` also lets ours and litgpt's run both ways.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

# Published Pythia shapes: layers, width, heads; the vocabulary is 50,304 for all of them.
SHAPES = {"14m": (6, 128, 4), "70m": (6, 512, 8), "160m": (12, 768, 12), "410m": (24, 1024, 16), "1b": (16, 2048, 8)}
SHAPES |= {"1.4b": (24, 2048, 16), "2.8b": (32, 2560, 32), "6.9b": (32, 4096, 32)}
VOCABULARY = 50304


def hf_config(shape: str, seq_length: int) -> dict:
    layers, width, heads = SHAPES[shape]
    return {
        "model_type": "gpt_neox",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "max_position_embeddings": seq_length,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10000,
        "hidden_act": "gelu",
        "use_parallel_residual": True,
    }


def run_ours(options: argparse.Namespace) -> list[float]:
    from _random_tokens import RandomTokens

    from openchatkit.distributed.layout import Layout
    from openchatkit.models.registry import config_from_hf
    from openchatkit.models.stage import Stage
    from openchatkit.training.device import keep_freed_memory
    from openchatkit.training.learning_rates import LearningRates
    from openchatkit.training.local_stages import LocalStages
    from openchatkit.training.optimizer import build_optimizer
    from openchatkit.training.precision import LossScaler
    from openchatkit.training.step import Schedule, Trainer
    from openchatkit.training.weights import Weights

    device = torch.device(options.device)
    if device.type == "cpu":
        keep_freed_memory()
    with torch.device("meta"):
        stage = Stage(config_from_hf(hf_config(options.shape, options.seq_length)), recompute=options.recompute)
    stage.to_empty(device=device)
    stage.init_weights(0)
    if options.compile:
        stage.compile_layers("inductor")
    dtype = getattr(torch, options.precision)
    weights = Weights(LocalStages({0: stage}), Layout(0, device), dtype=dtype)
    weights.optimizer = build_optimizer("adamw", weights, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    trainer = Trainer(
        weights,
        LossScaler(1.0, dynamic=False),
        Schedule(options.batch, 1, LearningRates(1e-4, 1000), 1000, 1.0),
        dtype=dtype,
        pp_mode="gpipe",
        micro_batch_size=options.batch,
        seq_length=options.seq_length,
    )
    data, times = RandomTokens(options.seq_length, vocabulary=VOCABULARY), []
    for number in range(options.steps + 1):
        started = time.perf_counter()
        trainer.step(number, data)
        times.append(time.perf_counter() - started)
    return times[1:]


def run_transformers(options: argparse.Namespace) -> list[float]:
    import tempfile

    from _random_tokens import RandomTokens
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.stamps = []

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.stamps.append(time.perf_counter())

        def on_step_end(self, *_: object, **__: object) -> None:
            if options.device == "cuda":
                torch.cuda.synchronize()
            self.stamps.append(time.perf_counter())

    source = RandomTokens(options.seq_length, vocabulary=VOCABULARY)
    rows = [source.batch(i, 1).tokens[0] for i in range(options.batch * (options.steps + 1))]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=options.batch,
            max_steps=options.steps + 1,
            bf16=options.precision == "bfloat16",
            use_cpu=options.device == "cpu",
            gradient_checkpointing=options.recompute,
            learning_rate=1e-4,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        config = GPTNeoXConfig(**hf_config(options.shape, options.seq_length))
        model = GPTNeoXForCausalLM(config)
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[clock]).train()
    times = [end - begin for begin, end in zip(clock.stamps[::2], clock.stamps[1::2], strict=True)]
    return times[1:]


def run_litgpt(options: argparse.Namespace) -> list[float]:
    import lightning
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    precision = "bf16-mixed" if options.precision == "bfloat16" else "32-true"
    fabric = lightning.Fabric(accelerator=options.device, devices=1, precision=precision)
    layers, width, heads = SHAPES[options.shape]
    sizes = {"n_layer": layers, "n_embd": width, "n_head": heads, "intermediate_size": 4 * width}
    config = Config.from_name("pythia-14m", **sizes, n_query_groups=heads, head_size=width // heads)
    with fabric.init_module():
        model = GPT(config)
    model.max_seq_length = options.seq_length
    model = fabric.setup(torch.compile(model) if options.compile else model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=options.device == "cuda")
    optimizer = fabric.setup_optimizers(optimizer)
    times = []
    for _ in range(options.steps + 1):
        rows = torch.randint(0, VOCABULARY, (options.batch, options.seq_length + 1), device=options.device)
        started = time.perf_counter()
        loss = chunked_cross_entropy(model(rows[:, :-1].contiguous()), rows[:, 1:].contiguous())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        times.append(time.perf_counter() - started)
    return times[1:]


CONTESTANTS = {"openchatkit": run_ours, "transformers.Trainer": run_transformers, "litgpt": run_litgpt}
COMPILED = ", compiled"


def list_contestants(options: argparse.Namespace) -> list[str]:
    names = ["openchatkit", "transformers.Trainer"] + ["litgpt"] * bool(options.litgpt)
    return names + [name + COMPILED for name in names if options.compile and name != "transformers.Trainer"]


def measure(contestant: str, shape: str, options: argparse.Namespace) -> dict:
    name = contestant.removesuffix(COMPILED)
    command = [options.litgpt if name == "litgpt" else sys.executable, __file__, "--contestant", name]
    command += ["--shape", shape, "--device", options.device, "--precision", options.precision]
    command += ["--batch", str(options.batch), "--seq-length", str(options.seq_length), "--steps", str(options.steps)]
    command += ["--recompute"] * options.recompute + ["--compile"] * (name != contestant)
    output = subprocess.run(command, capture_output=True, text=True, check=False)
    if output.returncode:
        return {"error": (output.stderr.strip().splitlines() or ["killed"])[-1][:80]}
    return json.loads(output.stdout.splitlines()[-1])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["70m"], choices=[*SHAPES, "auto"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4, help="measured steps, after one that is not")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contestant")
    parser.add_argument("--recompute", action="store_true", help="activation checkpointing, but for litgpt")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), help="default: what the hardware computes in")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which needs a C++ compiler")
    parser.add_argument("--litgpt", help="a Python interpreter that has litgpt, and the same torch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("--shape", choices=SHAPES, help=argparse.SUPPRESS)
    return parser.parse_args()


def name_processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def matmul_rate(device: str, precision: str) -> float:
    """Measured matrix rate of the device in FLOP/s: the best of a few large square products."""
    size = 8192 if device == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=getattr(torch, precision))
    best = 0.0
    for _ in range(5):
        started = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * size**3 / (time.perf_counter() - started))
    return best


def flops_per_token(shape: str, seq_length: int) -> float:
    """6 FLOP a matrix parameter, and attention's 6 x layers x width x length (causal: half the square)."""
    layers, width, _ = SHAPES[shape]
    return 6 * (12 * layers * width**2 + VOCABULARY * width) + 6 * layers * width * seq_length


def widest(memory: int) -> str:
    """The largest shape whose parameters, gradients and Adam state (16 bytes each) take under 80 % of the memory."""

    def size(shape: str) -> int:
        layers, width, _ = SHAPES[shape]
        return 16 * (12 * layers * width**2 + 2 * VOCABULARY * width)

    return max((s for s in SHAPES if size(s) < 0.8 * memory), key=size)


def main() -> None:
    options = parse()
    if options.contestant:
        times = CONTESTANTS[options.contestant](options)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if options.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        print(json.dumps({"times": times, "peak": peak}))
        return
    shapes = [widest(torch.cuda.mem_get_info()[1]) if s == "auto" else s for s in options.shapes]
    if options.precision is None:
        from openchatkit.loading.hardware import choose_dtype

        dtype = choose_dtype("auto", torch.device(options.device), purpose="training")
        options.precision = str(dtype).removeprefix("torch.")
    rate = matmul_rate(options.device, options.precision)
    print(f"{name_processor(options.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, ", end="")
    print(f"{options.precision}, ", end="")
    print(f"batch {options.batch} x {options.seq_length}; measured matrix rate {rate / 1e12:.2f} TFLOP/s\n")
    print("| shape | contestant | tokens/s | against Trainer | of the matrix rate | peak memory |")
    print("|-|-|-|-|-|-|")
    for shape in shapes:
        found = {name: [] for name in list_contestants(options)}
        for _ in range(options.rounds):
            for name in found:
                found[name].append(measure(name, shape, options))
        report(shape, found, rate, options)


def report(shape: str, found: dict, rate: float, options: argparse.Namespace) -> None:
    tokens = options.batch * options.seq_length
    speed = {}
    for name, results in found.items():
        times = [t for result in results for t in result.get("times", [])]
        speed[name] = tokens / statistics.median(times) if times else None
    base = speed["transformers.Trainer"]
    for name, results in found.items():
        if speed[name] is None:
            print(f"| {shape} | {name} | {results[0]['error']} | | | |", flush=True)
            continue
        against = f"{speed[name] / base:.2f}" if base else ""
        share = speed[name] * flops_per_token(shape, options.seq_length) / rate
        peak = max(result["peak"] for result in results)
        print(f"| {shape} | {name} | {speed[name]:.0f} | {against} | {share:.0%} | {peak / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
