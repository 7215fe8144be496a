"""The command `data/wikipedia-3sentence-level-retrieval-index/prepare.py`: fetch, check, convert, write the manifest.

Each step puts a file under its name only when it is complete, and a second run does the missing steps. The manifest is
written last; `retrieval.wikipedia.index` trusts it.
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from loguru import logger

from openchatkit import cli
from openchatkit.download.digests import SHA256, Digest
from openchatkit.download.sidecar import read_sidecar
from openchatkit.download.sources import fetch, fetch_dataset
from openchatkit.errors import UserError
from openchatkit.formats import wikipedia_index as layout
from openchatkit.formats.manifest import DamagedError, FileRecord
from openchatkit.storage import hold_lock, sha256, storage_errors


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Fetch and convert the files, or with --verify hash them."""
    parser = cli.Parser(
        prog=layout.SCRIPT,
        description="Fetch Wikipedia's index (7.1 GB) and its snippets (6.9 GB) and make of the snippets a file that "
        "is opened in a moment. Both are held against the SHA-256 that this kit knows. What is there already is not "
        "fetched again, and a download that was cut short goes on where it stopped.",
    )
    parser.add_argument(
        "--source",
        default=layout.REPOSITORY,
        metavar="SOURCE",
        help="a data set of the hub, or a folder, https://host/folder or s3://bucket/folder with the two files",
    )
    parser.add_argument("--dest", type=Path, default=layout.FOLDER, metavar="FOLDER", help="where to put it")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="only hash what is there and compare; of files that were copied, the new time stamps are taken",
    )
    args = parser.parse_args(argv)
    folder = args.dest.expanduser()
    if args.verify:
        layout.verify(folder)
        logger.info(f"{folder} is whole")
        return
    prepare(folder, source=args.source)
    named = "" if folder.absolute() == layout.FOLDER else f" {shlex.quote(str(folder))}"
    logger.info(f"the Wikipedia index is ready: python inference/bot.py --retrieval{named}")


def prepare(
    folder: Path, *, source: str = layout.REPOSITORY, digests: Mapping[str, str] = layout.DIGESTS
) -> layout.WikipediaRecord:
    """Make the Wikipedia index in a folder; `digests` are the SHA-256 of the two published files.

    UserError, Interrupted: as `download` raises them; a file differs from the published one; numbers of rows differ.
    """
    try:
        return layout.check(folder)
    except DamagedError:
        pass
    with (
        storage_errors(folder, "it goes on from there", every=True),
        hold_lock(folder / ".lock", f"{folder} is being prepared by another process: waiting for it"),
    ):
        for path in layout.stale_files(folder):
            path.unlink()
        index = _fetch(layout.INDEX, folder, source, digests)
        record, table = _convert(folder, source, digests)
        _check_rows(index, record)
        layout.write(folder, record, [FileRecord(index.name, index.stat().st_size, digests[index.name]), table])
    return layout.check(folder)


def _fetch(name: str, folder: Path, source: str, digests: Mapping[str, str]) -> Path:
    """Fetch one of the published files and check its digest."""
    address = f"{source.rstrip('/')}/{name}"
    if _is_repository(source):
        (path,) = fetch_dataset(source, [name], folder)
    else:
        path = fetch(address, folder, sha256=digests[name])
    expected, note = Digest(SHA256, digests[name]), read_sidecar(path)
    # A file fetched by this digest was compared on the way; a copy, or another commit of the hub, was not.
    if note is None or note.version != str(expected):
        logger.info(f"hashing {path}")
        if (found := sha256(path)) != expected.value:
            raise UserError(
                f"{path} is not the file that was published: its SHA-256 is {found[:16]}..., expected "
                f"{expected.value[:16]}...; remove it and run this again, or pass another --source"
            )
    return path


def _is_repository(source: str) -> bool:
    return source.count("/") == 1 and not source.startswith((".", "~", "/")) and not Path(source).exists()


def _convert(folder: Path, source: str, digests: Mapping[str, str]) -> tuple[layout.WikipediaRecord, FileRecord]:
    """Convert the table to Arrow, unless an intact one exists."""
    from openchatkit.retrieval.wikipedia.table import convert

    path = folder / layout.TABLE
    before = layout.table_record(folder)
    if before and path.is_file() and path.stat().st_size == before[1].size:
        logger.info(f"hashing {path}")
        if sha256(path) == before[1].sha256:
            return before
    rows, keys = convert(_fetch(layout.PUBLISHED, folder, source, digests), path)
    logger.info(f"hashing {path}")
    return layout.WikipediaRecord(rows, keys), FileRecord(path.name, path.stat().st_size, sha256(path))


def _check_rows(index: Path, record: layout.WikipediaRecord) -> None:
    from openchatkit.retrieval.wikipedia.index import open_index

    rows = open_index(index).ntotal
    if rows != record.rows:
        raise UserError(
            f"{index} has {rows:,} rows, {layout.PUBLISHED} {record.rows:,}: they do not belong together; remove both "
            "and run this again"
        )
