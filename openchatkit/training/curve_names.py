"""The curves of a run in TensorBoard and wandb: the numbers of a row, by the names of the kit or of GPT-NeoX."""

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Curves = Callable[[Row], dict[str, float]]
"""The numbers of a row by the names of their curves."""

# GPT-NeoX's names of what it has, too.
_NEOX = {
    "loss": "train/lm_loss",
    "lr": "train/learning_rate",
    "loss_scale": "train/loss_scale",
    "seconds": "runtime/iteration_time",
    "tokens_per_second": "runtime/tokens_per_sec",
    "operations_per_second": "runtime/flops_per_sec_per_gpu",
    "evaluation_loss": "validation/lm_loss",
    "evaluation_perplexity": "validation/lm_loss_ppl",
    "test_loss": "test/lm_loss",
    "test_perplexity": "test/lm_loss_ppl",
    "evaluation_character_perplexity": "validation/lm_loss_char_lvl_ppl",
    "test_character_perplexity": "test/lm_loss_char_lvl_ppl",
}


def flatten(row: Row) -> dict[str, float]:
    """Return a row by the kit's names: `loss/<source>`, `gradient_norms/<layer>` in place of nested values.

    There is nothing for what has no value.
    """
    flat = {key: value for key, value in row.items() if key != "step" and not isinstance(value, dict)}
    for key, entries in row.items():
        if key.endswith("sources"):
            flat |= {f"{key.replace('sources', 'loss')}/{name}": each["loss"] for name, each in entries.items()}
        elif isinstance(entries, dict):
            flat |= {f"{key}/{name}": value for name, value in entries.items()}
    return {name: value for name, value in flat.items() if value is not None}


def choose_curves(names: str, *, seq_length: int) -> Curves:
    """Return what names the curves by `--curve-names`; rows are of `seq_length` tokens."""
    if names == "kit":
        return flatten

    def name_as_neox(row: Row) -> dict[str, float]:
        flat = flatten(row)
        named = {_NEOX.get(name, name): value for name, value in flat.items()}
        if "tokens_per_second" in flat:
            named["runtime/samples_per_sec"] = flat["tokens_per_second"] / seq_length
            named["runtime/steps_per_sec"] = 1 / flat["seconds"]
        return named

    return name_as_neox
