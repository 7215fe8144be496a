"""Tar archives of jsonl files, plain or compressed, read as streams: nothing of them is unpacked to disk.

Members may be compressed themselves, as in the Pile's `.jsonl.zst.tar`. Other members are skipped with a warning, and
an archive without files of records is an error.
"""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import cast

from loguru import logger

from openchatkit.data.records import json_files
from openchatkit.data.records.raw_row import RawRow
from openchatkit.data.records.reader import Records
from openchatkit.errors import UserError
from openchatkit.libraries import tar_streams

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz")
_BROKEN = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error)


class Archive:
    """A context manager that holds the file open. `size` and `position` are in bytes, for a progress bar."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb")  # noqa: SIM115 (closed by `__exit__`)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
        self.size = path.stat().st_size

    @property
    def position(self) -> int:
        return self._file.tell()

    def rows(self) -> Iterator[tuple[str, RawRow]]:
        """Yield each row of each member, with `archive:member`. UserError: damaged or truncated data, or no rows."""
        name = ""
        compressed = not self.path.name.endswith(".tar")
        try:
            for member, contents in tar_streams.read_members(
                gzip.GzipFile(fileobj=self._file) if compressed else self._file
            ):
                if member.isdir():
                    continue
                if contents is None or not json_files.form_of(member.name):
                    logger.warning("{}:{} is not a file of records: skipped", self.path, member.name)
                    continue
                name = f"{self.path}:{member.name}"
                source = json_files.JsonFile(cast(io.BufferedReader, contents), name, member.size)
                yield from ((name, row) for row in Records(Path(name), source).rows())
        except _BROKEN as error:
            raise UserError(f"{self.path} is cut short or damaged ({error}): fetch it again") from error
        if not name:
            raise UserError(f"{self.path} holds no files of records: expected names in {json_files.ENDINGS}")

    def __enter__(self) -> "Archive":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
