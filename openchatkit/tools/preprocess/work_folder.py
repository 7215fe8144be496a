"""Token stores being written together: where the work goes on, how far it has come, and how the files get their names.

All files lie in one hidden folder until they are whole. Every so often they are forced to disk and the folder's
`progress.json` says how far they reach; the next run with the same input and options drops what lies behind that and
goes on. Final names are given at the end, the index's last, so that no store opens whose other files are not there.
"""

import contextlib
import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO

from loguru import logger

from openchatkit import storage
from openchatkit.data.records import reader
from openchatkit.data.stores.build import BadRowsError
from openchatkit.errors import Interrupted, UserError
from openchatkit.formats.token_store import (
    StoreProgress,
    TokenStoreWriter,
    bin_path,
    idx_path,
    mask_path,
    quarantine_path,
)
from openchatkit.tools.preprocess import fields

_VERSION = 2  # raise it when the same input would give other files
_SAVE_SECONDS = 30.0


def store_prefix(prefix: Path, key: str) -> Path:
    """The store of one field, as GPT-NeoX names it."""
    return prefix.with_name(f"{prefix.name}_{key}_document")


def set_aside_path(prefix: Path) -> Path:
    """The rows that were set aside, {"file", "line", "reason"} each; absent when none."""
    return prefix.with_name(f"{prefix.name}_{quarantine_path(prefix).name}")


@dataclass
class Done:
    """What the files hold: rows taken in, those set aside, empty fields, and each key's documents and tokens."""

    identity: str
    rows: int = 0
    quarantined: int = 0
    quarantine_size: int = 0
    empty: dict[str, int] = field(default_factory=dict)
    stores: dict[str, StoreProgress] = field(default_factory=dict)


class WorkFolder:
    """A context manager: the open files of one job, its `done`, and `publish`, which gives them their names.

    UserError: a final name that is taken, where `overwrite` does not allow it; another process that does the same.
    """

    def __init__(
        self, prefix: Path, job: fields.FieldOptions, *, files: Sequence[Path], bad_rows: str, overwrite: bool
    ) -> None:
        self._prefix = prefix
        self._folder = prefix.with_name(f".{prefix.name}.partial")
        self._job = job
        self._bad_rows = bad_rows
        self._save_at = time.monotonic() + _SAVE_SECONDS
        self._folder.mkdir(parents=True, exist_ok=True)
        lock = storage.try_lock(self._folder / "lock")
        if lock is None:
            raise UserError(f"another process is writing {prefix}: wait for it, or name another --output-prefix")
        self._lock: IO[str] = lock
        taken = [path for path in self._final_files() if path.exists()]
        if taken and not overwrite:
            self._leave(keep=self._note.exists())
            raise UserError(f"{taken[0]} is there already: name another --output-prefix, or pass --overwrite")
        self._files = files
        self._stamps = [reader.stamps(path) for path in files]
        self.done = Done(_identity(files, self._stamps, job))
        try:
            self._open(self._saved())
        except ValueError:  # files that hold less than was noted
            self._open(None)

    def add(self, rows: int, documents: Mapping[str, fields.Documents], bad: Iterable[tuple[str, int, str]]) -> None:
        """Append what so many rows became; `bad` are those set aside, as (file, line, reason)."""
        listed = [json.dumps({"file": file, "line": line, "reason": reason}) + "\n" for file, line, reason in bad]
        lines = "".join(listed).encode()
        self._quarantine.write(lines)
        for key, part in documents.items():
            self._writers[key].add(part.tokens, part.sizes, part.mask if self._job.chats else None)
        # In one step, at the end: Ctrl-C between the lines above leaves files that hold more than this says.
        self.done = Done(
            identity=self.done.identity,
            rows=self.done.rows + rows,
            quarantined=self.done.quarantined + len(listed),
            quarantine_size=self.done.quarantine_size + len(lines),
            empty={key: self.done.empty.get(key, 0) + part.empty for key, part in documents.items()},
            stores={key: _held(writer) for key, writer in self._writers.items()},
        )

    def save_if_due(self) -> None:
        """`save`, from time to time."""
        if time.monotonic() >= self._save_at:
            self.save()

    def save(self) -> None:
        """Force what is there to disk, then note how far it reaches."""
        for writer in self._writers.values():
            writer.sync()
        storage.sync_file(self._quarantine)
        storage.write_text(self._note, json.dumps(asdict(self.done)) + "\n")
        self._save_at = time.monotonic() + _SAVE_SECONDS

    def publish(self) -> None:
        """Give the whole files their final names, in place of what had them. UserError: the input is another by now."""
        if not all(map(reader.unchanged, self._files, self._stamps)):
            raise UserError("the input was changed while it was tokenised: run again when it is complete")
        self.save()  # so that nothing is lost by a stop before the files leave the folder
        self._quarantine.close()
        for writer in self._writers.values():
            writer.close()
        for path in self._folder.iterdir():
            storage.sync(path)
        self._note.unlink()
        for path in self._final_files():
            path.unlink(missing_ok=True)
        if self.done.quarantined:
            os.replace(quarantine_path(self._folder), set_aside_path(self._prefix))
        for key in self._job.keys:
            for place in (bin_path, mask_path, idx_path):
                if (path := place(self._folder / key)).exists():
                    os.replace(path, place(store_prefix(self._prefix, key)))
        storage.sync(self._folder.parent)
        self._leave(keep=False)

    @property
    def _note(self) -> Path:
        return self._folder / "progress.json"

    def _final_files(self) -> list[Path]:
        """Every file that a job like this one leaves; the indices first."""
        prefixes = [store_prefix(self._prefix, key) for key in self._job.keys]
        stores = [place(prefix) for place in (idx_path, bin_path, mask_path) for prefix in prefixes]
        return [*stores, set_aside_path(self._prefix)]

    def _saved(self) -> Done | None:
        """What an earlier run of the same job noted."""
        try:
            done = Done(**json.loads(self._note.read_text(encoding="utf-8")))
            done.stores = {key: StoreProgress(**held) for key, held in done.stores.items()}
        except (FileNotFoundError, ValueError, TypeError):
            return None
        # Where no row may be bad, the first one is to be met again.
        if done.identity != self.done.identity or (done.quarantined and self._bad_rows == "error"):
            return None
        return done

    def _open(self, saved: Done | None) -> None:
        """Open the files at what was saved, or empty. ValueError: they hold less."""
        for path in self._folder.iterdir():
            if saved is None and path.name != "lock":
                path.unlink()
        self._quarantine = open(quarantine_path(self._folder), "ab")  # noqa: SIM115 (closed by `__exit__`)
        size = saved.quarantine_size if saved else 0
        if self._quarantine.tell() < size:
            raise ValueError(f"{quarantine_path(self._folder)} is cut short")
        self._quarantine.truncate(size)
        self._writers = {
            key: TokenStoreWriter(
                self._folder / key,
                vocab_size=self._job.encoder.vocab_size,
                masked=self._job.chats,
                resume=saved.stores[key] if saved else None,
            )
            for key in self._job.keys
        }
        self.done = saved or self.done

    def _leave(self, *, keep: bool) -> None:
        if not keep:
            shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.close()

    def __enter__(self) -> "WorkFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock.closed:
            return
        if isinstance(error, KeyboardInterrupt | Interrupted) and self.done.rows:
            with contextlib.suppress(OSError):
                if not self._quarantine.closed:  # else `publish` has saved all
                    self.save()
                logger.info("stopped behind row {:,}: the same command goes on from there", self.done.rows)
        for writer in self._writers.values():
            writer.__exit__(kind, error, trace)
        with contextlib.suppress(OSError):  # of a full disk, say, which is what the error in flight tells
            self._quarantine.close()
        # Last, since whoever gets the lock may write to the same files.
        other_input = isinstance(error, UserError) and not isinstance(error, Interrupted | BadRowsError)
        self._leave(keep=self._note.exists() and not other_input)


def _identity(files: Sequence[Path], stamps: Sequence[object], job: fields.FieldOptions) -> str:
    """A digest of everything that decides what is written."""
    known = json.dumps([_VERSION, [str(path.resolve()) for path in files], stamps])
    return hashlib.sha256(known.encode() + pickle.dumps(job)).hexdigest()


def _held(writer: TokenStoreWriter) -> StoreProgress:
    return StoreProgress(
        documents=writer.documents,
        tokens=writer.tokens,
        trained_tokens=writer.trained_tokens,
        excluded_tokens=writer.excluded_tokens,
        untrained=writer.untrained,
    )
