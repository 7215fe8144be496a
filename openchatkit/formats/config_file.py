"""A model's config.json as it is on disk; `layer_shards.read_config` makes a `ModelConfig` of it. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from openchatkit.errors import UserError
from openchatkit.formats.tokenizer_files import read_json
from openchatkit.storage import write_text

CONFIG = "config.json"


def read_raw(folder: Path) -> dict[str, Any]:
    """Read a folder's config.json; UserError also when it asks for remote code."""
    raw: dict[str, Any] = read_json(folder / CONFIG)
    if "auto_map" in raw:
        raise UserError(
            f"{folder / CONFIG} names code to download and run (auto_map), which the kit never does; "
            "use a version of the model that transformers knows by itself"
        )
    return raw


def write_raw(folder: Path, raw: dict[str, Any]) -> None:
    """Write the config.json of a model whose weights start at random."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG, json.dumps(raw, indent=2) + "\n")
