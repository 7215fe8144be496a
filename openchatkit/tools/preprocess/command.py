"""Files of records -> token stores that GPT-NeoX reads: the command `tools/preprocess_data.py`, with GPT-NeoX's flags.

`<prefix>_<key>_document.bin` and `.idx` for each field, byte for byte as GPT-NeoX writes them, and a loss mask beside
them with `--loss-mask`. They are built in a hidden folder beside them (`work_folder`), in which the same command
continues after it was stopped. `fields` makes documents of rows.
"""

import contextlib
import importlib.util
import time
from collections.abc import Generator, Iterator, Sequence
from itertools import repeat
from pathlib import Path

from loguru import logger

from openchatkit import cli, progress
from openchatkit.data.options import BAD_ROWS
from openchatkit.data.records.raw_row import Mark, RawRow
from openchatkit.data.records.reader import ENDINGS, Records, is_readable
from openchatkit.data.records.reader import files as record_files
from openchatkit.data.stores import workers
from openchatkit.data.stores.builder import Progress
from openchatkit.data.stores.pace import Pace
from openchatkit.data.stores.tokenise import in_batches
from openchatkit.errors import UserError
from openchatkit.formats import chat, neox_tokenizers
from openchatkit.tools.preprocess import fields
from openchatkit.tools.preprocess.archives import ARCHIVE_SUFFIXES, Archive
from openchatkit.tools.preprocess.work_folder import set_aside_path, store_prefix, unfinished_stores

NamedRow = tuple[str, RawRow]  # a row with the name of its file

PACE = Pace()


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Tokenise, and log what was written."""
    args = _parser().parse_args(argv)
    if args.dataset_impl != "mmap":
        raise UserError(f"--dataset-impl {args.dataset_impl}: only mmap is written, which GPT-NeoX reads as it is")
    if args.ftfy and importlib.util.find_spec("ftfy") is None:
        raise UserError("--ftfy needs a package: pip install ftfy")
    files = input_files(args.input)
    encoder = neox_tokenizers.load(args.tokenizer_type, args.vocab_file, args.merge_file)
    if args.append_eod and encoder.end_of_text is None:
        raise UserError(f"--append-eod: {args.vocab_file} has no {neox_tokenizers.END_OF_TEXT} token")
    if args.loss_mask and not args.append_eod:
        logger.warning("--loss-mask without --append-eod: no model trained on this learns to end its last reply")
    keys = tuple(dict.fromkeys(args.jsonl_keys))
    if unfit := [key for key in keys if not key or "/" in key]:
        raise UserError(f"--jsonl-keys {unfit[0]!r}: a file is named after it: expected a name without a '/'")
    job = fields.FieldOptions(encoder, keys, append_eod=args.append_eod, ftfy=args.ftfy, chats=args.loss_mask)
    preprocess(
        files,
        args.output_prefix,
        job,
        processes=args.workers,
        bad_rows=args.bad_rows,
        overwrite=args.overwrite,
        expected=args.num_docs,
        interval=args.log_interval,
        pace=PACE,
    )


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="tools/preprocess_data.py",
        description="Tokenise records into .bin and .idx files, as GPT-NeoX reads them.",
    )
    group = parser.add_argument_group("input")
    endings = ", ".join((ENDINGS, *ARCHIVE_SUFFIXES))
    group.add_argument("--input", required=True, help=f"files of records, separated by commas: {endings}")
    group.add_argument(
        "--jsonl-keys", "--json-keys", nargs="+", default=["text"], help="fields, each a store of its own"
    )
    group.add_argument("--num-docs", type=cli.positive_int, help="how many documents there are, for the progress bar")
    group.add_argument("--bad-rows", choices=BAD_ROWS, default="error", help="stop at an unusable row, or set it aside")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", required=True, choices=list(neox_tokenizers.KINDS))
    wanted = "; ".join(f"{kind}: {what}" for kind, (_, what) in neox_tokenizers.KINDS.items() if what)
    group.add_argument("--vocab-file", "--vocab", type=Path, help=wanted)
    group.add_argument("--merge-file", type=Path, help="GPT2BPETokenizer: its merges.txt")
    group.add_argument("--append-eod", action="store_true", help="close each document with end-of-text")
    group.add_argument("--ftfy", action="store_true", help="mend texts with ftfy")
    group.add_argument("--loss-mask", action="store_true", help="fields are chats: cut them at roles, and write a mask")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", type=Path, required=True, help="what the files' names begin with")
    group.add_argument("--dataset-impl", choices=["lazy", "cached", "mmap"], default="mmap", help="mmap alone")
    group.add_argument("--overwrite", action="store_true", help="replace stores that are there")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=cli.positive_int, default=workers.cores(), help="processes")
    group.add_argument("--log-interval", type=cli.positive_int, default=100, help="documents between looks at the rate")
    return parser


def input_files(names: str) -> list[Path]:
    """Return the files that --input lists, in order; UserError for one that is missing or of another kind."""
    files = [Path(name.strip()) for name in names.split(",") if name.strip()]
    if not files:
        raise UserError("--input names no file")
    for path in files:
        try:
            path.stat()
        except FileNotFoundError as error:
            raise UserError(f"--input {path}: there is no such file") from error
        except OSError as error:
            raise UserError(f"--input {path} cannot be read: {error.strerror or error}") from error
        if not path.is_dir() and not is_readable(path.name) and not path.name.endswith(ARCHIVE_SUFFIXES):
            endings = ", ".join((ENDINGS, *ARCHIVE_SUFFIXES))
            raise UserError(f"--input {path}: expected a name that ends in {endings}")
    return files


def preprocess(
    files: Sequence[Path],
    prefix: Path,
    job: fields.FieldOptions,
    *,
    processes: int = 1,
    bad_rows: str = "error",
    overwrite: bool = False,
    expected: int | None = None,
    interval: int = 100,
    pace: Pace,
) -> None:
    """Write `<prefix>_<key>_document` for each key of the job, and log what they hold.

    UserError: outputs that exist already, rows that cannot be used, damaged data, a full disk. Interrupted: a worker
    was killed.
    """
    source = InputRows(files, job.keys)
    title = f"tokenising {files[0].name if len(files) == 1 else f'{len(files)} files'}"
    try:
        with unfinished_stores(
            prefix, job, files=files, title=title, bad_rows=bad_rows, overwrite=overwrite, pace=pace
        ) as stores:
            done = stores.input.rows
            with (
                contextlib.closing(_tokenise(source, done, job, processes, pace)) as parts,
                progress.bar(expected, title, unit="docs", initial=done, miniters=interval) as bar,
            ):
                began = time.monotonic()
                for batch, part in parts:
                    bad = [(batch[place][0], batch[place][1].number, reason) for place, reason in part.bad]
                    done += len(batch)
                    stores.add(len(batch), part.documents, bad, mark=Mark(done))
                    bar.set_postfix_str(source.rate(time.monotonic() - began), refresh=False)
                    bar.update(len(batch))
                    if stores.is_save_due():
                        stores.save()
            if empty := next((key for key in job.keys if not stores.progress[key].documents), None):
                raise UserError(f"--jsonl-keys {empty}: none of {done:,} rows has a text there")
    except OSError as error:
        raise UserError(
            f"{error.filename or prefix.parent}: {error.strerror or error}: make room or choose another "
            "--output-prefix, and run the same command again"
        ) from error
    _report(stores.progress, job, prefix)


def _tokenise(
    source: "InputRows", start: int, job: fields.FieldOptions, processes: int, pace: Pace
) -> Generator[tuple[list[NamedRow], fields.TokenisedFields], None, None]:
    """Yield what the rows after the first `start` ones become, batch by batch."""
    rows = in_batches(source.rows(start), lambda named: len(named[1].data), pace.batch_bytes)
    batches = ((batch, [row.data for _, row in batch]) for batch in rows)
    processes = processes if processes > 1 and source.size > pace.alone_bytes else 0
    with contextlib.closing(
        workers.in_order(
            batches,
            processes=processes,
            make=fields.worker,
            arguments=(job,),
            here=lambda data: fields.encode(data, job),
        )
    ) as parts:
        for batch, part in parts:
            bad = [(place, batch[place][1].error or reason) for place, reason in part.bad]
            yield batch, part._replace(bad=bad)


class InputRows:
    """The rows of some files, one file after another, each with the name of its file; and how fast they are read."""

    def __init__(self, files: Sequence[Path], keys: Sequence[str]) -> None:
        self._files, self._keys = files, keys
        self._sizes = [_size(path) for path in files]
        self.size = sum(self._sizes)
        self._read = 0
        self._text = 0

    def rows(self, start: int) -> Iterator[NamedRow]:
        """Yield the rows after the first `start` ones."""
        number, before = 0, 0
        for path, size in zip(self._files, self._sizes, strict=True):
            is_archive = path.name.endswith(ARCHIVE_SUFFIXES)
            records: Archive | Records = Archive(path) if is_archive else Records(path, columns=self._keys)
            with records:
                rows = records.rows() if isinstance(records, Archive) else zip(repeat(str(path)), records.rows())
                for name, row in rows:
                    number += 1
                    if number > start:
                        self._read = before + records.position
                        self._text += len(row.data)
                        yield name, row
            before += size

    def rate(self, seconds: float) -> str:
        """Return how much of the input has been read, and how many bytes of records a second."""
        return f"{self._read / max(self.size, 1):.0%} of the input, {self._text / 1e6 / max(seconds, 1e-9):.1f} MB/s"


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in record_files(path))


def _report(stores: Progress, job: fields.FieldOptions, prefix: Path) -> None:
    for key, held in stores.items():
        trained = f", {held.trained_tokens:,} of them trained on" if job.chats else ""
        empty = held.rows - held.quarantined - held.documents
        texts = f"; {empty:,} empty texts are no documents" if empty else ""
        logger.info(
            f"{store_prefix(prefix, key)}: {held.documents:,} documents, {held.tokens:,} tokens{trained}{texts}"
        )
        if job.chats and not held.trained_tokens:
            logger.warning(f"no text under {key!r} has a line that begins with {chat.BOT}: there is no mask")
    if held.quarantined:
        logger.warning(f"{held.quarantined:,} of {held.rows:,} rows set aside, listed in {set_aside_path(prefix)}")
