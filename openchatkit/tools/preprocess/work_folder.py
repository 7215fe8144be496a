"""The hidden folder that stores are built in together: whose work it holds, and how its files get their names.

The folder's `progress.json` says how far the files reach (`data.stores.builder`), and for which input and options: only
a run with the same ones continues. Final names are given at the end, the index's last, so that no store opens whose
other files are missing.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from openchatkit import storage
from openchatkit.data.records import reader
from openchatkit.data.stores.builder import Progress, StoreBuilder, is_resumable
from openchatkit.data.stores.pace import Pace
from openchatkit.errors import UserError
from openchatkit.formats.cached_store import quarantine_path
from openchatkit.formats.store_writer import StoreProgress, rename_store
from openchatkit.formats.token_store import bin_path, idx_path, mask_path
from openchatkit.tools.preprocess import fields

_VERSION = 2  # raise it when the same input would give other files


def store_prefix(prefix: Path, key: str) -> Path:
    """Return the prefix of the store of one field, as GPT-NeoX names it."""
    return prefix.with_name(f"{prefix.name}_{key}_document")


def set_aside_path(prefix: Path) -> Path:
    """Return the file of the rows that were set aside, {"file", "line", "reason"} each; absent when there are none."""
    return prefix.with_name(f"{prefix.name}_{quarantine_path(prefix).name}")


@contextlib.contextmanager
def unfinished_stores(
    prefix: Path,
    job: fields.FieldOptions,
    *,
    files: Sequence[Path],
    title: str,
    bad_rows: str,
    overwrite: bool,
    pace: Pace,
) -> Iterator[StoreBuilder]:
    """Yield the open stores of a job, where an earlier run of it stopped; give them their names when that succeeds.

    UserError: a final name that is taken, where `overwrite` does not allow it; another process that does the same; an
    input that was changed while it was tokenised.
    """
    folder = prefix.with_name(f".{prefix.name}.partial")
    note = folder / "progress.json"
    with storage.own_folder(folder):
        resumable = True
        try:
            taken = next((path for path in _final_files(prefix, job.stores) if path.exists()), None)
            if taken and not overwrite:
                raise UserError(f"{taken} is there already: name another --output-prefix, or pass --overwrite")
            resumable = False
            stamps = [reader.stamps(path) for path in files]
            identity = _identity(files, stamps, job)

            def write_note(stores: Progress) -> None:
                held = {key: asdict(progress) for key, progress in stores.items()}
                storage.write_text(note, json.dumps({"identity": identity, "stores": held}) + "\n")

            with StoreBuilder(
                folder,
                job.stores,
                title=title,
                dtype=job.dtype,
                masked=job.chats,
                bad_rows=bad_rows,
                resume=_read_note(note, identity, bad_rows),
                write_note=write_note,
                pace=pace,
            ) as stores:
                yield stores
                if not all(map(reader.is_unchanged, files, stamps)):
                    raise UserError("the input was changed while it was tokenised: run again when it is complete")
            _publish(folder, prefix, job.stores, quarantined=stores.input.quarantined)
        except BaseException as error:
            if not note.exists() or not (resumable or is_resumable(error)):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)


def _final_files(prefix: Path, keys: Sequence[str]) -> list[Path]:
    """Return every file that a job like this one leaves, the indices first."""
    prefixes = [store_prefix(prefix, key) for key in keys]
    stores = [place(store) for place in (idx_path, bin_path, mask_path) for store in prefixes]
    return [*stores, set_aside_path(prefix)]


def _read_note(note: Path, identity: str, bad_rows: str) -> Progress | None:
    """Return how far an earlier run of the same job came, or None."""
    try:
        saved = json.loads(note.read_text(encoding="utf-8"))
        if saved["identity"] != identity:
            return None
        stores = {key: StoreProgress(**held) for key, held in saved["stores"].items()}
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    # Where no row may be bad, the first one is to be met again.
    quarantined = any(held.quarantined for held in stores.values())
    return None if quarantined and bad_rows == "error" else stores


def _publish(folder: Path, prefix: Path, keys: Sequence[str], *, quarantined: int) -> None:
    """Give the whole files their final names, in place of what had them."""
    for path in folder.iterdir():
        storage.sync(path)
    (folder / "progress.json").unlink()
    for path in _final_files(prefix, keys):
        path.unlink(missing_ok=True)
    if quarantined:
        os.replace(quarantine_path(folder), set_aside_path(prefix))
    for key in keys:
        rename_store(folder / key, store_prefix(prefix, key))
    storage.sync(folder.parent)


def _identity(files: Sequence[Path], stamps: Sequence[object], job: fields.FieldOptions) -> str:
    """Return a digest of everything that decides what is written."""
    known = json.dumps([_VERSION, [str(path.resolve()) for path in files], stamps])
    # Some encoders are objects of other libraries, which only pickle knows to write down; nothing is ever read back.
    return hashlib.sha256(known.encode() + pickle.dumps(job)).hexdigest()
