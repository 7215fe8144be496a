"""A sentence encoder's folder, as sentence-transformers writes it: its files' names, and a digest of what they compute.

Its modules (a transformer, a pooling, often a normalisation) each have a folder of settings; the transformer's files
lie beside `modules.json`. A folder without that is a plain model of transformers. torch is imported with the names of
weights, and only where those are asked for: whoever just opens an index goes without it.
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
SETTINGS = "config_sentence_transformers.json"
_VOCABULARIES = ("vocab.txt", "sentencepiece.bpe.model", "spiece.model")
_SMALL = ("config.json", *TOKENIZER_FILES, MODULES, SETTINGS, "sentence_bert_config.json", *_VOCABULARIES)
_MODULE_FILES = ("[0-9]_*/*.json", "[0-9]_*/*.safetensors")
# Of these the modules of a folder may be; others would be code that came with it.
_PACKAGE = "sentence_transformers."


def fetch(name: str | Path) -> Path:
    """The folder of an encoder, or of a cross-encoder: `name` itself if it is one, else from the hub.

    UserError: there is none, or it asks for code that is not sentence-transformers' own.
    """
    from openchatkit.formats.hf_model import CONFIG, PICKLED_FILES, SAFE_FILES

    folder = fetch_model(str(name), (*_SMALL, *_MODULE_FILES), SAFE_FILES, PICKLED_FILES)
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} holds no encoder: {CONFIG} is missing; pass a folder or a hub name of one")
    for module in modules(folder) or ():
        if not str(module.get("type", "")).startswith(_PACKAGE):
            raise UserError(f"{folder / MODULES} names code of its own, {module.get('type')}, which the kit never runs")
    return folder


def modules(folder: Path) -> list[dict[str, str]] | None:
    """The modules that an encoder is made of, None for a plain model; UserError where the list cannot be read."""
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
    """How vectors are compared: what the settings say, cosine where they say nothing, dot for a plain model."""
    if not (folder / MODULES).is_file():
        return "dot"
    return read_json(folder / SETTINGS, default={}).get("similarity_fn_name") or "cosine"


def vocabulary(folder: Path) -> Path | None:
    """The file that the tokenizers library reads, where there is one."""
    path = tokenizer_json(folder)
    return path if path.is_file() else None


def digest(folder: Path) -> str:
    """SHA-256 over the names and the bytes of all files that vectors depend on: weights, tokenizer, modules."""
    from openchatkit.formats.hf_model import PICKLED_FILES, SAFE_FILES

    files = _present(folder, _SMALL) + (_present(folder, SAFE_FILES) or _present(folder, PICKLED_FILES))
    for module in modules(folder) or ():
        if part := module.get("path"):
            files += _present(folder / part, ("*.json",))
            files += _present(folder / part, SAFE_FILES) or _present(folder / part, PICKLED_FILES)
    whole = hashlib.sha256()
    for path in sorted(set(files)):
        whole.update(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n".encode())
    return whole.hexdigest()


def _present(folder: Path, patterns: Sequence[str]) -> list[Path]:
    return [path for pattern in patterns for path in sorted(folder.glob(pattern)) if path.is_file()]
