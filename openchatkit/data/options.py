"""How data become samples: the options, and the flags for them that training and `tools/inspect_data.py` share."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit import paths
from openchatkit.cli import natural, positive_int, share

PACKINGS = ("concat", "documents", "none")
LOSS_ON = ("all", "responses")
MIXTURE_UNITS = ("sequences", "tokens")
SEPARATORS = ("end-of-text", "newline")
BAD_ROWS = ("error", "quarantine")


@dataclass(frozen=True)
class DataOptions:
    """Everything but the names of the sources that decides which tokens sample n holds.

    packing: "concat" cuts all documents, one after another, into windows of `seq_length`; "documents" puts whole
    documents into rows, each seeing itself alone; "none" gives each document a row. loss_on: "all" tokens, or
    "responses" alone. mixture_unit: what the weights are shares of. document_separator: what closes each document.
    bad_rows: "error" stops at a row that cannot be used, "quarantine" sets it aside. max_without_reply: the share of a
    source's documents that may have no reply where the loss is on responses. whole_epochs: where no weights are given,
    every source is gone through as often as every other.
    """

    tokenizer: Path
    seq_length: int
    seed: int = 1
    packing: str = "concat"
    loss_on: str = "all"
    mixture_unit: str = "sequences"
    document_separator: str = "end-of-text"
    bad_rows: str = "error"
    max_without_reply: float = 0.5
    whole_epochs: bool = False
    cache_dir: Path = paths.TOKEN_CACHE

    def __post_init__(self) -> None:
        assert self.packing in PACKINGS, self.packing
        assert self.loss_on in LOSS_ON, self.loss_on
        assert self.mixture_unit in MIXTURE_UNITS, self.mixture_unit
        assert self.document_separator in SEPARATORS, self.document_separator
        assert self.bad_rows in BAD_ROWS, self.bad_rows


def add_flags(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """The flags behind `DataOptions`, --tokenizer-name aside, whose default differs from command to command."""
    group.add_argument("--seq-length", type=positive_int, default=2048, help="tokens a row")
    group.add_argument("--packing", choices=PACKINGS, default="concat", help="how documents are put into rows")
    group.add_argument("--loss-on", choices=LOSS_ON, default="all", help="which tokens are trained on")
    group.add_argument("--mixture-unit", choices=MIXTURE_UNITS, default="sequences", help="what weights are shares of")
    group.add_argument("--document-separator", choices=SEPARATORS, default="end-of-text", help="closes each document")
    group.add_argument("--bad-rows", choices=BAD_ROWS, default="error", help="stop at an unusable row, or set it aside")
    group.add_argument(
        "--max-without-reply", type=share, default=0.5, help="of a source's rows, 0 to 1, with --loss-on responses"
    )
    group.add_argument("--data-cache", type=Path, default=paths.TOKEN_CACHE, help="folder of tokenised data")
    group.add_argument("--seed", type=natural, default=1, help="decides the order of the data")


def from_settings(settings: Mapping[str, Any]) -> DataOptions:
    """The options that parsed flags, or the settings that a checkpoint records, stand for."""
    return DataOptions(
        tokenizer=Path(settings["tokenizer_name"]),
        cache_dir=Path(settings["data_cache"]),
        whole_epochs=settings.get("nepochs") is not None and settings.get("total_steps") is None,
        # A checkpoint from before there was an option has none of it.
        **{name: settings[name] for name in _PLAIN if name in settings},
    )


_PLAIN = (
    *("seq_length", "seed", "packing", "loss_on", "mixture_unit", "document_separator", "bad_rows"),
    "max_without_reply",
)
