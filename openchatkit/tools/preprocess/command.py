"""Files of records -> token stores that GPT-NeoX reads: the command `tools/preprocess_data.py`, with GPT-NeoX's flags.

`<prefix>_<key>_document.bin` and `.idx` for each field, byte for byte as GPT-NeoX writes them; beside them a loss mask
with `--loss-mask`, or with `--mask-before-token` GPT-NeoX's store of labels. They are built in a hidden folder beside
them (`work_folder`), in which the same command continues after it was stopped. `inputs` reads rows, `fields` makes
documents of them.
"""

import contextlib
import importlib.util
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
from loguru import logger

from openchatkit import cli, progress
from openchatkit.data.options import BAD_ROWS
from openchatkit.data.records.raw_row import Mark
from openchatkit.data.stores import workers
from openchatkit.data.stores.builder import Progress
from openchatkit.data.stores.pace import Pace
from openchatkit.data.stores.tokenise import in_batches
from openchatkit.errors import UserError
from openchatkit.formats import chat, neox_tokenizers
from openchatkit.formats.token_store import NOT_TRAINED, TokenStore
from openchatkit.tools.preprocess import fields, inputs
from openchatkit.tools.preprocess.inputs import InputRows, NamedRow
from openchatkit.tools.preprocess.work_folder import set_aside_path, store_prefix, unfinished_stores

PACE = Pace()
_LOOKED_AT = 1 << 20  # documents looked at at a time


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Tokenise, and log what was written."""
    args = _parser().parse_args(argv)
    if args.dataset_impl != "mmap":
        raise UserError(f"--dataset-impl {args.dataset_impl}: only mmap is written, which GPT-NeoX reads as it is")
    if args.split_sentences or args.keep_newlines:
        flag = "--split-sentences" if args.split_sentences else "--keep-newlines"
        raise UserError(f"{flag} is for models of sentences, as BERT: documents are kept whole here, leave it out")
    if args.ftfy and importlib.util.find_spec("ftfy") is None:
        raise UserError("--ftfy needs a package: pip install ftfy")
    files = inputs.find_files(args.input)
    encoder = neox_tokenizers.load(args.tokenizer_type, args.vocab_file, args.merge_file)
    if args.append_eod and encoder.end_of_text is None:
        raise UserError(f"--append-eod: {args.vocab_file} has no {neox_tokenizers.END_OF_TEXT} token")
    if args.loss_mask and not args.append_eod:
        logger.warning("--loss-mask without --append-eod: no model trained on this learns to end its last reply")
    keys = tuple(dict.fromkeys(args.jsonl_keys))
    if unfit := [key for key in keys if not key or "/" in key]:
        raise UserError(f"--jsonl-keys {unfit[0]!r}: a file is named after it: expected a name without a '/'")
    context_end = () if args.mask_before_token is None else _read_ids(args.mask_before_token, encoder.vocab_size)
    if context_end and args.loss_mask:
        raise UserError("--mask-before-token and --loss-mask both say what is trained on: give one of them")
    if context_end and (len(keys) > 1 or keys[0] == fields.LABELS):
        raise UserError(
            f"--mask-before-token takes one of --jsonl-keys, other than {fields.LABELS}: found {' '.join(keys)}"
        )
    job = fields.FieldOptions(
        encoder, keys, append_eod=args.append_eod, ftfy=args.ftfy, chats=args.loss_mask, context_end=context_end
    )
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
    group.add_argument("--input", required=True, help=f"files, separated by commas: {inputs.ENDINGS}")
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
    group.add_argument(
        "--mask-before-token",
        metavar="ID,ID,...",
        help="write labels beside the texts, which train on what comes after the first such ids",
    )
    group.add_argument("--split-sentences", action="store_true", help="refused: documents are kept whole")
    group.add_argument("--keep-newlines", action="store_true", help="refused: it belongs to --split-sentences")
    group = parser.add_argument_group("output")
    group.add_argument("--output-prefix", type=Path, required=True, help="what the files' names begin with")
    group.add_argument("--dataset-impl", choices=["lazy", "cached", "mmap"], default="mmap", help="mmap alone")
    group.add_argument("--overwrite", action="store_true", help="replace stores that are there")
    group = parser.add_argument_group("runtime")
    group.add_argument("--workers", type=cli.positive_int, default=workers.cores(), help="processes")
    group.add_argument("--log-interval", type=cli.positive_int, default=100, help="documents between looks at the rate")
    return parser


def _read_ids(text: str, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of `--mask-before-token`, which are all of the vocabulary."""
    ids = [int(part) if part.strip().isdecimal() else -1 for part in text.split(",")]
    if min(ids) < 0 or max(ids) >= vocab_size:
        raise UserError(f"--mask-before-token {text!r}: expected ids such as 1,2,3, each below {vocab_size}")
    return tuple(ids)


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
    source: InputRows, start: int, job: fields.FieldOptions, processes: int, pace: Pace
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
    if job.context_end:
        _report_labels(TokenStore(store_prefix(prefix, fields.LABELS)), job)
    if held.quarantined:
        logger.warning(f"{held.quarantined:,} of {held.rows:,} rows set aside, listed in {set_aside_path(prefix)}")


def _report_labels(labels: TokenStore, job: fields.FieldOptions) -> None:
    """Warn of documents without the ids after which training begins: all of their tokens are trained on."""
    trained = sum(
        int((labels.tokens[labels.starts(numbers)] != NOT_TRAINED).sum())
        for numbers in np.array_split(np.arange(labels.documents), labels.documents // _LOOKED_AT + 1)
    )
    if trained:
        ids = ",".join(map(str, job.context_end))
        logger.warning(
            f"{trained:,} of {labels.documents:,} documents do not hold {ids} and are trained on whole; beside other "
            "characters a text may have other ids"
        )
