"""Settings of `tools/plan_training.py`: those of training, and the machines that the run is for."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from openchatkit.cli import non_negative_float, positive_float, positive_int
from openchatkit.errors import UserError
from openchatkit.settings import setting
from openchatkit.training import config
from openchatkit.training.config import Settings

GIB = 1 << 30


@dataclass(frozen=True)
class Cards:
    """So many cards, each with `memory` bytes."""

    number: int
    memory: float

    def __str__(self) -> str:
        return f"{self.number}x{self.memory / GIB:g}GB"


def parse_cards(text: str) -> Cards:
    """Read `8x24GB`; makers of cards mean GiB by it."""
    found = re.fullmatch(r"(\d+)x(\d+(?:\.\d+)?)(?:GB|GiB)", text.strip(), flags=re.IGNORECASE)
    if found is None or int(found[1]) == 0 or float(found[2]) == 0:
        raise argparse.ArgumentTypeError(f"expected a number of cards and the memory of each, as 8x24GB, got {text!r}")
    return Cards(int(found[1]), float(found[2]) * GIB)


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """The machines of a run that is planned."""

    title: ClassVar[str] = "machines"
    cards: Cards | None = setting(
        None, check=parse_cards, help="cards and the memory of each, as `8x24GB`: says whether the run fits"
    )
    spare: float = setting(
        2.0,
        check=non_negative_float,
        help="GiB of a card that are left for kernels, NCCL and gaps between blocks",
    )
    cards_a_host: int = setting(8, check=positive_int, help="cards of a host")
    host_memory: float | None = setting(
        None, check=positive_float, help="GiB of main memory of a host, which `--use-offload` needs"
    )
    flops: float | None = setting(
        None, check=positive_float, help="TFLOP/s that a card reaches in training, measured on one: says the time"
    )
    link_gbs: float | None = setting(None, check=positive_float, help="GB/s each way of a card between hosts")
    local_gbs: float | None = setting(None, check=positive_float, help="GB/s each way of a card within a host")
    suggest: bool = setting(False, help="list the five fastest layouts of `--cards` that fit, for the same rows a step")


@dataclass(frozen=True, kw_only=True)
class PlanSettings(MachineSettings, Settings):
    """All settings of a plan. UserError for what training would refuse as well."""

    model_name: Path = setting(required=True, help="folder with the model's config.json, or such a file itself")
    task_name: str = setting("", help="taken as in training, and of no effect here")
    total_steps: int | None = setting(
        None, check=positive_int, help="steps in all: with the time of one, when the run will be done"
    )

    def __post_init__(self) -> None:
        if self.total_steps is None and self.nepochs is None:
            object.__setattr__(self, "nepochs", 1)
        super().__post_init__()
        if self.flops is not None:
            missing = [
                name for name, value in (("--link-gbs", self.link_gbs), ("--local-gbs", self.local_gbs)) if not value
            ]
            if missing:
                raise UserError(f"--flops asks for an estimate of time, which needs {' and '.join(missing)} as well")
        if self.suggest and (self.cards is None or self.flops is None):
            names = [name for name, value in (("--cards", self.cards), ("--flops", self.flops)) if value is None]
            raise UserError(f"--suggest compares layouts by memory and time, and needs {' and '.join(names)} as well")

    @property
    def room(self) -> float | None:
        """Bytes of a card that tensors can have, where that is known."""
        return None if self.cards is None else self.cards.memory - self.spare * GIB

    @property
    def host_room(self) -> float | None:
        """Bytes of main memory for each card, where that is known."""
        return None if self.host_memory is None else self.host_memory * GIB / self.cards_a_host

    @property
    def global_batch(self) -> int:
        """Rows of a step, over all replicas."""
        return self.batch_size * self.gradient_accumulate_step * self.data_group_size


def parse(argv: Sequence[str] | None = None) -> PlanSettings:
    """Read the settings of the command line and of `--config`."""
    parser = config.build_parser(
        PlanSettings,
        prog="tools/plan_training.py",
        description="Compute what training takes on a layout: memory, messages and, from given rates, time.",
    )
    return config.complete(parser.read(argv), PlanSettings, environment={})
