"""Training checkpoints -> Hugging Face models: the commands that make a fine-tuned model usable anywhere.

Tensors are renamed and copied in pieces of a few megabytes; no model is built. The result appears under its name only
when it is whole, and every file of a checkpoint is compared with its manifest before a byte of it is used.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit import cli
from openchatkit.convert.flags import add_half_flags
from openchatkit.errors import UserError

if TYPE_CHECKING:
    from openchatkit.convert.sources import TensorSource
    from openchatkit.formats.tensor_file import TensorSpec


@dataclass(frozen=True)
class _LegacyDefaults:
    """Defaults of the flags that describe a checkpoint of the original kit."""

    config_name: str
    stages: int
    layers_per_stage: int


def convert_command(
    script: str, *, family: str | None, config_name: str, stages: int, layers_per_stage: int
) -> Callable[..., None]:
    """Return the command of a `tools/convert_to_hf_*.py`; the last three are for checkpoints of the original kit."""
    original = _LegacyDefaults(config_name, stages, layers_per_stage)
    ours = "not needed for this kit's checkpoints; for the original's"

    @cli.command
    def main(argv: Sequence[str] | None = None) -> None:
        parser = cli.Parser(prog=Path(script).name, description="Make a Hugging Face model of a training checkpoint.")
        parser.add_argument("--config-name", help=f"hub name or folder of the base model: {ours} {config_name}")
        parser.add_argument("--ckpt-path", type=Path, required=True, help="a checkpoint, or a folder that holds some")
        parser.add_argument("--save-path", type=Path, required=True, help="the folder to make")
        parser.add_argument("--n-stages", type=cli.positive_int, help=f"stages it was trained on: {ours} {stages}")
        parser.add_argument(
            "--n-layer-per-stage", type=cli.positive_int, help=f"layers a stage: {ours} {layers_per_stage}"
        )
        add_half_flags(parser)
        args = parser.parse_args(argv)
        from loguru import logger

        folder = convert(
            args.ckpt_path,
            args.save_path,
            original=original,
            config_name=args.config_name,
            stages=args.n_stages,
            layers_per_stage=args.n_layer_per_stage,
            dtype=args.dtype,
            family=family,
            finite=not args.allow_non_finite,
        )
        logger.info(f"the model is in {folder}")

    return main


def convert(
    ckpt_path: Path,
    save_path: Path,
    *,
    original: _LegacyDefaults | None = None,
    config_name: str | None = None,
    stages: int | None = None,
    layers_per_stage: int | None = None,
    dtype: str | None = None,
    family: str | None = None,
    finite: bool = True,
) -> Path:
    """Make a Hugging Face model of a checkpoint, in `dtype` or as stored; returns its folder.

    UserError when the checkpoint is damaged or incomplete, contradicts the other arguments, or with `finite` holds
    numbers that are not finite, and when `save_path` holds anything but a converted model. Nothing is written then.
    """
    import torch

    from openchatkit.formats import hf_writer
    from openchatkit.formats.tensor_file import TensorSpec
    from openchatkit.models import neox
    from openchatkit.storage import check_room, whole_folder

    save_path = Path(save_path).expanduser().resolve()
    if save_path.exists() and not hf_writer.may_replace(save_path):
        raise UserError(f"--save-path {save_path} holds something else than a converted model; choose another folder")
    source = _open_source(Path(ckpt_path), original, config_name, stages, layers_per_stage)
    if source.config.family == neox.FAMILY.name:
        raise UserError(
            f"{ckpt_path} has {', '.join(neox.list_choices(source.config))}, which GPT-NeoX in transformers does not "
            "compute: chat with the checkpoint as it is, inference/bot.py --model"
        )
    if family not in (None, source.config.family):
        tool = f"tools/convert_to_hf_{source.config.family.replace('_', '')}.py"
        raise UserError(f"{ckpt_path} is a {source.config.family} model, {family} was expected; use {tool}")
    dtypes = {key: getattr(torch, dtype) if dtype else spec.dtype for key, spec in source.specs.items()}
    specs = {key: TensorSpec(dtypes[key], spec.shape) for key, spec in source.specs.items()}
    sizes: Counter[torch.dtype] = Counter()
    for spec in specs.values():
        sizes[spec.dtype] += spec.nbytes
    main_dtype = sizes.most_common(1)[0][0]
    with whole_folder(save_path) as folder:
        check_room(folder, sizes.total(), str(save_path), "make room or use another disk")
        _write_weights(folder, source, specs, finite=finite)
        hf_writer.write_config(folder, source.raw_config, source.config, dtype=main_dtype, tokenizer=source.tokenizer)
        hf_writer.write_tokenizer(folder, source.tokenizer)
    return save_path


def _open_source(
    path: Path,
    original: _LegacyDefaults | None,
    config_name: str | None,
    stages: int | None,
    layers_per_stage: int | None,
) -> "TensorSource":
    from openchatkit.convert.sources import CheckpointSource, LegacySource, StageFlags
    from openchatkit.formats import checkpoint, neox_layout

    if neox_layout.find(path):
        raise UserError(
            f"{path} is a checkpoint of GPT-NeoX: run `python tools/convert_from_neox.py {path} --save-dir MODEL` and "
            "pass MODEL"
        )
    path = checkpoint.locate(path)
    if not checkpoint.is_legacy(path):
        return CheckpointSource(path, config_name=config_name, flags=StageFlags(stages, layers_per_stage))
    defaults = original or _LegacyDefaults(config_name or "", stages or 0, layers_per_stage or 0)
    return LegacySource(
        path,
        config_name=config_name or defaults.config_name,
        stages=stages or defaults.stages,
        layers_per_stage=layers_per_stage or defaults.layers_per_stage,
    )


def _write_weights(folder: Path, source: "TensorSource", specs: "Mapping[str, TensorSpec]", *, finite: bool) -> None:
    from openchatkit.convert.streams import stream
    from openchatkit.formats import hf_writer
    from openchatkit.progress import bar

    with bar(sum(spec.nbytes for spec in specs.values()), "converting", unit="B", unit_scale=True) as progress:

        def chunks(key: str) -> Iterable[memoryview]:
            before, after = source.specs[key].dtype, specs[key].dtype
            return stream(source.chunks(key), before, after, what=key, progress=progress, finite=finite)

        hf_writer.write_weights(folder, specs, chunks)
