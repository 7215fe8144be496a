"""Writer of a prepared model, which resumes after a kill at any time."""

import contextlib
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from openchatkit.formats import manifest
from openchatkit.formats.layer_shards import CONFIG, JOURNAL, shard_file
from openchatkit.formats.manifest import MANIFEST, DamagedError, FileRecord
from openchatkit.formats.tensor_file import TensorSpec, tensor_bytes, write_stream
from openchatkit.formats.tokenizer_files import TOKENIZER_FILES, copy_tokenizer, tokenizer_digests
from openchatkit.models.config import ModelConfig
from openchatkit.models.shards import shard_names
from openchatkit.storage import atomic_path, storage_errors

_SHARD_FILE = re.compile(r"(embed|head|layer_\d{5})\.safetensors")


def may_write(folder: Path) -> bool:
    """Return whether a folder is missing, empty, or of a prepared model alone, so that another may take its place."""
    names = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    known = {CONFIG, JOURNAL, MANIFEST, *TOKENIZER_FILES}
    others = {name for name in names - known if not _SHARD_FILE.fullmatch(name) and not name.endswith(".tmp")}
    return not others and (folder.is_dir() or not folder.exists())


class ShardWriter:
    """Writes a folder's shards, in any order and from any thread, then its manifest.

    The folder must exist and have no other writer. `source` is the folder of config.json and the tokenizer.

    `about` says what the shards are made of; shards that an earlier run made of the same are kept where their bytes
    are unchanged. `done` names those shards; `complete` says that nothing is left to do: no shard is missing, and the
    tokenizer has not changed.
    """

    def __init__(self, folder: Path, config: ModelConfig, *, source: Path, about: Mapping[str, Any]) -> None:
        self.folder, self.about, self._source = folder, dict(about), source
        self._tokenizer = tokenizer_digests(source)
        self._shards = shard_names(config.num_layers)
        self._bookkeeping = threading.Lock()
        with storage_errors(folder):
            for left in folder.glob(".*.tmp"):
                left.unlink()
            self._records = self._earlier()
            self.done = {shard for shard in self._shards if shard_file(shard) in self._records}
            self.complete = not (folder / JOURNAL).exists() and self._is_complete()
            if not self.complete:
                self._write_journal()
                (folder / MANIFEST).unlink(missing_ok=True)

    def write(self, shard: str, specs: Mapping[str, TensorSpec], chunks: Callable[[str], Iterable[memoryview]]) -> None:
        """Write one shard from `chunks(name)`; see `tensor_file.write_stream`."""
        record = write_stream(self.folder / shard_file(shard), specs, chunks)
        with self._bookkeeping:
            self._records[record.name] = record
            self.done.add(shard)
            self._write_journal()

    def write_tensors(self, shard: str, tensors: Mapping[str, Tensor]) -> None:
        """Write one shard from tensors in memory."""
        specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        self.write(shard, specs, lambda name: [tensor_bytes(tensors[name])])

    def finish(self) -> None:
        """Copy config.json and the tokenizer from the source, and make the folder whole."""
        assert self.done == set(self._shards), (self.done, self._shards)
        with storage_errors(self.folder):
            with atomic_path(self.folder / CONFIG) as temporary:
                shutil.copyfile(self._source / CONFIG, temporary)
            shards = list(map(shard_file, self._shards))
            small = [CONFIG, *copy_tokenizer(self._source, self.folder)]
            records = [self._records[name] for name in shards] + [manifest.record(self.folder / name) for name in small]
            for entry in self.folder.iterdir():
                if _SHARD_FILE.fullmatch(entry.name) and entry.name not in shards:
                    entry.unlink()  # of a deeper model that was here before
            manifest.write(self.folder, records, about=self.about)
            (self.folder / JOURNAL).unlink(missing_ok=True)

    def _earlier(self) -> dict[str, FileRecord]:
        """Return the records of files that an earlier run wrote of the same source, and that are unchanged since."""
        for name in (JOURNAL, MANIFEST):
            with contextlib.suppress(DamagedError):
                earlier = manifest.read(self.folder, name=name)
                return self._intact(earlier) if earlier.about == self.about else {}
        return {}

    def _intact(self, earlier: manifest.Manifest) -> dict[str, FileRecord]:
        intact = {}
        for name, record in earlier.files.items():
            with contextlib.suppress(DamagedError):
                manifest.verify(self.folder, [name], manifest=earlier)
                intact[name] = record
        return intact

    def _is_complete(self) -> bool:
        with contextlib.suppress(DamagedError):
            written = manifest.read(self.folder).files
            tokenizer = {name: written[name].sha256 for name in TOKENIZER_FILES if name in written}
            whole = written.keys() == self._records.keys() and len(self.done) == len(self._shards)
            return whole and tokenizer == self._tokenizer
        return False

    def _write_journal(self) -> None:
        manifest.write(self.folder, self._records.values(), about=self.about, name=JOURNAL)
