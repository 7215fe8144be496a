"""Tables as rows of JSON: parquet files, and folders written by `save_to_disk` of `datasets`.

Only the columns a record may have are read, a few hundred rows at a time. `data.records.document` decides which rows
are records; `data.records.reader` is how other modules use this one.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit.data.records.raw_row import ROW_LIMIT, TOO_LONG, Mark, RawRow
from openchatkit.errors import UserError
from openchatkit.texts import reason_of

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Table

PARQUET = ".parquet"
_BATCH = 256  # rows
_NO_UTF8 = "its text is not UTF-8"
_LABELLED, _LABEL = "context", "safety_label"  # columns of texts for a moderation model; the first alone is not enough
# Columns that other kits have beside the messages of a chat; `document` refuses a row that has something there.
CARRIERS = ("tools", "functions", "system", "documents", "images", "audio", "videos")
_MARKS = ("dataset_info.json", "dataset_dict.json")  # files that save_to_disk writes beside a data set, or several


def is_saved_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` has written this folder."""
    return any((folder / name).is_file() for name in _MARKS)


class Parquet:
    """The rows of a parquet file; row groups before the start are skipped."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        self._path = path
        self._row = 0
        self.size = path.stat().st_size
        if not self.size:
            raise UserError(f"{path} holds no records: the file is empty, fetch it again")
        try:
            self._file = parquet.ParquetFile(path, pre_buffer=False, page_checksum_verification=True)
        except pa.ArrowException as error:
            raise UserError(f"{path} is no parquet file, or cut short ({reason_of(error)}): fetch it again") from error
        self._columns = _columns(path, self._file.schema_arrow.names, columns)
        self._groups = [self._file.metadata.row_group(i).num_rows for i in range(self._file.num_row_groups)]

    @property
    def position(self) -> int:
        return self.size * self._row // max(sum(self._groups), 1)

    def read(self, start: Mark) -> Iterator[RawRow]:
        import pyarrow as pa

        first, group = 0, 0
        while group < len(self._groups) and first + self._groups[group] <= start.number:
            first += self._groups[group]
            group += 1
        self._row = first
        batches = self._file.iter_batches(_BATCH, range(group, len(self._groups)), self._columns, use_threads=False)
        try:
            for batch in batches:
                for data, error in _json(batch):
                    self._row += 1
                    if self._row > start.number:
                        yield RawRow(self._row, data, Mark(self._row), error)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self._path}: cut short or damaged after row {self._row} ({reason_of(error)}): fetch it again"
            ) from error

    def close(self) -> None:
        self._file.close()


class SavedDataset:
    """The rows of a data set's folder, memory-mapped; of several splits, `train`."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        import datasets

        self._path = path
        self._row = 0
        self.size = sum(file.stat().st_size for file in path.rglob("*.arrow"))
        try:
            loaded = datasets.load_from_disk(str(path))
        except Exception as error:  # the library wraps no error of a missing or damaged file
            raise UserError(f"{path} cannot be loaded by datasets: {reason_of(error)}") from error
        if isinstance(loaded, datasets.DatasetDict):
            if "train" not in loaded:
                raise UserError(f"{path} has no split 'train': pass one of its folders, {', '.join(sorted(loaded))}")
            loaded = loaded["train"]
        self._dataset = loaded.select_columns(_columns(path, loaded.column_names, columns)).with_format("arrow")

    @property
    def position(self) -> int:
        return self.size * self._row // max(len(self._dataset), 1)

    def read(self, start: Mark) -> Iterator[RawRow]:
        import pyarrow as pa

        self._row = start.number
        if self._row == len(self._dataset):
            return
        try:
            for table in self._dataset.skip(start.number).iter(_BATCH):
                for data, error in _json(table):
                    self._row += 1
                    yield RawRow(self._row, data, Mark(self._row), error)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self._path} is damaged after row {self._row} ({reason_of(error)}): save it again"
            ) from error

    def close(self) -> None:
        """Do nothing: the memory map is freed with the object."""


def _columns(path: Path, names: list[str], wanted: Sequence[str]) -> list[str]:
    if "text" in wanted and _LABEL in names:
        wanted = (*wanted, _LABELLED, _LABEL)
    found = [name for name in wanted if name in names]
    if "messages" in found:
        found += [name for name in CARRIERS if name in names and name not in found]
    if not found:
        looked_for = " nor ".join(f"'{name}'" for name in wanted)
        raise UserError(f"{path} has no column {looked_for} (its columns: {', '.join(names[:8])})")
    return found


def _json(rows: "RecordBatch | Table") -> Iterator[tuple[bytes, str]]:
    """Yield each row as JSON, or b"" and the reason why it could not be read."""
    try:
        values = rows.to_pylist()
    except UnicodeDecodeError:
        if len(rows) == 1:
            yield b"", _NO_UTF8
            return
        for number in range(len(rows)):
            yield from _json(rows.slice(number, 1))
        return
    for value in values:
        try:
            data = json.dumps(value, ensure_ascii=False, default=_to_json).encode()
        except UnicodeDecodeError:
            yield b"", _NO_UTF8
            continue
        yield (data, "") if len(data) <= ROW_LIMIT else (b"", TOO_LONG)


def _to_json(value: object) -> str:
    """Return a string for a value that JSON has no form for; bytes are text that its writer did not mark as such."""
    return value.decode() if isinstance(value, bytes) else str(value)
