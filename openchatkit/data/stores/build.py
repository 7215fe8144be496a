"""Building a cached store: whole under its final name or not at all, and never twice as far as it had come.

Tokens go into a temporary folder. Every so often they are forced to disk and how far they reach is noted beside them;
the next build of the same store drops what lies behind that note and goes on, so the files come out the same, byte for
byte, however often a build was killed. Rows that are no records stop it, or are set aside, each with its line and its
reason. Where stores are kept and who may build them is `data.stores.cache`'s to say.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from loguru import logger

from openchatkit import progress, storage
from openchatkit.data.records.raw_row import Mark, RawRow
from openchatkit.data.records.reader import Records, Stamps, unchanged
from openchatkit.data.stores import workers
from openchatkit.data.stores.tokenise import Tokenised, tokenise_all
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import Interrupted, UserError
from openchatkit.formats.token_store import (
    StoreProgress,
    StoreRecord,
    TokenStoreWriter,
    folder_prefix,
    quarantine_path,
    read_progress,
    read_record,
    remove_progress,
    write_progress,
    write_record,
)

_SAVE_TOKENS = 32 << 20  # 64 MB where an id takes two bytes
_SAVE_SECONDS = 30.0


class BadRowsError(UserError):
    """Rows that are no records, where none may be."""


def build_store(
    source: Path,
    folder: Path,
    *,
    stamps: Stamps,
    key: str,
    tokenizer: Tokenizer,
    separator: str,
    bad_rows: str,
) -> None:
    """Tokenise `source` into `folder`, which appears only when it is complete. The caller holds the lock.

    `stamps` are the source's from before `key` was worked out: what it holds by now may belong under another.
    UserError: a source that cannot be read or changes meanwhile; BadRowsError; OSError: the disk.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if read_record(temporary) is None:
        try:
            done = _tokenise(
                source, temporary, before=stamps, tokenizer=tokenizer, separator=separator, bad_rows=bad_rows
            )
        except BaseException as error:
            other_source = isinstance(error, UserError) and not isinstance(error, Interrupted | BadRowsError)
            if other_source or read_progress(temporary) is None:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        write_record(
            temporary,
            StoreRecord(
                source=str(source),
                key=key,
                rows=done.rows,
                documents=done.documents,
                quarantined=done.quarantined,
                tokens=done.tokens,
                trained_tokens=done.trained_tokens,
                excluded_tokens=done.excluded_tokens,
                untrained=done.untrained,
                spelled=done.spelled,
            ),
        )
    remove_progress(temporary)
    for cut in temporary.glob(".*"):  # files that a kill kept from getting their names
        cut.unlink()
    storage.replace_folder(temporary, folder)  # what is there has no record


def bad_row(source: Path, number: int, reason: str) -> BadRowsError:
    """What is said of the first row that is no record, where none may be."""
    return BadRowsError(
        f"{source}:{number}: {reason}: mend or remove it, or pass --bad-rows quarantine, which sets such rows aside"
    )


def first_quarantined(source: Path, folder: Path) -> BadRowsError:
    """`bad_row` of the first row that a store's quarantine lists."""
    return bad_row(source, *_first_listed(folder))


def _first_listed(folder: Path) -> tuple[int, str]:
    path = quarantine_path(folder)
    try:
        with open(path, encoding="utf-8") as file:
            row = json.loads(file.readline())
        return row["line"], row["reason"]
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is missing or damaged: delete {folder} and run again, it is made anew") from error


def _tokenise(
    source: Path,
    folder: Path,
    *,
    before: Stamps,
    tokenizer: Tokenizer,
    separator: str,
    bad_rows: str,
) -> StoreProgress:
    """Write the files of a store but for its record, from where the last build of it stopped."""
    _check_unchanged(source, before)
    with Records(source) as records, _unfinished(folder, source, tokenizer, bad_rows) as store:
        done = store.done
        if done.rows:
            logger.info("tokenising {}: goes on behind row {}, where it was stopped", source, done.row)
        processes = workers.cores() if records.size - done.position > workers.SMALL and workers.cores() > 1 else 0
        rows = records.rows(Mark(done.row, done.row_end))
        parts = tokenise_all(rows, tokenizer, separator=separator, processes=processes)
        title = f"tokenising {source.name}"
        with (
            contextlib.closing(parts),
            progress.bar(records.size, title, unit="B", unit_scale=True, initial=done.position) as bar,
        ):
            for batch, part in parts:
                store.add(batch, part, position=records.position)
                bar.update(records.position - bar.n)
                if store.due():
                    _check_unchanged(source, before)
                    store.save()
        _check_unchanged(source, before)
        store.save()
    if not store.done.documents:
        line, reason = _first_listed(folder)
        raise UserError(f"{source}: none of its {store.done.rows} rows is a record; the first, row {line}: {reason}")
    if not store.done.quarantined:
        quarantine_path(folder).unlink()
    for path in folder.iterdir():
        storage.sync(path)
    return store.done


def _check_unchanged(source: Path, before: Stamps) -> None:
    if not unchanged(source, before):
        raise UserError(f"{source} was changed while it was tokenised: run again when it is complete")


def _unfinished(folder: Path, source: Path, tokenizer: Tokenizer, bad_rows: str) -> "_Unfinished":
    """The store in `folder` as it was last saved, or an empty one."""
    folder.mkdir(exist_ok=True)
    if done := read_progress(folder):
        if done.quarantined and bad_rows == "error":
            raise first_quarantined(source, folder)
        with contextlib.suppress(ValueError):
            return _Unfinished(folder, source, tokenizer.vocab_size, bad_rows, done)
    shutil.rmtree(folder)
    folder.mkdir()
    return _Unfinished(folder, source, tokenizer.vocab_size, bad_rows, None)


class _Unfinished:
    """The open files of a store: `done` is what they hold, and `save` makes sure that a later build finds it."""

    def __init__(
        self, folder: Path, source: Path, vocab_size: int, bad_rows: str, resume: StoreProgress | None
    ) -> None:
        self.done = self._saved = resume or StoreProgress()
        self._folder = folder
        self._source = source
        self._bad_rows = bad_rows
        self._save_at = time.monotonic() + _SAVE_SECONDS
        self._quarantine = open(quarantine_path(folder), "ab")  # noqa: SIM115 (closed by `__exit__`)
        if self._quarantine.tell() < self.done.quarantine_size:
            raise ValueError(f"{quarantine_path(folder)} is cut short")
        self._quarantine.truncate(self.done.quarantine_size)
        self._writer = TokenStoreWriter(folder_prefix(folder), vocab_size=vocab_size, masked=True, resume=resume)

    def add(self, rows: Sequence[RawRow], part: Tokenised, *, position: int) -> None:
        """Append what some rows became; BadRowsError at a bad one if none may be."""
        assert len(rows) == len(part.sizes) + len(part.bad), (len(rows), len(part.sizes), len(part.bad))
        bad = [(rows[place].number, reason) for place, reason in part.bad]
        if bad and self._bad_rows == "error":
            raise bad_row(self._source, *bad[0])
        self._writer.add(part.tokens, part.sizes, part.mask)
        listed = [{"file": str(self._source), "line": number, "reason": reason} for number, reason in bad]
        lines = "".join(json.dumps(row) + "\n" for row in listed).encode()
        self._quarantine.write(lines)
        done = self.done
        self.done = StoreProgress(
            rows=done.rows + len(rows),
            row=rows[-1].mark.number,
            row_end=rows[-1].mark.end,
            position=position,
            documents=self._writer.documents,
            tokens=self._writer.tokens,
            trained_tokens=self._writer.trained_tokens,
            excluded_tokens=self._writer.excluded_tokens,
            untrained=self._writer.untrained,
            spelled=done.spelled + part.spelled,
            quarantined=done.quarantined + len(bad),
            quarantine_size=done.quarantine_size + len(lines),
        )

    def due(self) -> bool:
        """Whether so much is new that it should be saved."""
        return self.done.tokens - self._saved.tokens >= _SAVE_TOKENS or time.monotonic() >= self._save_at

    def save(self) -> None:
        """Force what is there to disk, then note how far it reaches."""
        done = self.done
        self._writer.sync()
        storage.sync_file(self._quarantine)
        write_progress(self._folder, done)
        self._saved = done
        self._save_at = time.monotonic() + _SAVE_SECONDS

    def __enter__(self) -> "_Unfinished":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, KeyboardInterrupt | Interrupted) and self.done.rows:
                self.save()
                logger.info("tokenising {}: stopped; the same command goes on where it stopped", self._source)
        finally:
            with self._quarantine:
                self._writer.__exit__(kind, error, trace)
