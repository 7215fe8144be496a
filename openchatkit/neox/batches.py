"""Batch sizes, by GPT-NeoX's rules: rows of a step = rows of a micro-batch x accumulation x replicas."""

from dataclasses import dataclass

from openchatkit.errors import UserError
from openchatkit.neox.config import NeoxConfig


@dataclass(frozen=True)
class BatchSizes:
    """`total` rows are a step: `accumulation` micro-batches of `micro` rows on each of `replicas`."""

    total: int
    micro: int
    accumulation: int
    replicas: int


def count_replicas(config: NeoxConfig, ranks: int) -> int:
    """Return the replicas of some ranks; UserError, with numbers that fit, where there is no whole number of them."""
    stages, parts = max(config.get("pipe_parallel_size"), 1), max(config.get("model_parallel_size"), 1)
    replicas, left = divmod(ranks, stages * parts)
    if left or not replicas:
        raise UserError(
            f"{ranks} ranks are no multiple of pipe_parallel_size {stages} x model_parallel_size {parts} = "
            f"{stages * parts}: use {_name_multiples(ranks, stages * parts)} ranks, or change one of the two"
        )
    return replicas


def derive(config: NeoxConfig, replicas: int) -> BatchSizes:
    """Return the batch sizes, each given or derived; UserError, with numbers that fit, where they contradict.

    `gradient_accumulation_steps` is 1 where it is not given, and derived where it is null.
    """
    total = config.get("train_batch_size")
    micro = config.get("train_micro_batch_size_per_gpu")
    accumulation = config.get("gradient_accumulation_steps")
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = config.get(name)
        if value is not None and value < 1:
            raise UserError(f"{config.where(name)}: expected at least 1")
    if total is None and micro is None:
        raise UserError("give train_micro_batch_size_per_gpu, train_batch_size or both: how many rows a step has")
    if micro is None:
        accumulation = accumulation or 1
        micro, unit = total // replicas // accumulation, accumulation * replicas
    elif total is None:
        accumulation = accumulation or 1
        total = unit = micro * accumulation * replicas
    elif accumulation is None:
        accumulation, unit = total // micro // replicas, micro * replicas
    else:
        unit = 0  # nothing is left to derive
    if total != micro * accumulation * replicas or not micro or not accumulation:
        raise UserError(_contradiction(total, micro, accumulation, replicas, unit=unit))
    return BatchSizes(total, micro, accumulation, replicas)


def _contradiction(total: int, micro: int, accumulation: int, replicas: int, *, unit: int) -> str:
    """Return the message with numbers that fit: multiples of `unit`, or where it is 0 the product of what is given."""
    product = micro * accumulation * replicas
    said = (
        f"train_batch_size {total} is not train_micro_batch_size_per_gpu {micro} x gradient_accumulation_steps "
        f"{accumulation} x {replicas} replicas = {product}"
    )
    if not unit and total % (micro * replicas) == 0:
        return f"{said}: make gradient_accumulation_steps {total // micro // replicas}"
    if not unit:
        return f"{said}: make train_batch_size {product}"
    return f"{said}: make train_batch_size {_name_multiples(total, unit)}"


def _name_multiples(count: int, unit: int) -> str:
    """Return the multiples of `unit` on both sides of `count`, as text; 0 is none."""
    below = count // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
