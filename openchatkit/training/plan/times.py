"""The time of a step of a planned run, from rates of the machines that it is for."""

import math
from dataclasses import dataclass

from openchatkit.training.plan import work
from openchatkit.training.plan.planned_run import PlannedRun
from openchatkit.training.plan.traffic import rank_traffic


@dataclass(frozen=True)
class Machines:
    """Measured or published rates: operations a second of a card, bytes a second each way of a card's links."""

    operations: float
    link: float
    local: float
    cards_a_host: int

    def link_of(self, ranks: int) -> float:
        """Return the rate of the slowest link among that many ranks in a row, which start at a multiple of it."""
        within = ranks <= self.cards_a_host and self.cards_a_host % ranks == 0
        return self.local if within else self.link


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they are spent on. Nothing overlaps."""

    products: float
    tensor: float
    pipeline: float
    waiting: float
    replicas: float

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return math.fsum(vars(self).values())


def estimate(run: PlannedRun, machines: Machines) -> StepTime:
    """Return the time of a step of the busiest rank, which the others wait for."""
    parts, of_replica = run.tensor_size, run.tensor_size * run.pipeline_size
    busiest = (0.0, 0.0, 0.0)
    reducing = 0.0
    for rank in range(run.pipeline_size):
        traffic = rank_traffic(run, rank)
        products = work.rank_operations(run, rank) / machines.operations
        # An all-reduce passes each byte on twice, a gather, a scatter, a reduction to one or a broadcast once.
        passed_on = (2 * traffic["tensor"].bytes + traffic["gathered"].bytes) * (parts - 1) / parts
        tensor = passed_on / machines.link_of(parts)
        pipeline = traffic["pipeline"].bytes / machines.link_of(of_replica)
        busiest = max(busiest, (products, tensor, pipeline), key=sum)
        times = 2 * (run.replicas - 1) / run.replicas if run.dp_mode == "allreduce" else 1
        reducing = max(reducing, times * traffic["data"].bytes / machines.link_of(run.world_size))
    share = work.bubble(run)
    return StepTime(*busiest, waiting=sum(busiest) * share / (1 - share), replicas=reducing)
