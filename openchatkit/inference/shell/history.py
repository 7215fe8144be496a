"""The history of typed lines over runs: one entry a line, so that any number of shells can append.

Backslashes and line ends within an entry are written as `\\\\` and `\\n`. Only the owner can read the file. It is
cut to its newer half when it becomes too large.
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
ENTRY_LIMIT = 10_000  # bytes; a longer entry was pasted, and is not kept

_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_ESCAPED = {escape: character for character, escape in _ESCAPES.items()}


def read(path: Path) -> list[str]:
    """Return the entries, the oldest first; none without a file. Raises OSError."""
    try:
        with _open_regular(path, os.O_RDONLY) as file:
            data = file.read(2 * SIZE_LIMIT)
    except FileNotFoundError:
        return []
    # Text after the last line end was not written completely. A crash of the machine can leave zeros, which no line
    # editor accepts.
    lines = data.replace(b"\0", b"").decode("utf-8", "replace").split("\n")[:-1]
    return [re.sub(r"\\[\\nr]", lambda found: _ESCAPED[found.group()], line) for line in lines]


def append(path: Path, text: str) -> None:
    """Add an entry. Raises OSError."""
    escaped = re.sub(r"[\\\n\r]", lambda found: _ESCAPES[found.group()], text)
    entry = escaped.encode("utf-8", "replace") + b"\n"
    if len(entry) > ENTRY_LIMIT:
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock(path) as file:
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
def _lock(path: Path) -> Iterator[BinaryIO]:
    while True:
        with _open_regular(path, os.O_RDWR | os.O_CREAT) as file:
            # While this shell waited, another may have replaced the file by a shorter one.
            if lock_open_file(file, path):
                yield file
                return


@contextlib.contextmanager
def _open_regular(path: Path, flags: int) -> Iterator[BinaryIO]:
    # A pipe under this name must not keep the shell waiting.
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a regular file", str(path))
    with open(descriptor, "r+b" if flags & os.O_RDWR else "rb") as file:
        yield file
