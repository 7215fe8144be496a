"""How data become samples: the settings that training and `tools/inspect_data.py` share."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from openchatkit import paths
from openchatkit.cli import natural, positive_int, share
from openchatkit.errors import UserError
from openchatkit.settings import fields, setting

PACKINGS = ("concat", "documents", "none")  # of the kit's order
DATA_ORDERS = ("kit", "neox")
LOSS_ON = ("all", "responses")
_MIXTURE_UNITS = ("sequences", "tokens")
_SEPARATORS = ("end-of-text", "newline")
BAD_ROWS = ("error", "quarantine")


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """The flags that decide how documents become samples."""

    title: ClassVar[str] = "data"
    seq_length: int = setting(2048, check=positive_int, help="tokens a row")
    packing: str = setting(
        "concat",
        choices=(*PACKINGS, "overflow"),
        help="documents are joined and cut into rows; whole ones share a row, each seeing itself alone; or each has a "
        "row, padded. `overflow`, of `--data-order neox`: whole ones follow each other in a row while they fit",
    )
    data_order: str = setting(
        "kit",
        choices=DATA_ORDERS,
        help="which documents and rows follow which: the kit's order, which goes on for ever, or GPT-NeoX's, which is "
        "that of all `--total-steps` at once; see `data/README.md`",
    )
    allow_chopped: bool = setting(
        True,
        help="`false`, with `--data-order neox` and rows of whole documents: leave out those longer than a row",
    )
    mask_end_of_text: bool = setting(
        False, help="do not train on what follows an end-of-text token: the first token of another document"
    )
    loss_on: str = setting("all", choices=LOSS_ON, help="which tokens are trained on; a response follows `<bot>:`")
    mixture_unit: str = setting("sequences", choices=_MIXTURE_UNITS, help="what weights are shares of")
    document_separator: str = setting(
        "end-of-text", choices=_SEPARATORS, help="what closes each document; the original kit had a `newline`"
    )
    bad_rows: str = setting(
        "error", choices=BAD_ROWS, help="stop at a row that cannot be used, or set it aside and list it"
    )
    max_without_reply: float = setting(
        0.5, check=share, help="share of a source's rows that may have no reply, with `--loss-on responses`"
    )
    data_cache: Path = setting(paths.TOKEN_CACHE, help="folder of tokenised data")
    seed: int = setting(1, check=natural, help="decides the order of the data")

    def check_order(self, *, one_pass: bool) -> None:
        """Raise UserError for what the order does not go with; `one_pass`: how many samples are taken is not given."""
        if self.data_order == "kit":
            needed = {"--packing overflow": self.packing == "overflow", "--allow-chopped false": not self.allow_chopped}
            if given := next((flag for flag, is_given in needed.items() if is_given), None):
                raise UserError(f"{given} is of GPT-NeoX's order: give --data-order neox with it, or leave it out")
            return
        excluded = {
            "--packing documents": (self.packing == "documents", "use --packing overflow"),
            "--mixture-unit tokens": (self.mixture_unit == "tokens", "weights are shares of rows there; leave it out"),
            "--nepochs": (one_pass and self.packing != "concat", "give --total-steps, or --packing concat"),
        }
        for other, (is_given, advice) in excluded.items():
            if is_given:
                raise UserError(f"--data-order neox and {other} exclude each other: {advice}")
        if self.seed >= 1 << 32:
            raise UserError(f"--seed {self.seed}: --data-order neox takes one below {1 << 32}")


@dataclass(frozen=True)
class DataOptions(DataSettings):
    """Everything but the names of the sources that decides which tokens sample n holds.

    whole_epochs: where no weights are given, every source is gone through as often as every other. Of GPT-NeoX's order
    besides: `wanted` samples are taken in all, None being one pass through all sources, which repeats; of them, `rows`
    a step.
    """

    tokenizer: Path
    whole_epochs: bool = False
    wanted: int | None = None
    rows: int = 1

    def __post_init__(self) -> None:
        for field in fields(DataSettings):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            assert not choices or value in choices, f"{field.name} is {value!r}, not one of {choices}"
        self.check_order(one_pass=self.wanted is None)


def from_settings(settings: Mapping[str, Any]) -> DataOptions:
    """Return the options for parsed flags, or for the settings that a checkpoint records."""
    # A checkpoint from before there was a setting has none of it.
    given = {field.name: settings[field.name] for field in fields(DataSettings) if field.name in settings}
    steps, batches = settings.get("total_steps"), ("batch_size", "gradient_accumulate_step", "data_group_size")
    rows = math.prod(settings.get(name, 1) for name in batches)
    return DataOptions(
        tokenizer=Path(settings["tokenizer_name"]),
        whole_epochs=settings.get("nepochs") is not None and steps is None,
        wanted=None if steps is None else steps * rows,
        rows=rows,
        **given | {"data_cache": Path(settings["data_cache"])},
    )
