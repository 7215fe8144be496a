"""The command `tools/train_tokenizer.py`: train a byte-level BPE tokenizer on records.

Owns the parts of such a tokenizer. By default decoding gives every text back unchanged: nothing is normalised, and no
space is put in front, since a chat is tokenised segment by segment. GPT-NeoX's own tokenizers do both.
"""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit import cli, progress, storage
from openchatkit.data.options import BAD_ROWS
from openchatkit.data.records import document
from openchatkit.data.records.raw_row import RawRow
from openchatkit.data.records.reader import ENDINGS, Records, is_readable
from openchatkit.data.stores.builder import bad_row_error
from openchatkit.errors import UserError
from openchatkit.formats import tokenizer_files

if TYPE_CHECKING:
    from tokenizers import Tokenizer

END_OF_TEXT, PADDING = "<|endoftext|>", "<|padding|>"
_NORMALIZERS = ("none", "nfkc")
_BYTES = 256
_HELD_OUT = 100  # one record in so many is held out
_HELD_OUT_CHARACTERS = 1 << 24  # a limit, so that memory stays flat


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Train a tokenizer, write it, and log how well it compresses."""
    args = _parser().parse_args(argv)
    from loguru import logger

    if args.gpt_neox:
        args.normalizer, args.add_prefix_space = "nfkc", True
    target = args.save_dir or args.tokenizer_output_path
    _check_writable(target, is_folder=bool(args.save_dir))
    taken = tokenizer_files.has_tokenizer(target) if args.save_dir else target.exists()
    if taken and not args.overwrite:
        raise UserError(f"{target} holds a tokenizer already: name another place, or pass --overwrite")
    files = input_files(args.input or (), args.json_input_dir)
    texts = RecordTexts(files, records_per_file=args.records_per_file, bad_rows=args.bad_rows)
    tokenizer = train(texts, args.vocab_size, normalizer=args.normalizer, add_prefix_space=args.add_prefix_space)
    serialised = tokenizer.to_str(pretty=True)
    try:
        if args.save_dir:
            tokenizer_files.write_tokenizer(target, serialised, end_of_text=END_OF_TEXT, padding=PADDING)
        else:
            storage.write_text(target, serialised)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}: name another place") from error
    if texts.excluded:
        logger.info(f"left out {texts.excluded} rows that cannot be used, beginning with {texts.first_excluded}")
    logger.info(f"{tokenizer.get_vocab_size()} tokens, trained on {texts.records} records")
    if texts.held_out:
        logger.info(f"{bytes_per_token(tokenizer, texts.held_out):.2f} bytes a token in records that were held out")
    else:
        logger.info(f"no records were held out to measure it: there are fewer than {_HELD_OUT}")
    logger.info(f"the tokenizer is in {target}")


def _parser() -> cli.Parser:
    parser = cli.Parser(prog="tools/train_tokenizer.py", description="Train a byte-level BPE tokenizer on records.")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", help=f"files or globs of records: {ENDINGS}")
    source.add_argument("--json-input-dir", "--json_input_dir", type=Path, help="or a folder, all of whose records")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--save-dir", type=Path, help="folder for the tokenizer, as --tokenizer-name takes it")
    target.add_argument(
        "--tokenizer-output-path", "--tokenizer_output_path", type=Path, help="or one file, as GPT-NeoX takes it"
    )
    parser.add_argument("--tokenizer-type", "--tokenizer_type", choices=["BPE"], default="BPE", help="the only one")
    parser.add_argument("-v", "--vocab-size", "--vocab_size", type=cli.positive_int, default=52000, help="tokens")
    parser.add_argument("--normalizer", choices=_NORMALIZERS, default="none", help="nfkc folds compatibility forms")
    parser.add_argument("--add-prefix-space", action="store_true", help="begin every text with a space")
    parser.add_argument(
        "--gpt-neox",
        action="store_true",
        help="both as GPT-NeoX: nfkc, and a space in front; the vocabulary is another than its own, which lacks the "
        "bytes that the data lacks and loses characters with them",
    )
    parser.add_argument("--records-per-file", type=cli.positive_int, help="read no more than these of each file")
    parser.add_argument(
        "--bad-rows", choices=BAD_ROWS, default="error", help="stop at an unusable row, or leave it out"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer that is there")
    return parser


def train(
    texts: Iterable[str], vocab_size: int, *, normalizer: str = "none", add_prefix_space: bool = False
) -> "Tokenizer":
    """Train byte-level BPE with end-of-text as 0 and padding as 1, as in GPT-NeoX-20B; all `vocab_size` ids are used.

    UserError: a size too small for all bytes, or too little text for it.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    assert normalizer in _NORMALIZERS, normalizer
    smallest = _BYTES + 2
    if vocab_size < smallest:
        raise UserError(f"--vocab-size {vocab_size}: expected at least {smallest}, all bytes and two special tokens")
    tokenizer = Tokenizer(models.BPE())
    if normalizer == "nfkc":
        tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise UserError(f"--vocab-size {vocab_size}: the data has text for {found} tokens only; pass that or more data")
    return tokenizer


def bytes_per_token(tokenizer: "Tokenizer", texts: Sequence[str]) -> float:
    """Return the mean number of UTF-8 bytes a token, each text tokenised by itself."""
    tokens = sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return sum(len(text.encode()) for text in texts) / tokens


def input_files(patterns: Iterable[str], folder: Path | None = None) -> list[Path]:
    """Return the files of patterns and a folder, sorted; UserError for one without files."""
    files: set[Path] = set()
    for pattern in patterns:
        found = [Path(name) for name in glob.glob(pattern, recursive=True)]
        if not found:
            raise UserError(f"--input {pattern}: no such file")
        files.update(found)
    if folder is not None:
        found = [path for path in folder.glob("*") if is_readable(path.name)]
        if not found:
            raise UserError(f"--json_input_dir {folder}: no files of records there ({ENDINGS})")
        files.update(found)
    return sorted(files)


class RecordTexts:
    """Iterates over the records of some files, segment by segment, as training tokenises them.

    Each hundredth record is held out and its segments kept in `held_out`, up to some millions of characters.
    `excluded` counts the rows that cannot be used.
    """

    def __init__(self, files: Sequence[Path], *, records_per_file: int | None = None, bad_rows: str = "error") -> None:
        self.records = 0
        self.held_out: list[str] = []
        self.excluded = 0
        self.first_excluded = ""
        self._files = files
        self._records_per_file = records_per_file
        self._bad_rows = bad_rows
        self._read = 0
        self._held_out_characters = 0

    def __iter__(self) -> Iterator[str]:
        for path in self._files:
            with (
                Records(path) as records,
                progress.bar(records.size, f"reading {path.name}", unit="B", unit_scale=True) as bar,
            ):
                for count, row in enumerate(records.rows()):
                    if count == self._records_per_file:
                        break
                    yield from self._segments(path, row)
                    bar.update(records.position - bar.n)

    def _segments(self, path: Path, row: RawRow) -> list[str]:
        """Return the segments to train on, of one row."""
        try:
            if row.error:
                raise document.BadRowError(row.error)
            segments = [segment.text for segment in document.decode(row.data)]
        except document.BadRowError as error:
            if self._bad_rows == "error":
                raise bad_row_error(path, row.number, str(error)) from error
            self.first_excluded = self.first_excluded or f"{path}:{row.number}: {error}"
            self.excluded += 1
            return []
        self._read += 1
        if self._read % _HELD_OUT:
            self.records += 1
            return segments
        if self._held_out_characters < _HELD_OUT_CHARACTERS:
            self.held_out += segments
            self._held_out_characters += sum(map(len, segments))
        return []


def _check_writable(target: Path, *, is_folder: bool) -> None:
    """Raise UserError for a place that cannot be written to, before hours of training rather than after them."""
    if not is_folder and target.is_dir():
        raise UserError(f"--tokenizer-output-path {target} is a folder: name a file in it, or pass --save-dir")
    folder = target if is_folder else target.parent
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{target} cannot be written: {existing} is not a folder that can be written to")
