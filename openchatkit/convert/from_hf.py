"""Hugging Face -> layer shards: the commands that prepare a public model for training.

A model is copied in pieces of a few megabytes, so memory does not grow with it. A preparation that was
killed resumes: every shard gets its name only when it is whole, and a journal lists the shards that have one.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openchatkit import cli
from openchatkit.convert.flags import add_dtype_flags
from openchatkit.errors import UserError

if TYPE_CHECKING:
    from openchatkit.formats.hf_model import HFModel
    from openchatkit.formats.shard_writer import ShardWriter

ShardPlan = dict[str, dict[str, str]]


def prepare_command(script: str, model_name: str) -> Callable[..., None]:
    """Return the command of a `prepare.py`, whose `__file__` is `script`; shards go to its folder by default."""
    return _build_command(Path(script).name, model_name, save_dir=Path(script).resolve().parent, family=None)


def convert_command(script: str, model_name: str, *, family: str) -> Callable[..., None]:
    """Return the command of a `tools/convert_from_hf_*.py`, which takes models of one family."""
    return _build_command(Path(script).name, model_name, save_dir=Path("pretrained_models"), family=family)


def _build_command(prog: str, model_name: str, *, save_dir: Path, family: str | None) -> Callable[..., None]:
    @cli.command
    def main(argv: Sequence[str] | None = None) -> None:
        parser = cli.Parser(prog=prog, description="Make layer shards of a Hugging Face model, for training.")
        parser.add_argument("--model-name", default=model_name, help="name on the Hugging Face hub, or a folder")
        parser.add_argument("--save-dir", type=Path, default=save_dir, help="where <org>_<model>/ is made")
        parser.add_argument("--offload-dir", help="taken for old command lines' sake: the model is never in memory")
        add_dtype_flags(parser)
        args = parser.parse_args(argv)
        from loguru import logger

        if args.offload_dir:
            logger.info("--offload-dir is not needed: the model is copied in pieces and never held in memory")
        folder = prepare(
            args.model_name, args.save_dir, dtype=args.dtype, family=family, finite=not args.allow_non_finite
        )
        logger.info(f"the shards are in {folder}")

    return main


def prepare(
    model_name: str, save_dir: Path, *, dtype: str | None = None, family: str | None = None, finite: bool = True
) -> Path:
    """Write `<save_dir>/<org>_<model>/` from a hub name or a folder, also of GPT-NeoX's files; returns that folder.

    Shards that an earlier run wrote of the same model and dtype are reused if their bytes are unchanged. UserError when
    the kit does not know the model's family, or another than `family` is found, and when the model is incomplete, asks
    for remote code, or with `finite` holds numbers that are not finite.
    """
    from openchatkit.convert import from_neox
    from openchatkit.formats import hf_model, neox_layout
    from openchatkit.formats.layer_shards import folder_name
    from openchatkit.formats.shard_writer import ShardWriter
    from openchatkit.formats.tokenizer_files import check_tokenizer
    from openchatkit.storage import own_folder

    if neox_layout.find(Path(model_name).expanduser()) and family != "gptj":
        folder = Path(save_dir) / folder_name(model_name)
        return from_neox.convert(Path(model_name).expanduser(), folder, dtype=dtype, finite=finite)
    model = hf_model.HFModel(hf_model.fetch(model_name))
    if family not in (None, model.config.family):
        tool = f"tools/convert_from_hf_{model.config.family.replace('_', '')}.py"
        raise UserError(f"{model_name} is a {model.config.family} model, {family} was expected; use {tool}")
    check_tokenizer(model.path, model.config.vocab_size)
    plan = plan_shards(model)
    folder = Path(save_dir) / folder_name(model_name)
    with own_folder(folder):
        about = {"source": _fingerprint(model), "dtype": dtype or "as stored"}
        writer = ShardWriter(folder, model.config, source=model.path, about=about)
        _copy_tensors(
            model,
            {shard: keys for shard, keys in plan.items() if shard not in writer.done},
            writer,
            dtype,
            finite=finite,
        )
        if not writer.complete:
            writer.finish()
    return folder


def plan_shards(model: "HFModel") -> ShardPlan:
    """Plan the shards: {shard: {name in the shard: Hugging Face key}}, in the order of the files."""
    from openchatkit.convert.streams import digest
    from openchatkit.formats.layer_shards import check_shard
    from openchatkit.loading.stages import shard_keys
    from openchatkit.models.registry import family
    from openchatkit.models.shards import EMBED, HEAD

    kind = family(model.config)
    plan = shard_keys(model)
    for key in itertools.chain.from_iterable(keys.values() for keys in plan.values()):
        dtype = model.specs[key].dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise UserError(f"{model.path}: {key} is stored as {dtype}; a model that is not quantised is expected")
    if model.config.tie_embeddings and kind.tied_weight in plan[HEAD]:
        tied, embedding = plan[HEAD].pop(kind.tied_weight), plan[EMBED].get(kind.embedding_weight)
        if embedding and digest(model.chunks(tied)) != digest(model.chunks(embedding)):
            raise UserError(
                f"{model.path}: config.json ties the embeddings, but {tied} differs from {embedding}; "
                "set tie_word_embeddings to false there to keep both"
            )
    for shard, keys in plan.items():
        check_shard(model.path, model.config, shard, {name: model.specs[key] for name, key in keys.items()})
    return plan


def _copy_tensors(model: "HFModel", plan: ShardPlan, writer: "ShardWriter", dtype: str | None, *, finite: bool) -> None:
    """Write the shards of `plan`, one after another."""
    import torch

    from openchatkit.convert.streams import run_parallel, stream
    from openchatkit.formats.tensor_file import TensorSpec
    from openchatkit.progress import bar
    from openchatkit.storage import check_room

    dtypes = {key: getattr(torch, dtype) if dtype else spec.dtype for key, spec in model.specs.items()}
    specs = {
        shard: {name: TensorSpec(dtypes[key], model.specs[key].shape) for name, key in keys.items()}
        for shard, keys in plan.items()
    }
    total = sum(spec.nbytes for shard in specs.values() for spec in shard.values())
    check_room(writer.folder, total, str(writer.folder), "make room or use another disk")
    with bar(total, writer.folder.name, unit="B", unit_scale=True) as progress:

        def chunks(key: str) -> Iterable[memoryview]:
            before = model.specs[key].dtype
            return stream(model.chunks(key), before, dtypes[key], what=key, progress=progress, finite=finite)

        def write(shard: str) -> None:
            writer.write(shard, specs[shard], lambda name: chunks(plan[shard][name]))

        run_parallel(write, plan, workers=1 if model.one_by_one else None)


def _fingerprint(model: "HFModel") -> dict[str, Any]:
    """Return what identifies a model's weights without reading them: its config, and the stamps of its files."""
    from openchatkit.formats.layer_shards import CONFIG
    from openchatkit.storage import sha256, stamp

    return {"config": sha256(model.path / CONFIG), "files": {name: stamp(model.path / name) for name in model.files}}
