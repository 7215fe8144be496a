"""`neox/train.py`, also `pretrain_gpt2.py`: one rank of a run that a GPT-NeoX configuration describes.

`deepy.py` starts it for each rank, and torchrun may. Everything but the translation is the kit's trainer.
"""

import os
from collections.abc import Sequence

from openchatkit import cli, storage
from openchatkit.errors import UserError
from openchatkit.neox import arguments, hosts, model, translation
from openchatkit.neox.arguments import CommandLine, ConfigurationParser
from openchatkit.neox.config import NeoxConfig
from openchatkit.neox.translation import TrainerRun
from openchatkit.training import command

_CONFIGS = "configs"  # the folder beside the checkpoints that keeps the files as they were written


@cli.command
def main(argv: Sequence[str] | None = None) -> int:
    """Train as GPT-NeoX's configuration files say. Returns the exit status."""
    parser = ConfigurationParser(
        prog="neox/train.py",
        usage="%(prog)s [-d DIR] CONF... [--KEY VALUE ...]",
        description="One rank of a run that GPT-NeoX's configuration files describe; deepy.py or torchrun starts each.",
    )
    parser.add_files()
    parser.add_argument(
        "--world-size", type=cli.positive_int, help="ranks in all, as the launcher gives it (default: torchrun's, or 1)"
    )
    parser.add_argument("--rank", type=cli.natural, help="number of this rank")
    parser.add_argument("--cuda-id", type=cli.natural, help="its GPU")
    parser.add_argument("--dist-url", help="where the ranks meet")
    line = arguments.parse(parser, argv)
    config = line.read_config()
    run = translation.translate(config, ranks=_count_ranks(line), on_gpu=hosts.count_gpus() > 0)
    if run.model is not None:
        model.write_model(run.model, config, resumes=translation.has_checkpoints(run.save))
    if _is_first(line):
        _announce(config, run)
    given = {name: getattr(line.known, name) for name in ("world_size", "rank", "cuda_id", "dist_url")}
    tasks = None
    if config.get("eval_tasks"):
        from openchatkit.neox import evaluation

        tasks = evaluation.prepare_tasks(config, run, is_first=_is_first(line))
    return command.run([*run.arguments, *translation.to_arguments(given)], evaluate_tasks=tasks)


def _count_ranks(line: CommandLine) -> int:
    if line.known.world_size is not None:
        return int(line.known.world_size)
    text = os.environ.get("WORLD_SIZE", "1") if "RANK" in os.environ else "1"
    if not text.isdecimal():
        raise UserError(f"WORLD_SIZE is {text!r}: expected the number of ranks, as torchrun sets it")
    return int(text)


def _is_first(line: CommandLine) -> bool:
    return str(line.known.rank if line.known.rank is not None else os.environ.get("RANK", 0)) == "0"


def _announce(config: NeoxConfig, run: TrainerRun) -> None:
    """Say once what is done otherwise than the files say, and keep them beside the checkpoints."""
    from loguru import logger

    for note in run.notes:
        logger.warning(note)
    folder = run.save / _CONFIGS
    with storage.storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for path in config.files:
            storage.write_text(folder / path.name, path.read_text(encoding="utf-8-sig"))
