"""GPT-NeoX's checkpoints -> layer shards: the command that makes them models to train on, or to convert further.

One layer is in memory at a time, merged from all tensor ranks. A conversion that was killed resumes, as that of a
Hugging Face model does.
"""

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit import cli
from openchatkit.convert.flags import add_dtype_flags
from openchatkit.errors import UserError

if TYPE_CHECKING:
    from openchatkit.formats.neox_checkpoint import NeoXCheckpoint
    from openchatkit.formats.shard_writer import ShardWriter


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Make layer shards of a checkpoint of GPT-NeoX."""
    parser = cli.Parser(
        prog="tools/convert_from_neox.py", description="Make layer shards of a checkpoint of GPT-NeoX, for training."
    )
    parser.add_argument("checkpoint", type=Path, metavar="DIR", help="global_stepN, or the folder that holds it")
    parser.add_argument("--save-dir", type=Path, required=True, help="the folder to make")
    add_dtype_flags(parser)
    args = parser.parse_args(argv)
    from loguru import logger

    convert(args.checkpoint, args.save_dir, dtype=args.dtype, finite=not args.allow_non_finite)
    logger.info(f"the shards are in {args.save_dir}")


def convert(path: Path, folder: Path, *, dtype: str | None = None, finite: bool = True) -> Path:
    """Write a prepared model of the checkpoint that `path` means; return its folder.

    Shards that an earlier run wrote of the same files are kept where their bytes are unchanged. UserError when there is
    no such checkpoint, files are missing or do not belong together, `folder` holds something else, and with `finite`
    where numbers are not finite.
    """
    from loguru import logger

    from openchatkit.formats import neox_layout, tokenizer_files
    from openchatkit.formats.config_file import write_raw
    from openchatkit.formats.neox_checkpoint import NeoXCheckpoint
    from openchatkit.formats.shard_writer import ShardWriter, may_write
    from openchatkit.storage import own_folder, stamp

    step = neox_layout.find(path)
    if step is None:
        raise UserError(
            f"{path} holds no checkpoint of GPT-NeoX: expected files such as {neox_layout.EXAMPLE}, in it or in "
            "the folder that its file `latest` names"
        )
    checkpoint = NeoXCheckpoint(step)
    checkpoint.verify()
    if not may_write(folder):
        raise UserError(f"--save-dir {folder} holds something else than layer shards; choose another folder")
    with tempfile.TemporaryDirectory() as described:
        source = Path(described)
        write_raw(source, checkpoint.raw_config)
        if checkpoint.write_tokenizer(source):
            tokenizer_files.check_tokenizer(source, checkpoint.config.vocab_size)
        else:
            logger.warning(
                "{} names no tokenizer that is here: put its tokenizer.json into {}, or give training --tokenizer-name",
                checkpoint.settings.source,
                folder,
            )
        with own_folder(folder):
            files = {file.name: stamp(file) for file in checkpoint.list_files()}
            about = {"source": {"config": checkpoint.raw_config, "files": files}, "dtype": dtype or "as stored"}
            writer = ShardWriter(folder, checkpoint.config, source=source, about=about)
            _copy_shards(checkpoint, writer, dtype, finite=finite)
            if not writer.complete:
                writer.finish()
    return folder


def _copy_shards(checkpoint: "NeoXCheckpoint", writer: "ShardWriter", dtype: str | None, *, finite: bool) -> None:
    import torch

    from openchatkit.convert.streams import convert_shard
    from openchatkit.progress import bar
    from openchatkit.storage import check_room

    target = getattr(torch, dtype) if dtype else None
    missing = [shard for shard in checkpoint.shards if shard not in writer.done]
    sizes = (math.prod(spec.shape) * (target or spec.dtype).itemsize for spec in checkpoint.list_specs())
    check_room(writer.folder, sum(sizes) if missing else 0, str(writer.folder), "make room or use another disk")
    with bar(len(missing), writer.folder.name, unit="shard") as progress:
        for shard in missing:
            writer.write_tensors(shard, convert_shard(checkpoint.read(shard), target, shard, finite=finite))
            progress.update()
