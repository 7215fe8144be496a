"""Models of any folder -> GPT-NeoX's checkpoints: the command that lets GPT-NeoX go on with what the kit has trained.

One layer is in memory at a time. The result appears under its name only when it is whole.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit import cli
from openchatkit.convert.flags import add_half_flags
from openchatkit.errors import UserError

if TYPE_CHECKING:
    from openchatkit.loading.model_kinds import ModelFolder

AGES = ("today", "2021")


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Make a checkpoint that GPT-NeoX reads."""
    parser = cli.Parser(
        prog="tools/convert_to_neox.py", description="Make a checkpoint that GPT-NeoX reads of a model of any folder."
    )
    parser.add_argument(
        "model", type=Path, metavar="CHECKPOINT", help="a training checkpoint, layer shards, or a model of another kind"
    )
    parser.add_argument("--save-dir", type=Path, required=True, help="the folder to make")
    parser.add_argument("--tensor-ranks", type=cli.positive_int, default=1, help="ranks that share each layer")
    parser.add_argument("--no-pipeline", action="store_true", help="one file a rank, for pipe_parallel_size 0")
    parser.add_argument(
        "--names", choices=AGES, default="today", help="names of tensors: those since December 2024, or from before"
    )
    add_half_flags(parser)
    args = parser.parse_args(argv)
    from loguru import logger

    folder = convert(
        args.model,
        args.save_dir,
        ranks=args.tensor_ranks,
        pipeline=not args.no_pipeline,
        names=args.names,
        dtype=args.dtype,
        finite=not args.allow_non_finite,
    )
    logger.info(f"GPT-NeoX's checkpoint is in {folder}")


def convert(
    path: Path,
    save_dir: Path,
    *,
    ranks: int = 1,
    pipeline: bool = True,
    names: str = "today",
    dtype: str | None = None,
    finite: bool = True,
) -> Path:
    """Write the model that `path` means (see `model_kinds.find`) for so many tensor ranks; return the folder.

    UserError when there is no such model, it is damaged, GPT-NeoX has no such network or these ranks cannot share it,
    `save_dir` holds something, or with `finite` where numbers are not finite. Nothing is written then.
    """
    import torch
    from loguru import logger

    from openchatkit.convert.streams import convert_shard
    from openchatkit.formats.neox_writer import NeoXWriter, describe_losses
    from openchatkit.loading import model_kinds, stages
    from openchatkit.progress import bar
    from openchatkit.storage import check_room, whole_folder

    save_dir = Path(save_dir).expanduser().resolve()
    if save_dir.exists() and (not save_dir.is_dir() or any(save_dir.iterdir())):
        raise UserError(f"--save-dir {save_dir} is there already and not empty; choose another folder")
    found = model_kinds.find(Path(path).expanduser())
    reader = stages.open_shards(found)
    for loss in describe_losses(reader.config):
        logger.warning(loss)
    target = None if dtype is None else getattr(torch, dtype)
    size = stages.count_parameters(found) * (4 if target is None else target.itemsize)
    with tempfile.TemporaryDirectory() as tokenizer, whole_folder(save_dir) as folder:
        check_room(folder, size if pipeline else 2 * size, str(save_dir), "make room or use another disk")
        writer = NeoXWriter(
            folder, reader.config, step=_find_step(found), ranks=ranks, pipeline=pipeline, newer=names == "today"
        )
        with bar(len(reader.shards), save_dir.name, unit="shard") as progress:
            for shard in reader.shards:
                writer.write(shard, convert_shard(reader.read(shard), target, shard, finite=finite))
                progress.update()
        try:
            stages.write_tokenizer(found, Path(tokenizer))
        except UserError as error:
            logger.warning("{}; the settings name no tokenizer", error)
        writer.finish(Path(tokenizer), home=save_dir)
    return save_dir


def _find_step(found: "ModelFolder") -> int:
    """Return the step that a model was trained up to, 0 where it is no checkpoint."""
    from openchatkit.formats import checkpoint, neox_layout
    from openchatkit.loading import model_kinds

    if found.kind == model_kinds.CHECKPOINT:
        return int(checkpoint.read_state(found.path)["step"])
    return neox_layout.parse_step(found.path.name) or 0
