"""Hugging Face models and tokenizers from a folder, as transformers loads them, and checked: whole, and without code.

A chat loads more kinds of model, and spreads them over devices: see `inference/loading`.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from openchatkit.errors import UserError
from openchatkit.formats.tokenizer_files import has_tokenizer
from openchatkit.texts import reason_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Nothing is fetched, and no code that comes with a model is run.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}


@contextlib.contextmanager
def one_line_errors(folder: Path) -> Iterator[None]:
    """Make a UserError of one line of whatever the libraries raise on a damaged or foreign folder."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # they raise OSError, ValueError, RuntimeError, KeyError and errors of their own
        raise UserError(f"{folder} cannot be loaded: {reason_of(error)}") from error


def load_model(folder: Path, dtype: torch.dtype, device: torch.device) -> "PreTrainedModel":
    """Load a model for inference; UserError when tensors are missing or transformers cannot load it."""
    from transformers import AutoModelForCausalLM

    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # its types know of no loading info
    with one_line_errors(folder):
        model, info = from_pretrained(folder, dtype=dtype, output_loading_info=True, **LOCAL)
    check_complete(folder, info)
    return model.to(device).eval()


def check_complete(folder: Path, info: Mapping[str, Any]) -> None:
    """Raise UserError when, by transformers' loading info, tensors are missing or of other shapes.

    transformers would fill the former with random numbers and go on; the latter too, with `ignore_mismatched_sizes`.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        from openchatkit.formats.layer_shards import CONFIG  # with all of the families, for the name alone

        key, stored, expected = mismatched[0]
        raise UserError(
            f"{folder} does not fit its {CONFIG}: {key} is of shape {list(stored)}, expected {list(expected)}; "
            "copy both from the same model"
        )
    if missing := sorted(info["missing_keys"]):
        raise UserError(
            f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]} first: fetch or copy it again"
        )


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer in a folder; UserError when there is none or it has no end of text."""
    from transformers import AutoTokenizer

    if not has_tokenizer(folder):
        raise UserError(f"{folder} holds no tokenizer: pass --tokenizer with a folder that holds the model's")
    with one_line_errors(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer in {folder} has no end-of-text token: set eos_token in its configuration")
    return tokenizer


def check_tokenizer(folder: Path, tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """Raise UserError when the tokenizer from `folder` has tokens that the model does not know."""
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {vocab_size}: they do not belong "
            "together, pass --tokenizer with the folder of the one it was trained with"
        )


def count_parameters(folder: Path) -> int:
    """Return the number of a model's parameters by its configuration, without a look at its weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with one_line_errors(folder), torch.device("meta"):
        config: Any = AutoConfig.from_pretrained(folder, **LOCAL)
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False).num_parameters()
