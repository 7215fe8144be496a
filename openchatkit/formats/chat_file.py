"""Chats that a user has saved: their folder, their names, and the format of a file.

    ~/.openchatkit/            or what OPENCHATKIT_HOME names
      chats/NAME.json          one saved chat, readable by its owner alone
      history                  the lines that were typed

A chat is one line of JSON, and a training record as it stands, since a record's reader takes `messages` and ignores
the other keys; `cat chats/*.json > chats.jsonl` makes a file to train on:

    {"format": "openchatkit.chat", "version": 1, "saved": "2026-11-20T22:35:00+00:00", "model": "...",
     "messages": [{"role": "system" | "user" | "assistant", "content": "...", "passages": [...]}, ...],
     "settings": {"temperature": 0.6, ...}}

A user's message may have passages, which no other has. Anyone may have written the file: everything that is used
of it is checked.
"""

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.storage import atomic_path

FORMAT = "openchatkit.chat"
VERSION = 1
SIZE_LIMIT = 16 << 20  # bytes, as of a training record
HOME_VARIABLE = "OPENCHATKIT_HOME"

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_SUFFIX = ".json"
_ROLES = ("system", "user", "assistant")
# Control characters but tab, newline and return; halves of surrogate pairs, which JSON can spell and UTF-8 cannot.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class SavedChat:
    """The contents of a file: messages, and the model and settings of the chat."""

    messages: list[dict[str, object]]
    model: str = ""
    settings: Mapping[str, object] | None = None
    saved: str = ""


def home() -> Path:
    """Return the folder of a user's chats, which need not exist. UserError when the user has no home folder."""
    try:
        return Path(os.environ.get(HOME_VARIABLE) or "~/.openchatkit").expanduser()
    except RuntimeError as error:
        raise UserError(
            f"this user, or the one that {HOME_VARIABLE} names, has no home folder: set {HOME_VARIABLE} to a folder to "
            "keep chats in"
        ) from error


def unwritable_reason() -> str:
    """Return why the home folder cannot be written, "" where it can. UserError as `home`."""
    folder = home().absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is not a folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} cannot be written"


def history_path() -> Path:
    """Return the file of the typed lines."""
    return home() / "history"


def chat_path(name: str) -> Path:
    """Return the file of the saved chat `name`; UserError for an invalid name."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{_quote(name)} cannot be the name of a chat: expected at most 64 letters of a to z, digits, '.', '_' and "
            "'-', without a '.' at the start"
        )
    return home() / "chats" / f"{name}{_SUFFIX}"


def list_chats() -> list[str]:
    """Return the names of the saved chats, sorted."""
    try:
        found = [path.name.removesuffix(_SUFFIX) for path in (home() / "chats").glob(f"*{_SUFFIX}")]
    except OSError:
        return []
    return sorted(name for name in found if _NAME.fullmatch(name))


def write(
    name: str,
    messages: Sequence[Mapping[str, object]],
    *,
    model: str = "",
    settings: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save a chat atomically and return its file. UserError when it exists already, or cannot be written."""
    path = chat_path(name)
    record = {
        "format": FORMAT,
        "version": VERSION,
        "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": model,
        "messages": list(messages),
        "settings": dict(settings or {}),
    }
    # A lone surrogate can come from a file name that is not UTF-8; escaped, it would be refused when read.
    data = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    if len(data) > SIZE_LIMIT:
        raise UserError(f"this chat is {len(data)} bytes long: a saved one holds at most {SIZE_LIMIT}")
    if not overwrite and os.path.lexists(path):
        raise UserError(f"there is a chat {name} already: save under another name, or replace it with {name}!")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            os.chmod(temporary, 0o600)
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(f"the chat cannot be saved as {path}: {error.strerror}") from error
    return path


def read(name: str) -> SavedChat:
    """Read a saved chat; UserError when it is missing, or when the file is not a whole and valid one of ours."""
    path = chat_path(name)
    try:
        record = json.loads(_read_bytes(path, name).decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _invalid(path, f"byte {error.start + 1} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise _invalid(path, f"not JSON, or cut short ({error.msg} at character {error.pos + 1})") from error
    except (ValueError, RecursionError) as error:
        raise _invalid(path, "its JSON cannot be read") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _invalid(path, f"its format is not {FORMAT}")
    if type(record.get("version")) is not int or record["version"] != VERSION:
        raise _invalid(path, f"its version is {_quote(record.get('version'))}, this program reads {VERSION}")
    model, settings, saved = record.get("model", ""), record.get("settings", {}), record.get("saved", "")
    if not isinstance(model, str) or not isinstance(settings, dict) or not isinstance(saved, str):
        raise _invalid(path, "its model, settings or time are of the wrong kind")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _invalid(path, "it has no list of messages")
    checked = [_check_message(path, number, message) for number, message in enumerate(messages, 1)]
    return SavedChat(checked, model, settings, saved)


def _read_bytes(path: Path, name: str) -> bytes:
    try:
        with open(path, "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _invalid(path, "it is not a plain file")
            data = file.read(SIZE_LIMIT + 1)
    except FileNotFoundError as error:
        names = ", ".join(list_chats()[:8]) or "none yet"
        raise UserError(f"there is no saved chat {name}: there are {names}") from error
    except OSError as error:
        raise UserError(f"the chat {path} cannot be read: {error.strerror or error}") from error
    if len(data) > SIZE_LIMIT:
        raise _invalid(path, f"it is longer than {SIZE_LIMIT} bytes")
    return data


def _open(path: str, flags: int) -> int:
    # No link is followed, and a pipe without a writer does not block.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _check_message(path: Path, number: int, message: object) -> dict[str, object]:
    """Return the parts of a message that are used, checked."""
    if not isinstance(message, dict):
        raise _invalid(path, f"message {number} is not an object")
    role, content, passages = message.get("role"), message.get("content"), message.get("passages", [])
    if role not in _ROLES:
        raise _invalid(path, f"message {number} has the role {_quote(role)}: expected {', '.join(_ROLES)}")
    if not isinstance(passages, list) or (passages and role != "user"):
        raise _invalid(path, f"message {number} has passages where none can be")
    for text in (content, *passages):
        if not isinstance(text, str):
            raise _invalid(path, f"message {number} holds something that is not text")
        if found := _UNSAFE.search(text):
            raise _invalid(path, f"message {number} holds the control character U+{ord(found.group()):04X}")
    return {"role": role, "content": content, **({"passages": passages} if passages else {})}


def _invalid(path: Path, reason: str) -> UserError:
    return UserError(f"{path} is not a chat that this program saved: {reason}")


def _quote(value: object) -> str:
    return repr(value)[:50].encode("ascii", "backslashreplace").decode()
