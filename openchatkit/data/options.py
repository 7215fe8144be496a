"""How data become samples: the settings that training and `tools/inspect_data.py` share."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from openchatkit import paths
from openchatkit.cli import natural, positive_int, share
from openchatkit.settings import fields, setting

PACKINGS = ("concat", "documents", "none")
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
        choices=PACKINGS,
        help="documents are joined and cut into rows; whole ones share a row, each seeing itself alone; or each has a "
        "row, padded",
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


@dataclass(frozen=True)
class DataOptions(DataSettings):
    """Everything but the names of the sources that decides which tokens sample n holds.

    whole_epochs: where no weights are given, every source is gone through as often as every other.
    """

    tokenizer: Path
    whole_epochs: bool = False

    def __post_init__(self) -> None:
        for field in fields(DataSettings):
            value, choices = getattr(self, field.name), field.metadata["choices"]
            assert not choices or value in choices, f"{field.name} is {value!r}, not one of {choices}"


def from_settings(settings: Mapping[str, Any]) -> DataOptions:
    """Return the options for parsed flags, or for the settings that a checkpoint records."""
    # A checkpoint from before there was a setting has none of it.
    given = {field.name: settings[field.name] for field in fields(DataSettings) if field.name in settings}
    return DataOptions(
        tokenizer=Path(settings["tokenizer_name"]),
        whole_epochs=settings.get("nepochs") is not None and settings.get("total_steps") is None,
        **given | {"data_cache": Path(settings["data_cache"])},
    )
