"""Cost of a snapshot of training state into pinned memory: the copy alone, and while a step runs."""

import time

import torch

from _gpu_check import fixtures, timing
from _gpu_check.rows import Context, Result


def run(context: Context) -> None:
    """Copy some gigabytes; on the CPU there is no other memory to copy to."""
    context.check("into pinned memory", lambda result: snapshot(result, context), needs_cuda=True)


def snapshot(result: Result, context: Context) -> None:
    """Time the allocation, the copy alone, a step alone, and a step while the copy runs on a stream of its own."""
    device = torch.device(context.device)
    size = context.pick(1 << 26, 10 * 10**9)
    layers, width, heads, rows = context.pick((2, 256, 4, 2), fixtures.SHAPES["1b"])
    length = context.pick(128, 2048)
    config = fixtures.neox(layers=layers, width=width, heads=heads, length=length)
    stage = fixtures.make_stage(config, device, recompute=True, quick=True)
    trainer = fixtures.make_trainer(stage, dtype=torch.bfloat16, rows=rows, length=length)
    data = fixtures.Tokens(length, config.vocab_size)
    state = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    started = time.perf_counter()
    kept = torch.empty(state.shape, dtype=state.dtype, pin_memory=True)
    result.values["s to allocate"] = time.perf_counter() - started
    result.values["GB"] = state.nbytes / 1e9

    stream = torch.cuda.Stream(device)

    def copy() -> None:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            kept.copy_(state, non_blocking=True)

    copied = timing.median_seconds(device, copy, repeat=3, warm=1)
    result.values["s to copy"], result.values["GB/s"] = copied, state.nbytes / copied / 1e9
    alone = timing.median_seconds(device, lambda: trainer.step(0, data), repeat=5, warm=2)
    kept[-1000:].copy_(~state[-1000:])  # left over from an earlier copy, it would prove nothing
    copy()
    beside = []
    while not stream.query():
        started = time.perf_counter()
        trainer.step(0, data)
        torch.cuda.current_stream(device).synchronize()
        beside.append(time.perf_counter() - started)
    torch.cuda.synchronize()
    result.values["ms a step"] = 1e3 * alone
    result.values["steps during the copy"] = len(beside)
    result.require(bool(beside), "the copy was over before a step began")
    result.values["ms a step during it"] = 1e3 * sum(beside) / len(beside)
    result.values["ms lost to the copy"] = 1e3 * (sum(beside) - alone * len(beside))
    result.require(torch.equal(kept[-1000:], state[-1000:].cpu()), "the snapshot's end is not what was copied")
