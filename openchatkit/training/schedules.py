"""Pipeline schedules: which there are, how many stages they give a rank, and what each of them demands.

Knows them by the names of torch's classes; `pipeline.py` runs them.
"""

from dataclasses import dataclass

from openchatkit.errors import UserError


@dataclass(frozen=True)
class PipelineSchedule:
    """One of torch's schedules, in `torch.distributed.pipelining`.

    `stages_a_rank` is the number of stages of each rank where the schedule fixes it, else None. `v_shaped`: data goes
    to the last rank and back. `splits_backward`: gradients of weights are computed later than those of activations.
    """

    torch_class: str
    stages_a_rank: int | None = 1
    v_shaped: bool = False
    splits_backward: bool = False

    @property
    def takes_several(self) -> bool:
        """Whether torch's class takes a list of stages, even one of a single stage."""
        return self.stages_a_rank != 1


SCHEDULES = {
    "gpipe": PipelineSchedule("ScheduleGPipe"),
    "1f1b": PipelineSchedule("Schedule1F1B"),
    "interleaved": PipelineSchedule("ScheduleInterleaved1F1B", stages_a_rank=None),
    "zero-bubble": PipelineSchedule("ScheduleInterleavedZeroBubble", stages_a_rank=None, splits_backward=True),
    "zero-bubble-v": PipelineSchedule("ScheduleZBVZeroBubble", stages_a_rank=2, v_shaped=True, splits_backward=True),
}
_DEFAULT_STAGES = {"interleaved": 2}


def resolve_stages(name: str, given: int | None, pipeline_size: int) -> int:
    """Return the stages of each rank: `--stages-per-rank` where it is given, else the schedule's own number.

    UserError where the schedule has another number, or where there is no pipeline to take turns in.
    """
    schedule = SCHEDULES[name]
    if pipeline_size == 1:
        if given not in (None, 1):
            raise UserError(
                f"--stages-per-rank {given}: one rank has the whole model; give --pipeline-group-size 2 or more, or "
                "leave the flag out"
            )
        return 1
    fixed = schedule.stages_a_rank
    if fixed is None:
        return given or _DEFAULT_STAGES.get(name, 1)
    if given not in (None, fixed):
        several = ", ".join(other for other, each in SCHEDULES.items() if each.stages_a_rank is None)
        raise UserError(
            f"--stages-per-rank {given}: --pp-mode {name} has {fixed} on each rank; leave the flag out, or give "
            f"--pp-mode with one of {several}"
        )
    return fixed


def check_schedule(
    name: str, *, pipeline_size: int, micro_batches: int, batch: str, recompute: bool, compiled: bool = False
) -> None:
    """Raise UserError where a schedule cannot run, or would be the slowest; `batch` says in flags what is cut.

    A pipeline of one rank has no schedule: it takes micro-batches one after another.
    """
    if pipeline_size == 1:
        return
    schedule = SCHEDULES[name]
    if name == "1f1b" and micro_batches < pipeline_size:
        raise UserError(
            f"--pp-mode 1f1b needs at least as many micro-batches as ranks in a pipeline: {batch} = {micro_batches}, "
            f"--pipeline-group-size {pipeline_size}; use smaller micro-batches or --pp-mode gpipe"
        )
    if schedule.stages_a_rank is None:
        # Micro-batches go through a rank's stages in rounds of about as many as there are ranks, all of one size.
        rounds = max(1, micro_batches // pipeline_size)
        if micro_batches % rounds:
            fitting = micro_batches - micro_batches % pipeline_size
            raise UserError(
                f"--pp-mode {name} takes micro-batches in {rounds} rounds of one size: {batch} = {micro_batches} is no "
                f"multiple of {rounds}; make it {fitting} or {fitting + pipeline_size}, or use --pp-mode 1f1b"
            )
    if schedule.splits_backward and compiled:
        raise UserError(
            f"--pp-mode {name} computes the gradients of weights apart, and --compile makes one program of all: leave "
            "one of them out"
        )
    if schedule.splits_backward and recompute:
        raise UserError(
            f"--pp-mode {name} computes the gradients of weights apart, and would recompute a layer for each of them: "
            "give --activation-checkpointing none, or --pp-mode interleaved"
        )
