"""Archives of files of records or of texts, read as streams: nothing of them is unpacked to disk.

Tars, plain or compressed, and zips. Members may be compressed themselves, as in the Pile's `.jsonl.zst.tar`; a text is
one document, and so is the only member of a zip, whatever its name, as in enwik8.zip. Other members are skipped with a
warning, and an archive without any is an error.
"""

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

from loguru import logger

from openchatkit.data.records import json_files
from openchatkit.data.records.raw_row import RawRow
from openchatkit.data.records.reader import Records
from openchatkit.errors import UserError
from openchatkit.libraries import tar_streams
from openchatkit.tools.preprocess.texts import TEXT, InputFile, is_text, read_text

_ZIP = ".zip"
_TARS = (".tar", ".tar.gz", ".tgz")
ARCHIVE_SUFFIXES = (*_TARS, _ZIP)
_BROKEN = (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile)


def is_archive(name: str) -> bool:
    """Return whether a file's name, in any case, is one of an archive."""
    return name.lower().endswith(ARCHIVE_SUFFIXES)


class _Member(NamedTuple):
    """A file of an archive; `contents` is None where it is none, and `is_only` where there is no other one."""

    name: str
    size: int
    contents: IO[bytes] | None
    is_only: bool = False


class Archive(InputFile):
    """An archive."""

    def rows(self) -> Iterator[tuple[str, RawRow]]:
        """Yield each row of each member, with `archive:member`. UserError: damaged or truncated data, or no rows."""
        found = False
        read = self._read_zip if self.path.name.lower().endswith(_ZIP) else self._read_tar
        try:
            for member in read():
                name = f"{self.path}:{member.name}"
                if member.contents is not None and json_files.form_of(member.name):
                    source = json_files.JsonFile(cast(io.BufferedReader, member.contents), name, member.size)
                    yield from ((name, row) for row in Records(Path(name), source).rows())
                elif member.contents is not None and (member.is_only or is_text(member.name)):
                    yield name, read_text(member.contents)
                else:
                    logger.warning("{} is not a file of records: skipped", name)
                    continue
                found = True
        except _BROKEN as error:
            raise UserError(f"{self.path} is cut short or damaged ({error}): fetch it again") from error
        if not found:
            raise UserError(
                f"{self.path} holds no files of records: expected names in {json_files.ENDINGS}, or texts in {TEXT}"
            )

    def _read_tar(self) -> Iterator[_Member]:
        plain = self.path.name.lower().endswith(_TARS[0])
        for member, contents in tar_streams.read_members(self._file if plain else gzip.GzipFile(fileobj=self._file)):
            if not member.isdir():
                yield _Member(member.name, member.size, contents)

    def _read_zip(self) -> Iterator[_Member]:
        with zipfile.ZipFile(self._file) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            for info in members:
                try:
                    contents = archive.open(info)
                except (NotImplementedError, RuntimeError) as error:  # an unknown compression; a password
                    raise UserError(f"{self.path}: {info.filename} cannot be read ({error}): unpack it") from error
                with contents:
                    yield _Member(info.filename, info.file_size, contents, is_only=len(members) == 1)
