"""Wikipedia's snippets as an Arrow IPC file: converted once from the published Parquet table, then read by memory map.

The published table has `text_snippet` and `position_in_source_text`, and further columns that its authors do not
describe. So they are examined: a new article begins where the position does not rise, or where a column of titles or
identifiers of articles changes. Articles get numbers, so that reading compares only these.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.retrieval import blocks
from openchatkit.storage import atomic_path, check_room

TEXT, POSITION = "text_snippet", "position_in_source_text"
_SCHEMA = pa.schema([(TEXT, pa.string()), (POSITION, pa.int64()), ("article", pa.int64()), ("title", pa.string())])
_PIECE = 1 << 16  # rows converted at a time
_KEY_PARTS = {"title", "id", "url", "article", "page", "document", "doc"}


def convert(published: Path, table: Path) -> tuple[int, tuple[str, ...]]:
    """Write the Arrow file of a published table; return the number of rows, and the columns that separate articles.

    Takes a few megabytes of memory. UserError: the table cannot be read or lacks a column, or the disk is full.
    """
    try:
        with pq.ParquetFile(published, memory_map=True) as source:
            keys, title = _columns(published, source)
            wanted = [TEXT, POSITION, *keys]
            needed = _size(source, {TEXT, title}) + 24 * source.metadata.num_rows
            check_room(table.parent, needed, str(table))
            pieces = _pieces(source, wanted)
            with (
                progress.bar(source.metadata.num_rows, "snippets converted", unit="row", unit_scale=True) as bar,
                atomic_path(table) as temporary,
                pa.OSFile(str(temporary), "wb") as file,
                pa.ipc.new_file(file, _SCHEMA) as writer,
            ):
                for block in _blocks(_number_articles(pieces, keys, title)):
                    writer.write_batch(block)
                    bar.update(len(block))
            return source.metadata.num_rows, tuple(keys)
    except pa.ArrowException as error:
        raise UserError(f"{published} cannot be converted: {error}; remove it and run this again") from error


class WikipediaTable:
    """Snippets by row number. Opening reads only the footer; UserError: not such a file of `rows` rows."""

    def __init__(self, path: Path, rows: int) -> None:
        self._blocks = blocks.Blocks(path, rows, _SCHEMA, what="table of snippets")

    def __len__(self) -> int:
        return self._blocks.rows

    def text(self, number: int) -> str:
        """Return a snippet."""
        return self._blocks.value(TEXT, number) or ""

    def title(self, number: int) -> str:
        """Return the title of the article of a snippet, "" if the published table has none."""
        return self._blocks.value("title", number) or ""

    def neighbours(self, number: int, width: int) -> range:
        """Return the rows of the same article around `number`, itself included, at most `width` on each side."""
        return self._blocks.equal_neighbours("article", number, width)

    def close(self) -> None:
        """Close the map."""
        self._blocks.close()


def _columns(published: Path, source: pq.ParquetFile) -> tuple[list[str], str | None]:
    """Return the columns that change with the article, and the one with titles, by names, types and first rows."""
    schema = source.schema_arrow
    if lacking := {TEXT, POSITION} - set(schema.names):
        there = ", ".join(schema.names[:20])
        raise UserError(f"{published} has no column {min(lacking)}: expected it beside {there}")
    fields = [field for field in schema if field.name not in (TEXT, POSITION)]
    keys = [field.name for field in fields if _is_key(field)]
    for piece in _pieces(source, [POSITION, *keys]):
        keys = [key for key in keys if not _is_of_rows(piece, key)]
        break
    titles = [key for key in keys if "title" in key.lower() and not pa.types.is_integer(schema.field(key).type)]
    return keys, titles[0] if titles else None


def _is_key(field: pa.Field) -> bool:
    parts = set(field.name.lower().replace("-", "_").split("_"))
    kinds = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)
    return bool(parts & _KEY_PARTS) and any(kind(field.type) for kind in kinds)


def _is_of_rows(piece: pa.Table, key: str) -> bool:
    """Whether a column changes within articles, as row numbers do, so that it does not separate articles."""
    within = ~_falls(_positions(piece))
    return bool(within.any()) and bool(_changes(piece, key)[within].mean() > 0.5)


def _pieces(source: pq.ParquetFile, columns: list[str]) -> Iterator[pa.Table]:
    for batch in source.iter_batches(batch_size=_PIECE, columns=columns):
        yield pa.Table.from_batches([batch])


def _size(source: pq.ParquetFile, columns: set[str | None]) -> int:
    """Return the uncompressed bytes of these columns."""
    metadata = source.metadata
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    chunks = (group.column(number) for group in groups for number in range(group.num_columns))
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema in columns)


def _number_articles(pieces: Iterable[pa.Table], keys: list[str], title: str | None) -> Iterator[pa.Table]:
    """Yield the pieces in the columns of the Arrow file, with articles numbered from 0."""
    before: pa.Table | None = None
    article = -1
    for piece in pieces:
        # With the last row of the previous piece, since an article may continue in this one.
        joined = piece if before is None else pa.concat_tables([before, piece])
        positions = _positions(joined)
        begins = _falls(positions)
        for key in keys:
            begins |= _changes(joined, key)
        begins = begins if before is not None else np.concatenate([[True], begins])
        articles = article + np.cumsum(begins)
        article, before = int(articles[-1]), piece.slice(len(piece) - 1)
        titles = piece.column(title).cast(pa.string()) if title else pa.nulls(len(piece), pa.string())
        columns = [piece.column(TEXT).cast(pa.string()), positions[-len(piece) :], articles, titles]
        yield pa.table(
            [pa.chunked_array([column]) if isinstance(column, np.ndarray) else column for column in columns],
            schema=_SCHEMA,
        )


def _positions(piece: pa.Table) -> np.ndarray:
    return piece.column(POSITION).cast(pa.int64(), safe=False).fill_null(-1).to_numpy()


def _falls(positions: np.ndarray) -> np.ndarray:
    """Return bool [n - 1]: whether the position does not rise from a row to the next."""
    return positions[1:] <= positions[:-1]


def _changes(piece: pa.Table, key: str) -> np.ndarray:
    """Return bool [n - 1]: whether a column changes from a row to the next; nulls count as no change."""
    column = piece.column(key).combine_chunks()
    return pc.fill_null(pc.not_equal(column[1:], column[:-1]), False).to_numpy(zero_copy_only=False)


def _blocks(pieces: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of pieces in blocks of one size, except the last."""
    rest: pa.Table | None = None
    for piece in pieces:
        rest = piece if rest is None else pa.concat_tables([rest, piece])
        whole = len(rest) - len(rest) % blocks.BLOCK
        for first in range(0, whole, blocks.BLOCK):
            yield _as_batch(rest.slice(first, blocks.BLOCK))
        rest = rest.slice(whole)
    if rest is not None and len(rest):
        yield _as_batch(rest)


def _as_batch(rows: pa.Table) -> pa.RecordBatch:
    return rows.combine_chunks().to_batches()[0]
