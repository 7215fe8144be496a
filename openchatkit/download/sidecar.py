"""The path of a fetched file, and the sidecar file beside it that says what it is a copy of.

The sidecar is `.NAME.fetched.json`: the address and the version that a file came from, its size, and the files that it
was unpacked into, if it was. A file with a matching sidecar need not be fetched again.
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
class Sidecar:
    """Where a fetched file came from, and its size in bytes."""

    address: str
    version: str | None
    size: int
    unpacked: dict[str, int] = field(default_factory=dict)  # path below the file's folder -> size

    def matches(self, address: str, version: str | None) -> bool:
        """Return whether it is the sidecar of this version, where one is known, of the file at `address`."""
        return self.address == address and version in (None, self.version)


def storage_path(folder: Path, name: str) -> Path:
    """Return the path in `folder` of the file `name`, which may contain subfolders.

    UserError if it would lie elsewhere, could trick a terminal, or is reserved for files that downloads keep.
    """
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        raise UserError(f"{name!r} leads outside the folder it is meant for: do not trust where it comes from")
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise UserError(f"{name!r} is not a valid file name: it has control characters, or is not UTF-8")
    if any(_OURS.fullmatch(part) for part in parts):
        raise UserError(
            f"{name!r} is a name that downloads reserve for their sidecars: do not trust where it comes from"
        )
    return Path(folder, *parts)


def read_sidecar(path: Path) -> Sidecar | None:
    """Read the sidecar of a file, which may have been unpacked since; None where there is none."""
    try:
        return Sidecar(**json.loads(_sidecar_path(path).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def sidecars(folder: Path) -> Iterator[tuple[str, Sidecar]]:
    """Yield the name below a folder and the sidecar of each file that was fetched."""
    for path in sorted(folder.rglob(_sidecar_path(Path("*")).name)):
        file = path.with_name(path.name.removeprefix(".").removesuffix(".fetched.json"))
        if sidecar := read_sidecar(file):
            yield file.relative_to(folder).as_posix(), sidecar


def write_sidecar(path: Path, sidecar: Sidecar) -> None:
    """Write the sidecar of a file, atomically."""
    write_text(_sidecar_path(path), json.dumps(asdict(sidecar)) + "\n")


def _sidecar_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.fetched.json")
