"""A cached token store: a folder with one store's files, the record of what they hold, and rows that were set aside.

`store.json`, its record, is written last. Rows that were set aside are in `quarantine.jsonl`. While the store is built,
`progress.json` says how far its files are known to be on disk.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from openchatkit import storage
from openchatkit.errors import UserError
from openchatkit.formats.store_writer import StoreProgress

_FOLDER_PREFIX = "tokens"
_RECORD = "store.json"
_PROGRESS = "progress.json"
_QUARANTINE = "quarantine.jsonl"


def folder_prefix(folder: Path) -> Path:
    """Return the prefix of the store in a cached store's folder."""
    return folder / _FOLDER_PREFIX


def quarantine_path(folder: Path) -> Path:
    """Return the path of the rows set aside, {"file", "line", "reason"} each; there is no file when there are none."""
    return folder / _QUARANTINE


@dataclass(frozen=True)
class StoreRecord:
    """Source and contents of a cached store. Every row of the source is a document or in quarantine.

    Of its mask, `trained_tokens` and `excluded_tokens` count the bytes TRAINED and EXCLUDED; where there are none of
    either, there is no mask. `untrained` counts the documents without a token of the first kind, `spelled` those whose
    text has the end-of-text token in it, as characters.
    """

    source: str
    key: str
    rows: int
    documents: int
    quarantined: int
    tokens: int
    trained_tokens: int
    excluded_tokens: int = 0
    untrained: int = 0
    spelled: int = 0


def write_record(folder: Path, record: StoreRecord) -> None:
    """Write `store.json`: the last file of a cached store."""
    assert record.rows == record.documents + record.quarantined, record
    storage.write_text(folder / _RECORD, json.dumps(asdict(record), indent=1) + "\n")


def read_record(folder: Path) -> StoreRecord | None:
    """Read the record of a cached store; None where there is no such store, UserError where it cannot be read."""
    path = folder / _RECORD
    try:
        return StoreRecord(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): delete {folder} and run again, it is made again") from error


def write_progress(folder: Path, progress: StoreProgress) -> None:
    """Write `progress.json`: the files have been synced up to this point."""
    storage.write_text(folder / _PROGRESS, json.dumps(asdict(progress)) + "\n")


def read_progress(folder: Path) -> StoreProgress | None:
    """Read the progress of an unfinished store; None where it is not known."""
    try:
        return StoreProgress(**json.loads((folder / _PROGRESS).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def remove_progress(folder: Path) -> None:
    """Remove `progress.json`: the store is whole."""
    (folder / _PROGRESS).unlink(missing_ok=True)
