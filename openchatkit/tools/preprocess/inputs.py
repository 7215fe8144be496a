"""The input of `tools/preprocess_data.py`: files of records, of text, and archives of both, one after another."""

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path

from openchatkit.data.records import reader
from openchatkit.data.records.raw_row import RawRow
from openchatkit.data.records.reader import Records
from openchatkit.errors import UserError
from openchatkit.tools.preprocess.archives import ARCHIVE_SUFFIXES, Archive, is_archive
from openchatkit.tools.preprocess.texts import TEXT, TextFile, is_text

NamedRow = tuple[str, RawRow]  # a row with the name of its file
ENDINGS = ", ".join((reader.ENDINGS, TEXT, *ARCHIVE_SUFFIXES))


def is_input(name: str) -> bool:
    """Return whether a file's name is one of a file that can be read here."""
    return reader.is_readable(name) or is_text(name) or is_archive(name)


def find_files(names: str) -> list[Path]:
    """Return the files that --input lists, in order; UserError for one that is missing or of another kind."""
    files = [Path(name.strip()) for name in names.split(",") if name.strip()]
    if not files:
        raise UserError("--input names no file")
    for path in files:
        try:
            path.stat()
        except FileNotFoundError as error:
            raise UserError(f"--input {path}: there is no such file") from error
        except OSError as error:
            raise UserError(f"--input {path} cannot be read: {error.strerror or error}") from error
        if not path.is_dir() and not is_input(path.name):
            raise UserError(f"--input {path}: expected a name that ends in {ENDINGS}")
    return files


class InputRows:
    """The rows of some files, one file after another, each with the name of its file; and how fast they are read."""

    def __init__(self, files: Sequence[Path], keys: Sequence[str]) -> None:
        self._files, self._keys = files, keys
        self._sizes = [sum(file.stat().st_size for file in reader.files(path)) for path in files]
        self.size = sum(self._sizes)
        self._read = 0
        self._text = 0

    def rows(self, start: int) -> Iterator[NamedRow]:
        """Yield the rows after the first `start` ones."""
        number, before = 0, 0
        for path, size in zip(self._files, self._sizes, strict=True):
            with self._open(path) as source:
                rows = source.rows() if isinstance(source, Archive) else zip(repeat(str(path)), source.rows())
                for name, row in rows:
                    number += 1
                    if number > start:
                        self._read = before + source.position
                        self._text += len(row.data)
                        yield name, row
            before += size

    def _open(self, path: Path) -> Archive | TextFile | Records:
        if is_archive(path.name):
            return Archive(path)
        return TextFile(path) if is_text(path.name) else Records(path, columns=self._keys)

    def rate(self, seconds: float) -> str:
        """Return how much of the input has been read, and how many bytes of records a second."""
        return f"{self._read / max(self.size, 1):.0%} of the input, {self._text / 1e6 / max(seconds, 1e-9):.1f} MB/s"
