"""The folder of a sentence encoder, as sentence-transformers writes it: names of files, and a digest of their content.

Its modules (a transformer, a pooling, often a normalisation) each have a folder of settings; the transformer's files
lie beside `modules.json`. A folder without that is a plain model of transformers. torch is imported with the names of
weights, and only when those are needed: opening an index does not import it.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from openchatkit.download.sources import fetch_model
from openchatkit.errors import UserError
from openchatkit.formats.tokenizer_files import TOKENIZER_FILES, read_json, tokenizer_json
from openchatkit.storage import sha256

MODULES = "modules.json"
_SETTINGS = "config_sentence_transformers.json"
_VOCABULARIES = ("vocab.txt", "sentencepiece.bpe.model", "spiece.model")
_SMALL = ("config.json", *TOKENIZER_FILES, MODULES, _SETTINGS, "sentence_bert_config.json", *_VOCABULARIES)
_MODULE_FILES = ("[0-9]_*/*.json", "[0-9]_*/*.safetensors")
# The modules of a folder may come from here; others would be code that came with it.
_PACKAGE = "sentence_transformers."


def fetch(name: str | Path) -> Path:
    """Return the folder of an encoder or cross-encoder: `name` itself if it is a folder, else fetched from the hub.

    UserError: not found, or it needs code that is not from sentence-transformers.
    """
    from openchatkit.formats.hf_model import PICKLED_FILES, SAFE_FILES
    from openchatkit.formats.layer_shards import CONFIG

    folder = fetch_model(str(name), (*_SMALL, *_MODULE_FILES), SAFE_FILES, PICKLED_FILES)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no encoder: {CONFIG} is missing; pass a folder or a hub name of one")
    for module in modules(folder) or ():
        if not str(module.get("type", "")).startswith(_PACKAGE):
            raise UserError(f"{folder / MODULES} names code of its own, {module.get('type')}, which the kit never runs")
    return folder


def modules(folder: Path) -> list[dict[str, str]] | None:
    """Return the modules of an encoder, None for a plain model; UserError: the list cannot be read."""
    path = folder / MODULES
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
            raise ValueError("expected a list of objects")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}; fetch or copy the encoder again") from error
    return found


def similarity(folder: Path) -> str:
    """Return how vectors are compared: as the settings say, by default cosine, dot for a plain model."""
    if not (folder / MODULES).is_file():
        return "dot"
    return read_json(folder / _SETTINGS, default={}).get("similarity_fn_name") or "cosine"


def vocabulary(folder: Path) -> Path | None:
    """Return the file that the tokenizers library reads, if it exists."""
    path = tokenizer_json(folder)
    return path if path.is_file() else None


def digest(folder: Path) -> str:
    """Return the SHA-256 of the names and bytes of all files that vectors depend on: weights, tokenizer, modules."""
    from openchatkit.formats.hf_model import PICKLED_FILES, SAFE_FILES

    files = _present(folder, _SMALL) + (_present(folder, SAFE_FILES) or _present(folder, PICKLED_FILES))
    for module in modules(folder) or ():
        if inner := module.get("path"):
            files += _present(folder / inner, ("*.json",))
            files += _present(folder / inner, SAFE_FILES) or _present(folder / inner, PICKLED_FILES)
    whole = hashlib.sha256()
    for path in sorted(set(files)):
        whole.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return whole.hexdigest()


def _present(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
