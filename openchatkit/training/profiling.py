"""`--profiling`: a Chrome trace a rank of a few early steps, with the pipeline's forwards and backwards by name."""

import contextlib
from pathlib import Path

import torch

from openchatkit.training.config import Settings

TRACES = Path("trace_json")


def profiler(settings: Settings) -> contextlib.AbstractContextManager[torch.profiler.profile | None]:
    """A profiler whose `step` is to be called after each step, or a context of None with `no-profiling`.

    It lets two steps pass and records three. `tidy_profiling` records what runs; `pytorch_profiling` also shapes and
    memory.
    """
    if settings.profiling == "no-profiling":
        return contextlib.nullcontext()
    TRACES.mkdir(exist_ok=True)
    name = f"{settings.job_id}_rank{settings.rank}_{settings.trace_postfix}.json"
    full = settings.profiling == "pytorch_profiling"
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profile: profile.export_chrome_trace(str(TRACES / name)),
        record_shapes=full,
        profile_memory=full,
    )
