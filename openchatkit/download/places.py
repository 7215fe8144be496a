"""Where a fetched file goes, and the note beside it of what it is a copy of.

The note is `.NAME.fetched.json`: the address and the version that a file came from, its size, and the files that it was
unpacked into, if it was. It is what tells a file that need not be fetched again from a stranger of the same name.
"""

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath

from openchatkit.errors import UserError
from openchatkit.storage import write_text

_OURS = re.compile(r"\..+\.(fetched\.json|part|part\.json)")


@dataclass(frozen=True)
class Note:
    """What lies beside a fetched file: where it came from, and its size in bytes."""

    address: str
    version: str | None
    size: int
    unpacked: dict[str, int] = field(default_factory=dict)  # path below the file's folder -> size


def place(folder: Path, name: str) -> Path:
    """The path of the file `name`, which may name subfolders, in `folder`.

    UserError if it would not lie there, could trick a terminal, or is taken by what downloads keep beside their files.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise UserError(f"{name!r} leads outside the folder it is meant for: do not trust where it comes from")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise UserError(f"{name!r} is no name for a file: it holds control characters, or is not UTF-8")
    if any(_OURS.fullmatch(part) for part in parts):
        raise UserError(f"{name!r} is a name that downloads keep for notes: do not trust where it comes from")
    return Path(folder, *parts)


def read_note(path: Path) -> Note | None:
    """The note beside a file, or where the file was before it was unpacked."""
    try:
        return Note(**json.loads(_note(path).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def notes(folder: Path) -> Iterator[tuple[str, Note]]:
    """The names below a folder that files were fetched under, and their notes."""
    for path in sorted(folder.rglob(_note(Path("*")).name)):
        file = path.with_name(path.name.removeprefix(".").removesuffix(".fetched.json"))
        if note := read_note(file):
            yield file.relative_to(folder).as_posix(), note


def write_note(path: Path, note: Note) -> None:
    """Write a file's note, atomically."""
    write_text(_note(path), json.dumps(asdict(note)) + "\n")


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.fetched.json")
