"""The lines that were typed, kept from one run to the next: one an entry, so that any number of shells can append.

Backslashes and line ends within an entry are written as `\\\\` and `\\n`. The file is its owner's alone, and is cut to
its newer half when it becomes too large.
"""

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from openchatkit.storage import atomic_path, lock_open_file

SIZE_LIMIT = 1 << 20  # bytes
ENTRY_LIMIT = 10_000  # bytes; what is longer was pasted, and is not kept

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ESCAPED = {escape: character for character, escape in _ESCAPES.items()}


def read(path: Path) -> list[str]:
    """The entries, the oldest first; none where there is no file. Raises OSError."""
    try:
        with _plain_file(path, os.O_RDONLY) as file:
            data = file.read(2 * SIZE_LIMIT)
    except FileNotFoundError:
        return []
    # What follows the last line end was not written to its end. A crash of the machine can leave zeros, which no line
    # editor takes.
    lines = data.replace(b"\0", b"").decode("utf-8", "replace").split("\n")[:-1]
    return [re.sub(r"\\[\\nr]", lambda found: _ESCAPED[found.group()], line) for line in lines]


def append(path: Path, text: str) -> None:
    """Add an entry. Raises OSError."""
    escaped = re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found.group()], text)
    entry = escaped.encode("utf-8", "replace") + b"\n"
    if len(entry) > ENTRY_LIMIT:
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path) as file:
        end = file.seek(0, os.SEEK_END)
        if end + len(entry) <= SIZE_LIMIT:
            file.write(entry)
            return
        file.seek(max(0, end - SIZE_LIMIT // 2))
        newer = file.read().partition(b"\n")[2]
        with atomic_path(path.resolve()) as temporary:
            os.chmod(temporary, 0o600)
            temporary.write_bytes(newer + entry)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    while True:
        with _plain_file(path, os.O_RDWR | os.O_CREAT) as file:
            # Another shell may have put a shorter file in its place while we waited.
            if lock_open_file(file, path):
                yield file
                return


@contextlib.contextmanager
def _plain_file(path: Path, flags: int) -> Iterator[BinaryIO]:
    # A pipe under this name must not keep the shell waiting.
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no plain file", str(path))
    with open(descriptor, "r+b" if flags & os.O_RDWR else "rb") as file:
        yield file
