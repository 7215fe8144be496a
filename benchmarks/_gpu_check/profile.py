"""One training step with recomputing, taken apart: weight casts, waits for the GPU, and where its time goes."""

import re
from collections import Counter
from typing import Any

import torch

from _gpu_check import fixtures
from _gpu_check.rows import Context, Result

# By the name of a kernel, or on the CPU of an operator; the first that fits.
KINDS = {
    "attention": re.compile(r"flash|fmha|attention|sdpa", re.IGNORECASE),
    "products": re.compile(r"gemm|nvjet|cublas|xmma|aten::(add)?mm$|aten::(b|badd)bmm$|mkldnn|cutlass", re.IGNORECASE),
    "optimizer": re.compile(r"adam|multi_tensor", re.IGNORECASE),
    "copies": re.compile(r"memcpy|memset|copy|aten::(_to_copy|to|cat|zero_|fill_)$|CatArray", re.IGNORECASE),
    "elementwise": re.compile(
        r"elementwise|reduce|norm|softmax|index|gather|scatter|embedding|aten::(add|mul|sub|div|gelu|sum|exp|log)",
        re.IGNORECASE,
    ),
}
WAITS = (
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
    "cudaMemcpyAsync",
    "cudaLaunchKernel",
)
HIDDEN_WAITS = ("aten::nonzero", "aten::_local_scalar_dense")


def run(context: Context) -> None:
    """Record one step and report three views of it."""
    recorded: dict[str, Any] = {}

    def record(result: Result) -> None:
        device = torch.device(context.device)
        layers, width, heads, length, rows, vocabulary = context.pick(
            (3, 64, 4, 64, 4, 512), (8, 2048, 16, 2048, 8, fixtures.VOCABULARY)
        )
        config = fixtures.neox(layers=layers, width=width, heads=heads, length=length, vocabulary=vocabulary)
        stage = fixtures.make_stage(config, device, recompute=True, quick=True)
        trainer = fixtures.make_trainer(stage, dtype=torch.bfloat16, rows=rows, length=length, micro_batches=2)
        data = fixtures.Tokens(length, config.vocab_size)
        for number in range(2):
            trainer.step(number, data)
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if context.cuda else []
        with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
            trainer.step(2, data)
            if context.cuda:
                torch.cuda.synchronize()
        recorded["events"] = profile.events()
        recorded["matrices"] = [
            tuple(p.shape) for s in fixtures.layers_of(stage) for p in s.parameters() if p.dim() == 2
        ]
        casts = Counter(
            tuple(event.input_shapes[0])
            for event in recorded["events"]
            if event.name == "aten::_to_copy" and event.input_shapes and not of_a_gradient(event)
        )
        matrices = recorded["matrices"]
        result.values["micro-batches"] = trainer.pipeline.micro_batches
        result.values["matrices of layers"] = len(matrices)
        result.values["their casts"] = sum(casts[shape] for shape in set(matrices))
        result.values["casts a matrix"] = result.values["their casts"] / len(matrices)
        copies = all(
            p.dtype == torch.bfloat16 for s in fixtures.layers_of(stage) for p in s.parameters() if p.dim() == 2
        )
        # torch without `grad_dtype` has float32 weights, which autocast casts once a step.
        allowed = 0 if copies else len(matrices)
        result.require(result.values["their casts"] <= allowed, "a matrix was cast more often than once a step")

    def waits(result: Result) -> None:
        names = Counter(event.name for event in recorded["events"])
        for name in (*WAITS, *HIDDEN_WAITS):
            result.values[name] = names[name]

    def shares(result: Result) -> None:
        times = kernel_times(recorded["events"]) if context.cuda else operator_times(recorded["events"])
        total = sum(times.values())
        result.require(total > 0, "the profiler recorded no time")
        by_kind = Counter()
        others = Counter()
        for name, time in times.items():
            kind = next((kind for kind, pattern in KINDS.items() if pattern.search(name)), "other")
            by_kind[kind] += time
            if kind == "other":
                others[name] += time
        result.values["ms"] = total / 1e3
        for kind in (*KINDS, "other"):
            result.values[f"% {kind}"] = 100 * by_kind[kind] / total
        result.values["largest other"] = others.most_common(1)[0][0][:60] if others else ""

    context.check("weight casts of a step", record)
    if "events" in recorded:
        context.check("calls that may wait for the GPU", waits, needs_cuda=True)
        context.check("where the time goes", shares)


def of_a_gradient(event: Any) -> bool:
    """Whether an operator runs at the end of a backward function, as the widening of a weight's gradient does."""
    while event is not None:
        if "Backward" in event.name:
            return True
        event = event.cpu_parent
    return False


def kernel_times(events: list) -> Counter:
    """Microseconds by name of GPU kernel or copy."""
    times: Counter = Counter()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            times[event.name] += event.time_range.elapsed_us()
    return times


def operator_times(events: list) -> Counter:
    """Microseconds by operator on the CPU, without those that it calls."""
    times: Counter = Counter()
    for event in events:
        times[event.name] += event.self_cpu_time_total
    return times
