"""The folder of the Wikipedia index: names of files, their SHA-256, and the manifest that vouches for them.

    knn.index                         faiss's, as published: row n is the vector of snippet n
    wikipedia-en-sentences.parquet    the snippets, as published; not needed once they are converted
    wikipedia-en-sentences.arrow      the snippets, as `retrieval.wikipedia.table` writes them
    manifest.json                     sizes and SHA-256 of knn.index and of the Arrow file, their time stamps, the rows

The manifest is that of `formats.manifest` and is written last.
"""

from dataclasses import dataclass
from pathlib import Path

from openchatkit.formats import manifest
from openchatkit.formats.manifest import DamagedError, FileRecord
from openchatkit.paths import ROOT

REPOSITORY = "ChristophSchuhmann/wikipedia-3sentence-level-retrieval-index"
SCRIPT = "data/wikipedia-3sentence-level-retrieval-index/prepare.py"
FOLDER = (ROOT / SCRIPT).parent / "files"
INDEX, PUBLISHED, TABLE = "knn.index", "wikipedia-en-sentences.parquet", "wikipedia-en-sentences.arrow"
# From the hub, for the files of 2023; there was no later commit.
DIGESTS = {
    INDEX: "71b4bd2db7b48b80af3dd34c0cd511779da48a4f6af7deedd924594bd1acf218",
    PUBLISHED: "506a18aa48e928f3d47d76a948943ef72ca804d7f8d5817fd0b224b81d849ba5",
}
_FORMAT = "openchatkit Wikipedia index"
_ADVICE = f"python {SCRIPT} checks every file and rebuilds what is damaged"


@dataclass(frozen=True)
class WikipediaRecord:
    """The number of rows of both files, and the columns of the published table that separate articles."""

    rows: int
    articles_by: tuple[str, ...]


def write(folder: Path, record: WikipediaRecord, files: list[FileRecord]) -> None:
    """Write the manifest, with the files' current time stamps."""
    about = {"format": _FORMAT, "rows": record.rows, "articles_by": list(record.articles_by)}
    about["time_stamps"] = _stamps(folder)
    manifest.write(folder, files, about=about)


def check(folder: Path) -> WikipediaRecord:
    """Return the record of the manifest; DamagedError: it or a file is missing, or a size or time stamp differs."""
    record, read = _read(folder)
    with manifest.advise(_ADVICE):
        manifest.check_sizes(folder, read)
    if changed := [name for name, stamp in _stamps(folder).items() if read.about["time_stamps"].get(name) != stamp]:
        raise DamagedError(
            f"{folder / min(changed)} was written to or copied since it was checked, by its time stamp: python "
            f"{SCRIPT} --verify --dest {folder} hashes both files and, if they are whole, takes the new time stamps"
        )
    return record


def is_one(folder: Path) -> bool:
    """Whether the manifest of a folder is that of a Wikipedia index."""
    try:
        return manifest.read(folder).about.get("format") == _FORMAT
    except DamagedError:
        return False


def verify(folder: Path) -> None:
    """Hash both files; DamagedError names the one that has changed.

    If both are intact and only time stamps differ, as after copying, the manifest is given the current ones.
    """
    record, read = _read(folder)
    with manifest.advise(_ADVICE):
        manifest.verify(folder, manifest=read)
    if read.about["time_stamps"] != _stamps(folder):
        write(folder, record, list(read.files.values()))


def table_record(folder: Path) -> tuple[WikipediaRecord, FileRecord] | None:
    """Return the manifest's record of the converted table, even if files changed since; None without a manifest."""
    try:
        record, read = _read(folder)
    except DamagedError:
        return None
    return record, read.files[TABLE]


def stale_files(folder: Path) -> list[Path]:
    """Return the unfinished files of a killed run, up to a whole table."""
    return [path for name in (TABLE, manifest.MANIFEST) for path in folder.glob(f".{name}.*.tmp")]


def _read(folder: Path) -> tuple[WikipediaRecord, manifest.Manifest]:
    if not (folder / manifest.MANIFEST).is_file():
        raise DamagedError(f"{folder} holds no Wikipedia index: python {SCRIPT} makes it (14 GB to fetch)")
    with manifest.advise(_ADVICE):
        read = manifest.read(folder)
        about = read.about
        if about.get("format") != _FORMAT or set(read.files) != {INDEX, TABLE}:
            raise DamagedError(f"{folder / manifest.MANIFEST} is of another kind of folder")
        rows, columns, stamps = (about.get(name) for name in ("rows", "articles_by", "time_stamps"))
        if not (isinstance(rows, int) and isinstance(columns, list) and isinstance(stamps, dict)):
            raise DamagedError(f"{folder / manifest.MANIFEST} is damaged: rows, articles_by or time_stamps are missing")
    return WikipediaRecord(rows, tuple(columns)), read


def _stamps(folder: Path) -> dict[str, int]:
    return {name: (folder / name).stat().st_mtime_ns for name in (INDEX, TABLE)}
