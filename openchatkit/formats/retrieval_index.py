"""The folder of a retrieval index: its files' names, and the manifest that alone says which of them belong to it.

An index is rewritten whole, as a snapshot: files are named `<role>-<snapshot>.<ending>` and never change once the
manifest names them. The manifest is replaced last; until then the folder holds the previous snapshot, and processes
that have that one open keep it. Files that the manifest does not name were left by a kill.

    table.arrow       the passages, one a row: see `retrieval.table`
    vectors.npy       float16 [rows, dimension], in the order of the table
    dense.faiss       the same vectors, for searching
    scores.npy        float32 [entries]: BM25 scores, of one word after another
    postings.npy      int32 [entries]: the rows of these scores, ascending for each word
    starts.npy        int64 [words + 1]: where each word's entries begin
    words.arrow       the words, sorted, each with its highest score and its weight
    sources.jsonl     what the passages were read from: a `SourceRecord` a line
    skipped.jsonl     sources that could not be read: {"source", "reason"} a line

The vectors' files and dense.faiss are missing where there is no encoder. scores, postings and starts are the arrays
that bm25s keeps. The manifest is that of `formats.manifest`; its facts are an `IndexRecord`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from openchatkit import jsonl, storage
from openchatkit.errors import UserError
from openchatkit.formats import manifest
from openchatkit.formats.manifest import DamagedError, FileRecord

_T = TypeVar("_T")

FORMAT = "openchatkit retrieval index"
VERSION = 3  # rises too when `retrieval.tokenization` changes its result
MANIFEST = manifest.MANIFEST
ROLES = {
    "table": ".arrow",
    "vectors": ".npy",
    "dense": ".faiss",
    "scores": ".npy",
    "postings": ".npy",
    "starts": ".npy",
    "words": ".arrow",
    "sources": ".jsonl",
    "skipped": ".jsonl",
}
_KEYS = {"snapshot": "generation", "score_threshold": "floor"}  # of the manifest, where a field has another name
_TEMPORARY = "spill"  # name of a file while a snapshot is written
_PARTIAL = ".openchatkit-partial"  # a name that no other program has
_OURS = re.compile(
    rf"({'|'.join([*ROLES, _TEMPORARY])})-\d{{6,}}\.(arrow|npy|faiss|jsonl|bin)|\.{re.escape(MANIFEST)}\..*\.tmp"
)


@dataclass(frozen=True)
class EncoderRecord:
    """The encoder of the vectors; `digest` is of its weights and tokenizer, `metric` is "cosine" or "dot"."""

    name: str
    digest: str
    dimension: int
    metric: str
    max_tokens: int
    pooling: str = ""


@dataclass(frozen=True)
class DenseRecord:
    """How vectors are searched.

    `type` is faiss's. `probes` of `lists` are searched (0: all rows are); `candidates` for each wanted row are scored
    again by the stored vectors; `recall` is the recall@10 measured with these.
    """

    type: str
    lists: int = 0
    probes: int = 0
    candidates: int = 1
    recall: float = 1.0


@dataclass(frozen=True)
class SparseRecord:
    """Settings and counts of BM25."""

    k1: float
    b: float
    words: int
    entries: int
    mean_words: float


@dataclass(frozen=True)
class ScoreThreshold:
    """The least scores of a passage that is found: see `retrieval.ranking`."""

    cosine: float
    weak_cosine: float
    strength: float
    strength_alone: float


@dataclass(frozen=True)
class SourceRecord:
    """A file or address, the SHA-256 of its bytes, its `rows` rows from `first` on, and its `storage.stamp`.

    `changed_ns` is 0 where it is not reliable, and in indices made before it was stored.
    """

    source: str
    digest: str
    size: int
    mtime_ns: int
    first: int
    rows: int
    changed_ns: int = 0
    inode: int = 0

    @property
    def stamp(self) -> storage.Stamp:
        return [self.size, self.mtime_ns, self.changed_ns, self.inode]


@dataclass(frozen=True)
class Skipped:
    """A source that gave no passage, and why."""

    source: str
    reason: str


@dataclass(frozen=True)
class IndexRecord:
    """The facts of the manifest; `time_stamps` are of its files by name, in nanoseconds."""

    snapshot: int
    rows: int
    sources: int
    skipped: int
    encoder: EncoderRecord | None
    dense: DenseRecord | None
    sparse: SparseRecord
    score_threshold: ScoreThreshold
    chunking: dict[str, Any] = field(default_factory=dict)
    time_stamps: dict[str, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """Return the record under the keys that the manifest has."""
        return {_KEYS.get(name, name): value for name, value in asdict(self).items()}


def file_name(role: str, snapshot: int) -> str:
    """Return the name of a file of a snapshot."""
    return f"{role}-{snapshot:06d}{ROLES[role]}"


def temporary_path(folder: Path, snapshot: int) -> Path:
    """Return the path of the temporary file of words, used while a snapshot is written."""
    return folder / f"{_TEMPORARY}-{snapshot:06d}.bin"


def partial_folder(folder: Path) -> Path:
    """Return the folder for embedded vectors until a snapshot contains them; never a stale file."""
    return folder / _PARTIAL


def exists(folder: Path) -> bool:
    """Whether there is an index, intact or not."""
    return (folder / MANIFEST).is_file()


def stamp(folder: Path) -> object:
    """Return a value that changes with the manifest and is cheap to read; None if there is no manifest."""
    try:
        return storage.stamp(folder / MANIFEST)
    except OSError:
        return None


def lock_path(folder: Path) -> Path:
    """Return the file that a writer locks: the same for every path, link or relative, to the folder."""
    return storage.lock_path(Path(folder).resolve())


def check_own(folder: Path) -> None:
    """Raise UserError if a new index would replace something else: another kind of folder, an index of another version,
    or other files in a folder without an index."""
    try:
        about = json.loads((folder / MANIFEST).read_bytes())["about"]
        kind, version = about.get("format"), about.get("version")
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        kind = version = None
    if kind == FORMAT and version == VERSION:
        return
    if kind == FORMAT:
        raise UserError(
            f"{folder} is a retrieval index of version {version}, of another OpenChatKit: remove it first, so that it "
            f"is built again as version {VERSION}"
        )
    entries = sorted(path.name for path in folder.glob("*") if not path.name.startswith("."))
    ours = [name for name in entries if _OURS.fullmatch(name)]
    others = [name for name in entries if name not in ours and not (name == MANIFEST and ours)]
    if others:
        raise UserError(
            f"{folder} is not an index and holds other files, such as {others[0]}: pass --index a new folder"
        )


def write(folder: Path, record: IndexRecord, files: Iterable[FileRecord]) -> IndexRecord:
    """Write the manifest, with the files' current time stamps: from here on the folder holds this snapshot."""
    files = list(files)
    stamps = {file.name: (folder / file.name).stat().st_mtime_ns for file in files}
    record = dataclasses.replace(record, time_stamps=stamps)
    manifest.write(folder, files, about={"format": FORMAT, "version": VERSION, **record.facts()})
    return record


def read(folder: Path) -> tuple[IndexRecord, dict[str, FileRecord]]:
    """Return the record of an index, and its files by name; DamagedError: missing or not readable."""
    about, files = _facts(folder)
    if about.pop("format", None) != FORMAT:
        raise DamagedError(f"{folder / MANIFEST} is of another kind of folder: expected a retrieval index")
    if (version := about.pop("version", None)) != VERSION:
        raise DamagedError(
            f"{folder} is a retrieval index of version {version}: this program reads version {VERSION}; remove it and "
            "build it again"
        )
    try:
        record = _record(about)
    except (TypeError, KeyError, ValueError) as error:
        raise DamagedError(f"{folder / MANIFEST} is damaged: {error}") from error
    # The names follow from the snapshot, so that no manifest points out of its folder.
    expected = {file_name(role, record.snapshot) for role in roles(record)}
    if set(files) != expected or set(record.time_stamps) != expected:
        names = ", ".join(sorted(expected ^ set(files) | expected ^ set(record.time_stamps)))
        raise DamagedError(f"{folder / MANIFEST} is damaged: it should name one file for each part, but for {names}")
    return record, files


def roles(record: IndexRecord) -> list[str]:
    """Return the roles that an index has files for."""
    return [role for role in ROLES if record.encoder is not None or role not in ("vectors", "dense")]


def check_files(folder: Path, record: IndexRecord, files: dict[str, FileRecord]) -> None:
    """Raise DamagedError for the first file that is missing or differs in size or time stamp from the manifest."""
    try:
        manifest.check_sizes(folder, manifest.Manifest(files, {}))
    except DamagedError as error:
        raise DamagedError(f"{error}; build the index again, or copy it again from where it is whole") from error
    for name, stamp in record.time_stamps.items():
        if (folder / name).stat().st_mtime_ns != stamp:
            raise DamagedError(
                f"{folder / name} was written to or copied since the index was made, by its time stamp: "
                "`python retrieval/build_index.py info --verify` hashes all files and, if they are whole, takes the "
                "new time stamps"
            )


def write_lines(path: Path, records: Iterable[Any]) -> int:
    """Write dataclasses as JSON, one a line; return their number."""
    lines = [json.dumps(asdict(record)) + "\n" for record in records]
    storage.write_text(path, "".join(lines))
    return len(lines)


def read_sources(folder: Path, record: IndexRecord) -> list[SourceRecord]:
    """Return the sources of the passages."""
    return _lines(folder / file_name("sources", record.snapshot), SourceRecord)


def read_skipped(folder: Path, record: IndexRecord) -> list[Skipped]:
    """Return the sources that could not be read."""
    return _lines(folder / file_name("skipped", record.snapshot), Skipped)


def stale_files(folder: Path) -> list[Path]:
    """Return files of this format that the manifest does not name: of a killed writer, or of the previous snapshot."""
    try:
        names = set(read(folder)[1])
    except DamagedError:
        if exists(folder):
            return []  # files of a damaged manifest may still be wanted
        names = set()
    return [path for path in sorted(folder.glob("*")) if _OURS.fullmatch(path.name) and path.name not in names]


def _facts(folder: Path) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    if not exists(folder):
        found = f"{folder} has no {MANIFEST}" if folder.is_dir() else f"{folder} is not a folder"
        raise DamagedError(f"{found}: expected a retrieval index, as retrieval/build_index.py makes")
    read = manifest.read(folder)
    return dict(read.about), read.files


def _record(about: dict[str, Any]) -> IndexRecord:
    names = {key: name for name, key in _KEYS.items()}
    values = {names.get(key, key): value for key, value in about.items()}
    nested = {"encoder": EncoderRecord, "dense": DenseRecord, "sparse": SparseRecord, "score_threshold": ScoreThreshold}
    parts = {name: kind(**values[name]) if values[name] is not None else None for name, kind in nested.items()}
    record = IndexRecord(**{**values, **parts})
    if record.sparse is None or record.score_threshold is None or (record.encoder is None) != (record.dense is None):
        raise ValueError("a part of the record is missing")
    return record


def _lines(path: Path, make: Callable[..., _T]) -> list[_T]:
    def refuse(number: int, error: Exception) -> NoReturn:
        raise DamagedError(f"{path}:{number} is damaged: {error}") from error

    try:
        return list(jsonl.read(path, lambda row: make(**row), refuse))
    except OSError as error:
        raise DamagedError(
            f"{path} cannot be read: {error.strerror}; if the index was being written to, run again"
        ) from error
