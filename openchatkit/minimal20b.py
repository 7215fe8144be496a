"""GPT-NeoX-20B in a few lines, for a notebook: the calls of minimal-gpt-neox-20b (github.com/zphang) on our models.

    from openchatkit import minimal20b

    model = minimal20b.create_model("20B_checkpoints/global_step150000", use_cache=True)
    tokenizer = minimal20b.create_tokenizer("20B_checkpoints/20B_tokenizer.json")
    print(minimal20b.greedy_generate_text(model, tokenizer, "GPT-NeoX-20B is", max_seq_len=100))

Reads GPT-NeoX's own checkpoints of any size, and folders of layer shards; what they look like on disk is known to
`formats`, what the network computes to `models`. Sampling, streaming and chats are in `inference`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.formats import neox_checkpoint, tokenizer_files
from openchatkit.formats.layer_shards import CONFIG, LayerShards
from openchatkit.formats.neox_checkpoint import NeoXCheckpoint
from openchatkit.models.config import ModelConfig
from openchatkit.models.family import SkipInit
from openchatkit.models.layers import RotaryTable
from openchatkit.models.registry import config_from_hf, family
from openchatkit.models.shards import EMBED, HEAD
from openchatkit.models.stage import Stage

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Device = torch.device | str
_DUMMY = {
    "model_type": "gpt_neox",
    "vocab_size": 50432,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu_fast",
}


class Model(nn.Module):
    """A whole model for inference: token ids [batch, length] -> logits [batch, length, vocabulary].

    With `use_cache` the result is (logits, one tensor a layer [2, tokens so far, batch, heads, head_dim], of rotated
    keys and of values); given back as `layer_past`, the next call takes only the tokens that follow, one or many.
    """

    def __init__(self, config: ModelConfig, *, use_cache: bool = False, eos_ids: Sequence[int] = ()) -> None:
        super().__init__()
        self.config, self.use_cache, self.eos_ids = config, use_cache, frozenset(eos_ids)
        self.stage = Stage(config)

    @property
    def device(self) -> torch.device:
        return self.stage.projection.weight.device

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, layer_past: Sequence[Tensor] | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """`attention_mask`, bool [..., all tokens, all tokens], is true where a row's token sees a column's.

        Without it a token sees itself and all before it.
        """
        if not self.use_cache and attention_mask is None:
            if layer_past is not None:
                raise UserError("layer_past is given to a model without a cache; create_model with use_cache=True")
            return self.stage.logits(self.stage(x))
        logits, cache = self._cached(x, attention_mask, layer_past)
        return (logits, cache) if self.use_cache else logits

    def _cached(
        self, x: Tensor, mask: Tensor | None, layer_past: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[Tensor]]:
        before = 0 if layer_past is None else layer_past[0].shape[1]
        length = before + x.shape[1]
        if mask is None and before and x.shape[1] > 1:
            mask = generate_mask(length)
        if mask is not None:
            mask = mask[..., before:length, :length].to(x.device)
        cos, sin = (table[before:] for table in self.stage.rotary(length, x.device))
        cache: list[Tensor] = []
        for name, shard in self.stage.named_shards():
            if name in (EMBED, HEAD):
                x = shard(x)
                continue
            with _Remember(layer_past[len(cache)] if layer_past is not None else None, mask) as remember:
                x = shard(x, cos, sin, None)
            cache.append(remember.seen)
        return self.stage.logits(x), cache


class _Remember(TorchFunctionMode):
    """A context in which a layer's attention also sees the keys and values of earlier calls; `seen` is all of them.

    The layers are those that are trained: they hand rotated queries, keys and values to torch's attention, and only
    there does a cache make a difference.
    """

    def __init__(self, past: Tensor | None, mask: Tensor | None) -> None:
        super().__init__()
        self._past, self._mask = past, mask
        self.seen: Tensor

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, *new = args  # each [batch, heads, length, head_dim]
        seen = torch.stack(new).permute(0, 3, 1, 2, 4)
        self.seen = seen if self._past is None else torch.cat([self._past, seen], dim=1)
        key, value = self.seen.permute(0, 2, 3, 1, 4)
        causal = self._mask is None and self._past is None
        return func(query, key, value, attn_mask=self._mask, is_causal=causal)


class _HalfRotaryTable(RotaryTable):
    """The table with which GPT-NeoX-20B was trained: frequencies, angles, cos and sin all rounded to float16.

    At position 2047 it is up to a third of a radian off (github.com/EleutherAI/gpt-neox/issues/873).
    """

    def forward(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        exponent = torch.arange(0, self.rotary_dim, 2, dtype=torch.float32, device=device) / self.rotary_dim
        places = torch.arange(length, device=device).half()
        angles = places.unsqueeze(1) * (self.base**-exponent).half()  # [length, rotary_dim / 2]
        return angles.cos(), angles.sin()


def create_model(
    path: Path | str,
    use_cache: bool = False,
    device: Device | None = None,
    *,
    dtype: torch.dtype | None = None,
    rope_table_dtype: torch.dtype = torch.float32,
) -> Model:
    """Load a GPT-NeoX checkpoint (its layer files' folder or the one above) or layer shards, layer by layer.

    `device` is by default the first GPU or else the CPU; `dtype` that of the weights on a GPU, float32 on the CPU.
    `rope_table_dtype` float16 rotates as GPT-NeoX-20B did in training, float32 as transformers does with its weights.
    UserError when the folder is neither, or not whole.
    """
    device = _device(device)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    if rope_table_dtype not in (torch.float16, torch.float32):
        raise UserError(f"rope_table_dtype is {rope_table_dtype}, expected torch.float16 or torch.float32")
    source = _open(Path(path))
    eos = source.raw_config.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    with torch.device("meta"), SkipInit():
        model = Model(source.config, use_cache=use_cache, eos_ids=eos_ids)
    if rope_table_dtype == torch.float16:
        model.stage.rotary = _HalfRotaryTable(source.config.rotary_dim, source.config.rotary_base)
    kind = family(source.config)
    with progress.bar(len(source.shards), "Loading", unit="shard") as bar:
        for shard in source.shards:
            tensors = {name: tensor.to(device, dtype) for name, tensor in source.read(shard).items()}
            if shard == HEAD and source.config.tie_embeddings:
                tensors[kind.tied_weight] = getattr(model.stage.shards[EMBED], kind.embedding).weight.detach()
            model.stage.load(shard, tensors)
            bar.update()
    return model.eval().requires_grad_(False)


def create_dummy_model(use_cache: bool = False, device: Device | None = None, *, seed: int = 0) -> Model:
    """A small model with random weights and GPT-NeoX-20B's vocabulary, to try the calls with."""
    model = Model(config_from_hf(_DUMMY), use_cache=use_cache, eos_ids=[neox_checkpoint.END_OF_TEXT])
    model.stage.init_weights(seed)
    return model.to(_device(device)).eval().requires_grad_(False)


def create_tokenizer(path: Path | str) -> "Tokenizer":
    """The tokenizer in a JSON file of the `tokenizers` library, or in a model's folder."""
    from tokenizers import Tokenizer

    path = Path(path)
    file = tokenizer_files.tokenizer_json(path)
    if path.is_dir() and not file.is_file():
        file = neox_checkpoint.tokenizer_file(path) or file
    if not file.is_file():
        raise UserError(f"{file}: no such file; expected the JSON file of a tokenizer, or a folder that holds one")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise UserError(f"{file} is no tokenizer: {error}; expected a JSON file of the tokenizers library") from error


def generate_mask(seq_len: int) -> Tensor:
    """bool [1, 1, seq_len, seq_len], true where a row's token may see a column's: itself and those before."""
    return torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool).tril()


@torch.inference_mode()
def greedy_generate(model: Model, input_ids: Tensor, max_seq_len: int, verbose: bool = True) -> list[list[int]]:
    """Continue prompts, int64 [batch, length], with the likeliest token each time, up to `max_seq_len` ids in all.

    Returns each row's prompt and completion; end of text ends a row and is not part of it. `verbose` draws a bar.
    """
    limit = model.config.max_position_embeddings
    if max_seq_len > limit:
        raise UserError(f"max_seq_len is {max_seq_len}, this model reads at most {limit} tokens, prompt included")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise UserError(f"input_ids are {list(input_ids.shape)}, expected [batch, length] with at least one token each")
    rows: list[list[int]] = input_ids.tolist()
    ended = [False] * len(rows)
    whole = unread = input_ids.to(model.device)
    past: list[Tensor] | None = None
    with progress.bar(max_seq_len, "Generating", unit="token", initial=whole.shape[1], disable=not verbose) as bar:
        while whole.shape[1] < max_seq_len and not all(ended):
            if model.use_cache:
                logits, past = model(unread, layer_past=past)
            else:
                logits = model(whole)
            unread = logits[:, -1].argmax(-1, keepdim=True)
            whole = torch.cat([whole, unread], dim=1)
            for number, token in enumerate(unread[:, 0].tolist()):
                ended[number] = ended[number] or token in model.eos_ids
                if not ended[number]:
                    rows[number].append(token)
            bar.update()
    return rows


def greedy_generate_text(
    model: Model,
    tokenizer: "Tokenizer",
    text: str,
    max_seq_len: int,
    device: Device | None = None,
    verbose: bool = True,
) -> str:
    """The text and its likeliest continuation, of at most `max_seq_len` tokens together; see `greedy_generate`.

    `device` is where the ids are sent first; the model's own is the default, and needs no saying.
    """
    ids = tokenizer.encode(text).ids
    if not ids:
        raise UserError("text is empty; give at least one token to go on from")
    rows = greedy_generate(model, torch.tensor([ids], device=device), max_seq_len, verbose=verbose)
    return tokenizer.decode(rows[0])


def _device(device: Device | None) -> torch.device:
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def _open(path: Path) -> NeoXCheckpoint | LayerShards:
    if folder := neox_checkpoint.find(path):
        return NeoXCheckpoint(folder)
    if not (path / CONFIG).is_file():
        raise UserError(
            f"{path} holds no model: neither GPT-NeoX's layer files, {neox_checkpoint.EXAMPLE} and so on, nor prepared "
            f"layer shards beside a {CONFIG}"
        )
    return LayerShards.open(path)
