"""What is examined: a Hugging Face model, layer shards, or a training checkpoint, and the tokenizer that belongs to it.

Says which of these a path is, checks it, and loads it; nothing is converted on the way.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, checkpoint_folders, hf_model
from openchatkit.formats.layer_shards import LayerShards, read_config
from openchatkit.formats.tokenizer_files import has_tokenizer
from openchatkit.models.config import ModelConfig
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD, shard_names
from openchatkit.models.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUGGING_FACE, SHARDS, CHECKPOINT = "Hugging Face model", "layer shards", "training checkpoint"
_WEIGHTS = (hf_model.WEIGHTS, hf_model.WEIGHTS_INDEX, hf_model.PICKLED, hf_model.PICKLED_INDEX)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Subject:
    """A model's folder and which of the three kinds it is."""

    folder: Path
    kind: str


def find(name: str) -> Subject:
    """The model that a path or a hub name means, fetched if need be; UserError when it is none."""
    path = Path(name).expanduser()
    if not path.is_dir() and checkpoint_folders.parse_step(path.name) is None:
        path = hf_model.fetch(name)
    if any((path / file).is_file() for file in _WEIGHTS):
        return Subject(path, HUGGING_FACE)
    is_one = (path / checkpoint_folders.STATE).exists() or checkpoint_folders.parse_step(path.name) is not None
    if not is_one and not checkpoint_folders.list_steps(path) and not checkpoint_folders.is_legacy(path):
        return Subject(LayerShards.open(path).path, SHARDS)
    path = checkpoint.locate(path)
    if checkpoint_folders.is_legacy(path):
        raise UserError(
            f"{path} is a checkpoint of the original kit, which does not say what model it is: "
            "convert it with tools/convert_to_hf_gptneox.py and pass the folder that makes"
        )
    return Subject(path, CHECKPOINT)


def count_parameters(subject: Subject) -> int:
    """Return the number of a model's parameters by its configuration; its weights are not looked at."""
    folder = subject.folder
    if subject.kind != HUGGING_FACE:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Stage(read_config(folder)[1]).parameters())
    from transformers import AutoConfig, AutoModelForCausalLM

    def build() -> "PreTrainedModel":
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    return _read(build, folder).num_parameters()


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder, as transformers loads it; UserError when there is none or it has no end of text."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer: pass --tokenizer with a folder that holds the model's")
    tokenizer = _read(
        lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), folder
    )
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-text token: set eos_token in its configuration")
    return tokenizer


def check_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """UserError when a tokenizer has tokens that the model does not know."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {vocab_size}: they do not belong "
            "together, pass --tokenizer with the folder of the one it was trained with"
        )


def load_hugging_face(folder: Path, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """A Hugging Face model, whole; UserError when tensors are missing or transformers cannot load it."""
    from transformers import AutoModelForCausalLM

    model, info = _read(
        lambda: AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, trust_remote_code=False, output_loading_info=True
        ),
        folder,
    )
    if missing := sorted(info["missing_keys"]):
        # transformers would fill these with random numbers and go on.
        raise UserError(f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]} first: copy it again")
    return model.to(device).eval()


def load_stage(subject: Subject, dtype: torch.dtype, device: torch.device) -> Stage:
    """The whole network of layer shards or a checkpoint, its files compared with their manifest, a layer at a time."""
    config, read = _reader(subject)
    with torch.device("meta"):
        stage = Stage(config)
    kind, embedding = family(config), None
    for shard, _ in stage.named_shards():
        tensors = {name: tensor.to(device, dtype, copy=True) for name, tensor in read(shard).items()}
        if shard == EMBED:
            embedding = tensors[kind.embedding_weight]
        if shard == HEAD and config.tie_embeddings:
            tensors[kind.tied_weight] = embedding
        stage.load(shard, tensors)
    return stage.eval()


def _reader(subject: Subject) -> tuple[ModelConfig, Callable[[str], Mapping[str, Tensor]]]:
    """The model's config, and what reads one of its shards."""
    if subject.kind == SHARDS:
        shards = LayerShards.open(subject.folder)
        shards.verify()
        return shards.config, shards.read
    config = read_config(subject.folder)[1]
    checkpoint.verify(subject.folder, shard_names(config.num_layers))
    return config, lambda shard: checkpoint.read_weights(subject.folder, shard)


def _read(action: Callable[[], _T], folder: Path) -> _T:
    """What `action` returns; whatever the libraries raise on a damaged or foreign folder becomes one line."""
    try:
        return action()
    except Exception as error:  # they raise OSError, ValueError, RuntimeError, KeyError and errors of their own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{folder} cannot be loaded: {reason}") from error
