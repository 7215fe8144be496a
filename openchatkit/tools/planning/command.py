"""The command `tools/plan_training.py`: whether a run fits, what it sends, how long a step takes, and better layouts.

Owns what is printed; all counts are those of `training.plan`. Nothing is measured and nothing started.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.tools.planning.settings import PlanSettings, parse

if TYPE_CHECKING:
    from openchatkit.models.config import ModelConfig
    from openchatkit.training.plan.planned_run import PlannedRun
    from openchatkit.training.plan.search import Candidate
    from openchatkit.training.plan.times import Machines

_GB, _TERA = 1e9, 1e12
_SUGGESTIONS = 5


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Print what the flags' layout takes, or the best layouts."""
    from openchatkit.tools.planning import tables
    from openchatkit.training.plan.planner import plan_run

    settings = parse(argv)
    config = _read_model(settings)
    machines = _read_machines(settings)
    if settings.suggest:
        assert machines is not None, "PlanSettings asks for them"
        candidates = _suggest(settings, config, machines)
        tables.print_suggestions([each.run for each in candidates], machines)
        tables.print_assumptions(machines)
        return
    run = plan_run(settings, config)
    if settings.cards is not None and run.world_size > settings.cards.number:
        raise UserError(
            f"--cards {settings.cards}: the layout has {run.world_size} ranks, and each needs a card; give a smaller "
            "--pipeline-group-size, --data-group-size or --tensor-group-size"
        )
    tables.print_run(run)
    tables.print_memory(run, settings)
    tables.print_messages(run)
    if machines is not None:
        tables.print_time(run, settings, machines)
        tables.print_assumptions(machines)
    for line in _advise(settings, run, machines):
        print(f"\n{line}")


def _read_model(settings: PlanSettings) -> "ModelConfig":
    from openchatkit.formats import layer_shards
    from openchatkit.formats.tokenizer_files import read_json
    from openchatkit.models.registry import config_from_hf

    if settings.model_name.is_file():
        return config_from_hf(read_json(settings.model_name))
    return layer_shards.read_config(settings.model_name)[1]


def _read_machines(settings: PlanSettings) -> "Machines | None":
    from openchatkit.training.plan.times import Machines

    if settings.flops is None or settings.link_gbs is None or settings.local_gbs is None:
        return None
    return Machines(settings.flops * _TERA, settings.link_gbs * _GB, settings.local_gbs * _GB, settings.cards_a_host)


def _suggest(settings: PlanSettings, config: "ModelConfig", machines: "Machines") -> "list[Candidate]":
    from openchatkit.training.plan import search

    assert settings.cards is not None, "PlanSettings asks for them"
    assert settings.room is not None, settings.cards
    candidates = search.list_candidates(
        # The layout that the flags give is one of those that are compared.
        replace(settings, **search.ONE_RANK),
        config,
        cards=settings.cards.number,
        global_batch=settings.global_batch,
        tensor_sizes=search.list_divisors(settings.cards_a_host),
    )
    host_room = math.inf if settings.host_room is None else settings.host_room
    found = search.find_fastest(candidates, machines, settings.room, number=_SUGGESTIONS, host_room=host_room)
    if not found:
        raise UserError(
            f"no layout of --cards {settings.cards} with {settings.global_batch} rows a step fits: give more cards, "
            "--dp-mode sharded, --use-offload, or rows that more numbers divide (--batch-size x "
            "--gradient-accumulate-step x --data-group-size)"
        )
    return found


def _advise(settings: PlanSettings, run: "PlannedRun", machines: "Machines | None") -> list[str]:
    """Return what training would warn of, and a layout that fits or is faster, where there is one."""
    from openchatkit.training.plan import search
    from openchatkit.training.plan.advice import list_warnings, name_fitting
    from openchatkit.training.plan.times import estimate

    lines = list_warnings(settings, run, room=settings.room)
    if settings.cards is not None and run.world_size < settings.cards.number:
        lines.append(f"{settings.cards.number - run.world_size} of --cards {settings.cards} have nothing to do")
    if settings.room is None:
        return lines
    host_room = math.inf if settings.host_room is None else settings.host_room
    if not search.fits(run, settings.room, host_room):
        lines.append(name_fitting(settings, run, settings.room, host_room=host_room))
    elif machines is not None:
        best = _suggest(settings, run.config, machines)[0]
        seconds = estimate(best.run, machines).total
        if seconds < 0.98 * estimate(run, machines).total:
            flags = " ".join(best.list_changes(settings))
            lines.append(f"a step of the same rows would take {seconds:.3g} s with {flags}")
    return lines
