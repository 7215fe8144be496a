"""A checkpoint's folder as GPT-NeoX reads it, written one layer at a time, for any number of tensor ranks.

What a rank has of a parameter is what a part of the kit's tensor groups has of it (`models.cuts`), but that GPT-NeoX
keeps on every rank what is not cut.
"""

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.formats import neox_layout, tokenizer_files
from openchatkit.models.config import ModelConfig
from openchatkit.models.cuts import Part, check_parts, cut_tensor, is_cut
from openchatkit.models.neox_options import GATES, NeoxOptions
from openchatkit.models.positions import alibi_slopes
from openchatkit.models.registry import family
from openchatkit.models.shards import EMBED, HEAD
from openchatkit.models.sparsity import SPARSE_KINDS, read_sparsity
from openchatkit.storage import storage_errors, sync, write_text

SETTINGS = "model.yml"
_FAMILIES = ("gpt_neox", "neox")
_TANH_GELU = ("gelu_fast", "gelu_new", "gelu_pytorch_tanh")


class NeoXWriter:
    """Writes `folder`, which is empty: the step's files shard by shard (`write`), then what names them (`finish`).

    Without a pipeline all layers of a rank are in one file: until `finish` they lie in files of their own, so that
    memory need not hold them. `newer` names are GPT-NeoX's since December 2024. UserError for a network that it does
    not have, or that so many tensor ranks cannot share.
    """

    def __init__(
        self, folder: Path, config: ModelConfig, *, step: int, ranks: int, pipeline: bool = True, newer: bool = True
    ) -> None:
        if config.family not in _FAMILIES:
            raise UserError(f"a {config.family} model is none that GPT-NeoX has: expected {' or '.join(_FAMILIES)}")
        check_parts(config, ranks, flag="--tensor-ranks")
        self.folder, self.config, self._step = folder, config, step
        self._ranks, self._pipeline, self._newer = ranks, pipeline, newer
        self._cuts = family(config).cuts(config)
        self._steps = folder / neox_layout.step_folder(step)
        self._scratch = folder / "parts"
        self._mapped: list[dict[str, Tensor]] = [{} for _ in range(ranks)]
        with storage_errors(folder):
            (self._steps / neox_layout.CONFIGS).mkdir(parents=True)
            if not pipeline:
                self._scratch.mkdir()

    def write(self, shard: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a shard's parameters, by their names in it."""
        layers = neox_layout.shard_layers(self.config, shard)
        for rank in range(self._ranks):
            parts = dict(self._cut(shard, tensors, Part(rank, self._ranks)))
            for layer in layers:
                # The head is two layers there: the norm and the projection.
                own = {k: t for k, t in parts.items() if shard != HEAD or (layer == layers[0]) == k.startswith("norm.")}
                self._store(layer, rank, own)

    def finish(self, tokenizer: Path | None, *, home: Path) -> None:
        """Write settings, the state of ranks, the tokenizer of a folder, and `latest`.

        The settings name the tokenizer's file in `home`, where the folder will be.
        """
        with storage_errors(self.folder):
            for rank, mapped in enumerate(self._mapped):
                state = {
                    neox_layout.TENSORS: mapped,
                    "optimizer": {},
                    "dp_world_size": 1,
                    "mp_world_size": self._ranks,
                    "global_steps": self._step,
                    "skipped_steps": 0,
                    "iteration": self._step,
                }
                _save(state, self._steps / neox_layout.whole_file(rank))
                mapped.clear()
            shutil.rmtree(self._scratch, ignore_errors=True)
            named = {}
            if tokenizer is not None and tokenizer_files.has_tokenizer(tokenizer):
                tokenizer_files.copy_tokenizer(tokenizer, self.folder)
                file = tokenizer_files.tokenizer_json(self.folder)
                named = {"tokenizer_type": "HFTokenizer", "vocab_file": str(home / file.name)}
            settings = describe_settings(self.config, ranks=self._ranks, pipeline=self._pipeline) | named
            # JSON is YAML: as GPT-NeoX's own files, one mapping in braces.
            write_text(self._steps / neox_layout.CONFIGS / SETTINGS, json.dumps(settings, indent=2) + "\n")
            write_text(self.folder / neox_layout.LATEST, neox_layout.step_folder(self._step))

    def _cut(self, shard: str, tensors: Mapping[str, Tensor], part: Part) -> Iterator[tuple[str, Tensor]]:
        """Yield what a rank has of a shard, by GPT-NeoX's names."""
        for name, tensor in tensors.items():
            cut = self._cuts[name]
            own = cut_tensor(tensor, cut, part) if is_cut(cut) else tensor
            if name in neox_layout.ADDED_BIASES and self.config.parallel_residual and part.index:
                own = torch.zeros_like(own)  # all ranks' are added up there
            if name.startswith(neox_layout.QK_NORM) and own.numel() > 1:
                own = own.reshape(part.share(self.config.num_heads), -1)
            yield neox_layout.their_name(name, newer=self._newer), own
        if self.config.options.gpt_j_tied:
            # The second norm exists there and does nothing.
            for name, tensor in tensors.items():
                module, _, kind = name.partition(".")
                if module == "input_layernorm":
                    unused = torch.zeros_like(tensor) if kind == "bias" else torch.ones_like(tensor)
                    yield f"post_attention_layernorm.{kind}", unused
        yield from self._make_buffers(shard, part)

    def _make_buffers(self, shard: str, part: Part) -> Iterator[tuple[str, Tensor]]:
        """Yield what GPT-NeoX stores beside parameters, and misses where it is not there."""
        config, positions = self.config, self.config.options.pos_emb
        if positions == "sinusoidal" and shard == EMBED:
            yield "position_embeddings.inv_freq", _make_frequencies(config.hidden_size, 10000.0)
        if shard in (EMBED, HEAD):
            return
        if positions == "rotary" and not self._newer:  # which today are not stored
            yield "attention.rotary_emb.inv_freq", _make_frequencies(config.rotary_dim, config.rotary_base)
        if positions == "alibi":
            yield "attention.alibi_embed.slopes", cut_tensor(alibi_slopes(config.num_heads).float(), "rows", part)

    def _store(self, layer: int, rank: int, tensors: Mapping[str, Tensor]) -> None:
        with storage_errors(self.folder):
            if self._pipeline:
                # Clones, since torch.save writes all of the memory that a view is of.
                cloned = {name: tensor.clone() for name, tensor in tensors.items()}
                _save(cloned, self._steps / neox_layout.layer_file(layer, rank))
                return
            for name, tensor in tensors.items():
                key = neox_layout.in_whole_file(layer, name)
                self._mapped[rank][key] = _map(tensor, self._scratch / f"{rank}.{key}")


def describe_settings(config: ModelConfig, *, ranks: int, pipeline: bool) -> dict[str, Any]:
    """Return GPT-NeoX's settings of a network; the inverse of `neox_settings.describe_model`, but for initial weights.

    Those that only newer releases know are left out where they say no more than their default.
    """
    options, defaults, gated = config.options, NeoxOptions(), config.activation in GATES
    tanh = config.activation in _TANH_GELU
    norm = "rmsnorm" if options.norm == "rmsnorm_2021" else options.norm
    epsilon = {"rmsnorm": "rms_norm_epsilon", "scalenorm": "scalenorm_epsilon"}.get(norm, "layernorm_epsilon")
    said: dict[str, Any] = {
        "pipe_parallel_size": 1 if pipeline else 0,
        "model_parallel_size": ranks,
        "num_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "seq_length": config.max_position_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        # So that any tokenizer of at most as many ids is padded to the rows of the embedding.
        "make_vocab_size_divisible_by": config.vocab_size // ranks,
        "norm": norm,
        epsilon: config.norm_eps,
        "pos_emb": options.pos_emb,
        "no_weight_tying": not config.tie_embeddings,
        "gpt_j_residual": config.parallel_residual,
        "activation": "gelu" if tanh else "swish" if config.activation == "silu" else config.activation,
        "bias_gelu_fusion": tanh,
        "hidden_dropout": options.hidden_dropout,
        "attention_dropout": options.attention_dropout,
    }
    if config.rotary_dim:
        said |= {"rotary_pct": _find_share(config.rotary_dim, config.head_dim), "rotary_emb_base": config.rotary_base}
    if gated or config.intermediate_size != 4 * config.hidden_size:
        said["intermediate_size"] = config.intermediate_size * (3 if gated else 1)
    if not config.attention_bias:
        said["use_bias_in_attn_linear"] = False
    for name in ("use_qk_layernorm", "gpt_j_tied", "num_kv_heads", "use_bias_in_mlp", "sliding_window_width"):
        if (value := getattr(options, name)) != getattr(defaults, name):
            said[name] = value
    written = options.to_json()
    for name in ("rpe_num_buckets", "rpe_max_distance"):
        if options.pos_emb == "rpe":
            said[name] = written[name]
    if options.attention_config:
        said |= {"attention_config": written["attention_config"], "sparsity_config": written["sparsity_config"]}
    return said


def describe_losses(config: ModelConfig) -> list[str]:
    """Return a line for each choice of a network that GPT-NeoX's settings cannot say."""
    losses = []
    if config.options.norm == "rmsnorm_2021":
        losses.append("rmsnorm_2021: GPT-NeoX since May 2025 adds epsilon to the mean instead: use a release before")
    if config.options.pos_emb == "rpe" and not config.options.rpe_scaled:
        losses.append("rpe without scaling: GPT-NeoX since January 2022 multiplies the biases: use a release before")
    sparsity = read_sparsity(dict(config.options.sparsity_config))
    for kind in sorted({*config.options.attention_config}):
        if kind in SPARSE_KINDS and sparsity.count_random_blocks(kind):
            losses.append(f"{kind}: GPT-NeoX draws random blocks of its own in each run: what it computes differs")
    return losses


def _find_share(dimensions: int, width: int) -> float:
    """Return the fraction of a width that GPT-NeoX rounds down to a number of dimensions."""
    share = dimensions / width
    return share if int(width * share) == dimensions else math.nextafter(share, 2.0)


def _make_frequencies(width: int, base: float) -> Tensor:
    exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
    return 1.0 / base**exponent


def _save(content: object, path: Path) -> None:
    torch.save(content, path)
    sync(path)


def _map(tensor: Tensor, path: Path) -> Tensor:
    """Return a copy of a tensor whose memory is a new file's."""
    if not tensor.numel():
        return tensor
    copy = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)
