"""A tokenizer's files, as Hugging Face names them: copied, written, and read without loading the tokenizer."""

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openchatkit.errors import UserError
from openchatkit.formats.chat import CHAT_TEMPLATE
from openchatkit.storage import atomic_path, sha256, write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)
_COMPLETE = ("tokenizer.json", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a vocabulary that AutoTokenizer can load."""
    return any((folder / name).is_file() for name in _COMPLETE)


def copy_tokenizer(source: Path, target: Path) -> list[str]:
    """Copy the tokenizer's files, each atomically, and remove those of another one; return their names.

    UserError when one asks for remote code.
    """
    _refuse_code(source)
    names = _files(source)
    for name in names:
        with atomic_path(target / name) as temporary:
            shutil.copyfile(source / name, temporary)
    for name in set(_files(target)) - set(names):
        (target / name).unlink()
    return names


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each of the tokenizer's files by name."""
    return {name: sha256(folder / name) for name in _files(folder)}


def _files(folder: Path) -> list[str]:
    return [name for name in TOKENIZER_FILES if (folder / name).is_file()]


def write_tokenizer(folder: Path, tokenizer: str, *, end_of_text: str, padding: str) -> None:
    """Write a tokenizer, given as the JSON of the `tokenizers` library, so that AutoTokenizer loads it."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "pad_token": padding,
        # Earlier releases of transformers remove spaces before punctuation when they decode.
        "clean_up_tokenization_spaces": False,
    }
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text(folder / "tokenizer.json", tokenizer + "\n")


def read_tokenizer(folder: Path) -> str | None:
    """Return what `write_tokenizer` was given; None where there is no tokenizer.json."""
    path = tokenizer_json(folder)
    return path.read_text(encoding="utf-8").removesuffix("\n") if path.is_file() else None


def tokenizer_json(path: Path) -> Path:
    """Return the tokenizer.json of a path: the path itself, or the file in that folder."""
    return path / "tokenizer.json" if path.is_dir() else path


def add_chat_template(folder: Path) -> None:
    """Make AutoTokenizer, of this and of earlier releases, render chats as the kit does."""
    config = read_json(folder / "tokenizer_config.json", default={})
    config["chat_template"] = CHAT_TEMPLATE
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    write_text(folder / "chat_template.jinja", CHAT_TEMPLATE)


def special_token_id(folder: Path, kind: str) -> int | None:
    """Return the id of a tokenizer's `kind` ("eos", "bos", "pad") token, as training has it; None where it has none."""
    token: Any = None
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = token or read_json(folder / name, default={}).get(f"{kind}_token")
    if token is None:
        return _id_of_class(folder, kind)
    return _ids(folder).get(token.get("content") if isinstance(token, dict) else token)


def _id_of_class(folder: Path, kind: str) -> int | None:
    """Return the id of a token that the files do not name, but the tokenizer's class may have."""
    try:
        loaded = load_tokenizer_files(folder)
    except Exception:  # it cannot be loaded, and its files name no such token
        return None
    number: int | None = getattr(loaded, f"{kind}_token_id")
    return number


def load_tokenizer_files(folder: Path) -> "PreTrainedTokenizerBase":
    """Load a tokenizer as transformers does, from its folder alone and without remote code; raises what that raises.

    A config.json of the kit's own family is beside some, of which transformers would say at length that it is none of
    its own.
    """
    from transformers import AutoTokenizer

    notes = logging.getLogger("transformers.configuration_utils")
    level = notes.level
    notes.setLevel(logging.ERROR)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    finally:
        notes.setLevel(level)


def tokenizer_size(folder: Path) -> int | None:
    """Return the number of embedding rows that a tokenizer needs (its highest id plus one); None where unknown."""
    return max(_ids(folder).values(), default=-1) + 1 or None


def check_tokenizer(folder: Path, vocab_size: int) -> None:
    """UserError when a tokenizer asks for remote code, or has ids that a model of `vocab_size` embedding rows lacks."""
    _refuse_code(folder)
    size = tokenizer_size(folder)
    if size is not None and size > vocab_size:
        raise UserError(
            f"the tokenizer in {folder} needs {size} embedding rows, the model has {vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def read_json(path: Path, *, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object from a file; `default` where the file is missing, UserError where it is something else."""
    if default is not None and not path.is_file():
        return dict(default)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object; fetch or copy the model again")
    return value


def _refuse_code(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    if "auto_map" in read_json(path, default={}):
        raise UserError(
            f"{path} names code to download and run (auto_map), which the kit never does; "
            "remove that entry if a tokenizer.json stands beside it"
        )


def _ids(folder: Path) -> dict[str | None, int]:
    """Return every token's id, from tokenizer.json or the older files."""
    try:
        whole = read_json(folder / "tokenizer.json", default={})
        vocabulary = whole.get("model", {}).get("vocab") or read_json(folder / "vocab.json", default={})
        if isinstance(vocabulary, list):  # a Unigram model: [[token, score], ...] in the order of the ids
            vocabulary = {token: number for number, (token, _) in enumerate(vocabulary)}
        added = {entry["content"]: entry["id"] for entry in whole.get("added_tokens", [])}
        return {**vocabulary, **read_json(folder / "added_tokens.json", default={}), **added}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder} holds no tokenizer that can be read: {error!r}; copy its files again") from error
