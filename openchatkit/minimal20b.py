"""GPT-NeoX-20B in a few lines, for a notebook: the calls of minimal-gpt-neox-20b (github.com/zphang) on our models.

    from openchatkit import minimal20b

    model = minimal20b.create_model("20B_checkpoints/global_step150000", use_cache=True)
    tokenizer = minimal20b.create_tokenizer("20B_checkpoints/20B_tokenizer.json")
    print(minimal20b.greedy_generate_text(model, tokenizer, "GPT-NeoX-20B is", max_seq_len=100))

Reads GPT-NeoX's own checkpoints of any size, and the other folders that `loading/stages.py` knows. What the network
computes, and the decode loop, are in `models`; sampling, streaming and chats, in `inference`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.formats import neox_checkpoint, tokenizer_files
from openchatkit.loading import model_kinds, stages
from openchatkit.models import generation
from openchatkit.models.layers import RotaryTable
from openchatkit.models.registry import config_from_hf
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

    def __init__(self, stage: Stage, *, use_cache: bool = False, eos_ids: Sequence[int] = ()) -> None:
        super().__init__()
        self.config, self.use_cache, self.eos_ids = stage.config, use_cache, frozenset(eos_ids)
        self.stage = stage

    @property
    def device(self) -> torch.device:
        return self.stage.projection.weight.device

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, layer_past: Sequence[Tensor] | None = None
    ) -> Tensor | tuple[Tensor, list[Tensor]]:
        """Compute logits; `attention_mask`, bool [..., all tokens, all tokens], is true where a row sees a column.

        Without it a token sees itself and all before it.
        """
        if layer_past is not None and not self.use_cache:
            raise UserError("layer_past is given to a model without a cache; create_model with use_cache=True")
        before = 0 if layer_past is None else layer_past[0].shape[1]
        length = before + x.shape[1]
        cache = self.stage.new_cache(x.shape[0], length) if self.use_cache else None
        for layer, past in zip(cache or (), () if layer_past is None else layer_past, strict=False):
            layer.append(*past.permute(0, 2, 3, 1, 4))
        mask = None if attention_mask is None else attention_mask[..., before:length, :length].to(x.device)
        logits = self.stage.logits(self.stage(x, mask=mask, cache=cache))
        return logits if cache is None else (logits, [layer.content.permute(0, 3, 1, 2, 4) for layer in cache])


class _HalfRotaryTable(RotaryTable):
    """The rotary table with which GPT-NeoX-20B was trained: frequencies, angles, cos and sin all rounded to float16.

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
    """Load a GPT-NeoX checkpoint (its layer files' folder or the one above), or another model, layer by layer.

    `device` is by default the first GPU or else the CPU; `dtype` that of the weights on a GPU, float32 on the CPU.
    `rope_table_dtype` float16 rotates as GPT-NeoX-20B did in training, float32 as transformers does with its weights.
    UserError when the folder holds no model, or not a whole one.
    """
    device = _choose_device(device)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    if rope_table_dtype not in (torch.float16, torch.float32):
        raise UserError(f"rope_table_dtype is {rope_table_dtype}, expected torch.float16 or torch.float32")
    reader = stages.open_shards(model_kinds.find(Path(path)), verify=False)
    eos = reader.raw_config.get("eos_token_id")
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    stage = stages.load_stage(reader, device, dtype)
    if rope_table_dtype == torch.float16:
        stage.rotary = _HalfRotaryTable(reader.config.rotary_dim, reader.config.rotary_base)
    return Model(stage, use_cache=use_cache, eos_ids=eos_ids).eval()


def create_dummy_model(use_cache: bool = False, device: Device | None = None, *, seed: int = 0) -> Model:
    """Make a small model with random weights and GPT-NeoX-20B's vocabulary, to try the calls with."""
    stage = Stage(config_from_hf(_DUMMY))
    stage.init_weights(seed)
    model = Model(stage, use_cache=use_cache, eos_ids=[neox_checkpoint.END_OF_TEXT])
    return model.to(_choose_device(device)).eval().requires_grad_(False)


def create_tokenizer(path: Path | str) -> "Tokenizer":
    """Read the tokenizer in a JSON file of the `tokenizers` library, or in a model's folder."""
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
        raise UserError(
            f"{file} is not a tokenizer: {error}; expected a JSON file of the tokenizers library"
        ) from error


def generate_mask(seq_len: int) -> Tensor:
    """Return bool [1, 1, seq_len, seq_len], true where a row's token may see a column's: itself and those before."""
    return torch.ones(1, 1, seq_len, seq_len, dtype=torch.bool).tril()


def greedy_generate(model: Model, input_ids: Tensor, max_seq_len: int, verbose: bool = True) -> list[list[int]]:
    """Continue prompts, int64 [batch, length], with the likeliest token each time, up to `max_seq_len` ids in all.

    Returns each row's prompt and completion; end of text ends a row and is not part of it. `verbose` draws a bar.
    """
    limit = model.config.max_position_embeddings
    if max_seq_len > limit:
        raise UserError(f"max_seq_len is {max_seq_len}, this model reads at most {limit} tokens, prompt included")
    if input_ids.dim() != 2 or not input_ids.numel():
        raise UserError(f"input_ids are {list(input_ids.shape)}, expected [batch, length] with at least one token each")
    prompts: list[list[int]] = input_ids.tolist()
    first = input_ids.shape[1]
    with progress.bar(max_seq_len, "Generating", unit="token", initial=first, disable=not verbose) as bar:
        new = generation.greedy(
            model.stage, prompts, max_new_tokens=max(0, max_seq_len - first), eos_ids=model.eos_ids, on_step=bar.update
        )
    return [prompt + row for prompt, row in zip(prompts, new, strict=True)]


def greedy_generate_text(
    model: Model,
    tokenizer: "Tokenizer",
    text: str,
    max_seq_len: int,
    device: Device | None = None,
    verbose: bool = True,
) -> str:
    """Continue a text by the likeliest tokens, up to `max_seq_len` with the text's own; see `greedy_generate`.

    `device` is taken for old calls' sake: ids always go to the model's device.
    """
    ids = tokenizer.encode(text).ids
    if not ids:
        raise UserError("text is empty; give at least one token to go on from")
    rows = greedy_generate(model, torch.tensor([ids]), max_seq_len, verbose=verbose)
    return tokenizer.decode(rows[0])


def _choose_device(device: Device | None) -> torch.device:
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return torch.device(device)
