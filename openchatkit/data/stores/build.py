"""One cached store: whole under its final name or not at all, and continued where an earlier build of it stopped.

It is built in a temporary folder beside it (`data.stores.builder`). Where stores are kept and who may build them is
decided in `data.stores.cache`.
"""

import contextlib
import json
import shutil
from pathlib import Path

from openchatkit import progress, storage
from openchatkit.data.records.raw_row import Mark
from openchatkit.data.records.reader import Records, Stamps, is_unchanged
from openchatkit.data.stores import workers
from openchatkit.data.stores.builder import BadRowsError, StoreBuilder, bad_row_error, is_resumable
from openchatkit.data.stores.pace import Pace
from openchatkit.data.stores.tokenise import tokenise_all
from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats.cached_store import (
    StoreRecord,
    folder_prefix,
    quarantine_path,
    read_progress,
    read_record,
    remove_progress,
    write_progress,
    write_record,
)
from openchatkit.formats.store_writer import StoreProgress
from openchatkit.formats.token_store import choose_dtype

_KEY = folder_prefix(Path()).name


def build_store(
    source: Path,
    folder: Path,
    *,
    stamps: Stamps,
    key: str,
    tokenizer: Tokenizer,
    separator: str,
    bad_rows: str,
    pace: Pace,
) -> None:
    """Tokenise `source` into `folder`, which appears only when it is complete. The caller holds the lock.

    `stamps` are the source's from before `key` was computed: a source that was changed since belongs under another key.
    UserError: a source that cannot be read or is changed during the build; BadRowsError; OSError: the disk.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    if read_record(temporary) is None:
        try:
            done = _tokenise(
                source,
                temporary,
                before=stamps,
                tokenizer=tokenizer,
                separator=separator,
                bad_rows=bad_rows,
                pace=pace,
            )
        except BaseException as error:
            if not is_resumable(error) or read_progress(temporary) is None:
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
    for stale in temporary.glob(".*"):  # temporary files left by a kill
        stale.unlink()
    storage.replace_folder(temporary, folder)  # what is there has no record


def first_quarantined(source: Path, folder: Path) -> BadRowsError:
    """Return the error that names the first row that a store's quarantine lists."""
    return bad_row_error(source, *_first_listed(folder))


def _first_listed(folder: Path) -> tuple[int, str]:
    path = quarantine_path(folder)
    try:
        with open(path, encoding="utf-8") as file:
            row = json.loads(file.readline())
        return row["line"], row["reason"]
    except (FileNotFoundError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is missing or damaged: delete {folder} and run again, it is built again") from error


def _tokenise(
    source: Path,
    folder: Path,
    *,
    before: Stamps,
    tokenizer: Tokenizer,
    separator: str,
    bad_rows: str,
    pace: Pace,
) -> StoreProgress:
    """Write the files of a store but for its record, from where the last build of it stopped."""
    _check_unchanged(source, before)
    with Records(source) as records, _open(source, folder, tokenizer, bad_rows, pace) as store:
        position = store.input.position
        processes = workers.cores() if records.size - position > pace.alone_bytes and workers.cores() > 1 else 0
        rows = records.rows(Mark(store.input.row, store.input.row_end))
        title = f"tokenising {source.name}"
        with (
            contextlib.closing(
                tokenise_all(rows, tokenizer, separator=separator, batch_bytes=pace.batch_bytes, processes=processes)
            ) as parts,
            progress.bar(records.size, title, unit="B", unit_scale=True, initial=position) as bar,
        ):
            for batch, part in parts:
                assert len(batch) == len(part.sizes) + len(part.bad), (len(batch), len(part.sizes), len(part.bad))
                bad = [(str(source), batch[place].number, reason) for place, reason in part.bad]
                store.add(len(batch), {_KEY: part}, bad, mark=batch[-1].mark, position=records.position)
                bar.update(records.position - bar.n)
                if store.is_save_due():
                    _check_unchanged(source, before)
                    store.save()
        _check_unchanged(source, before)
    done = store.progress[_KEY]
    if not done.documents:
        line, reason = _first_listed(folder)
        raise UserError(f"{source}: none of its {done.rows} rows is a record; the first, row {line}: {reason}")
    if not done.quarantined:
        quarantine_path(folder).unlink()
    for path in folder.iterdir():
        storage.sync(path)
    return done


def _check_unchanged(source: Path, before: Stamps) -> None:
    if not is_unchanged(source, before):
        raise UserError(f"{source} was changed while it was tokenised: run again when it is complete")


def _open(source: Path, folder: Path, tokenizer: Tokenizer, bad_rows: str, pace: Pace) -> StoreBuilder:
    """Open the store in `folder` as it was last saved, or an empty one."""
    folder.mkdir(exist_ok=True)
    saved = read_progress(folder)
    if saved and saved.quarantined and bad_rows == "error":
        raise first_quarantined(source, folder)
    return StoreBuilder(
        folder,
        [_KEY],
        title=f"tokenising {source}",
        dtype=choose_dtype(tokenizer.vocab_size),
        masked=True,
        bad_rows=bad_rows,
        resume={_KEY: saved} if saved else None,
        write_note=lambda stores: write_progress(folder, stores[_KEY]),
        pace=pace,
    )
