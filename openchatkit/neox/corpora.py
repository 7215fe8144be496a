"""`neox/prepare_data.py [NAME]`: fetch one of GPT-NeoX's corpora and make the token store that its settings name.

DIR/NAME/NAME_text_document.{bin,idx}, with an end-of-document token each, and beside it which tokenizer made it. Files
of records that are in DIR/NAME already are taken as they are, since most hosts of these corpora are gone.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loguru import logger

from openchatkit import cli, storage
from openchatkit.data.stores import workers
from openchatkit.data.stores.pace import Pace
from openchatkit.download.sidecar import read_sidecar
from openchatkit.download.sources import fetch
from openchatkit.errors import UserError
from openchatkit.formats import neox_tokenizers, token_store
from openchatkit.tools.preprocess import inputs
from openchatkit.tools.preprocess.command import preprocess
from openchatkit.tools.preprocess.fields import FieldOptions

_KEY = "text"
_THE_EYE = "https://the-eye.eu/public/AI"
_PARTS = f"{_THE_EYE}/pile_preliminary_components"
_C4 = "https://the-eye.eu/eleuther_staging/c4"
_EAI_DATA = "http://eaidata.bmk.sh/data"
# GPT-2's tokenizer, under the names that GPT-NeoX's configurations give its files.
_GPT2 = "https://huggingface.co/openai-community/gpt2/resolve/main"
GPT2_FILES = {"gpt2-vocab.json": f"{_GPT2}/vocab.json", "gpt2-merges.txt": f"{_GPT2}/merges.txt"}


@dataclass(frozen=True)
class Corpus:
    """Addresses of a corpus's files, and the number of its documents where it is known.

    `folder` is its name on disk. `hub` is a data set of the hub that holds the same or a like corpus.
    """

    folder: str
    addresses: tuple[str, ...] = ()
    documents: int | None = None
    hub: str | None = None


def _number_addresses(pattern: str, count: int) -> tuple[str, ...]:
    return tuple(pattern.format(number) for number in range(count))


CORPORA = {
    "enron": Corpus("enron", (f"{_EAI_DATA}/enron_emails.jsonl.zst",), 517401),
    "pile_subset": Corpus("pile_00", (f"{_THE_EYE}/pile/train/00.jsonl.zst",), hub="monology/pile-uncopyrighted"),
    "pile": Corpus(
        "pile", _number_addresses(f"{_THE_EYE}/pile/train/{{:02}}.jsonl.zst", 30), hub="monology/pile-uncopyrighted"
    ),
    "github": Corpus("github", (f"{_EAI_DATA}/github_small.jsonl.zst",)),
    "arxiv": Corpus("arxiv", (f"{_PARTS}/2020-09-08-arxiv-extracts-nofallback-until-2007-068.tar.gz",)),
    "europarl": Corpus("europarl", (f"{_PARTS}/EuroParliamentProceedings_1996_2011.jsonl.zst",)),
    "freelaw": Corpus("freelaw", (f"{_PARTS}/FreeLaw_Opinions.jsonl.zst",)),
    "nih": Corpus("nih", (f"{_PARTS}/NIH_ExPORTER_awarded_grant_text.jsonl.zst",)),
    "pubmed": Corpus("pubmed", (f"{_PARTS}/PMC_extracts.tar.gz",)),
    "books1": Corpus("books1", (f"{_PARTS}/books1.tar.gz",)),
    "books3": Corpus("books3", (f"{_PARTS}/books3.tar.gz",)),
    "hackernews": Corpus("hackernews", (f"{_PARTS}/hn.tar.gz",), 373000),
    "openwebtext2": Corpus("openwebtext2", (f"{_PARTS}/openwebtext2.jsonl.zst.tar",), 17103000),
    "stackexchange": Corpus("stackexchange", (f"{_PARTS}/stackexchange_dataset.tar",)),
    "ubuntu_irc": Corpus("ubuntu_irc", (f"{_PARTS}/ubuntu_irc_until_2020_9_1.jsonl.zst",)),
    "youtube_subtitles": Corpus("youtube_subtitles", (f"{_PARTS}/yt_subs.jsonl.zst",)),
    "c4": Corpus("c4", _number_addresses(f"{_C4}/en/c4-train.{{:05}}-of-01024.json.gz", 1024), hub="allenai/c4"),
    "c4_openwebtext": Corpus(
        "c4_openwebtext",
        _number_addresses(f"{_C4}/realnewslike/c4-train.{{:05}}-of-00512.json.gz", 512),
        hub="allenai/c4",
    ),
    "enwik8": Corpus("enwik8", ("https://mattmahoney.net/dc/enwik8.zip",), 1),
}


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Fetch a corpus and tokenise it."""
    parser = cli.Parser(
        prog="neox/prepare_data.py", description="Fetch a corpus and make a token store of it, as GPT-NeoX does."
    )
    parser.add_argument("dataset", nargs="?", default="enron", metavar="NAME", help=f"one of {', '.join(CORPORA)}")
    parser.add_argument("-t", "--tokenizer", default="GPT2BPETokenizer", choices=list(neox_tokenizers.KINDS))
    default = os.environ.get("DATA_DIR", "./data")
    parser.add_argument("-d", "--data-dir", type=Path, default=Path(default), help="folder of all corpora")
    parser.add_argument("-v", "--vocab-file", type=Path, help="the tokenizer's vocabulary (GPT-2's is fetched)")
    parser.add_argument("-m", "--merge-file", type=Path, help="GPT2BPETokenizer: its merges (GPT-2's are fetched)")
    parser.add_argument("-f", "--force-redownload", action="store_true", help="make the store again, of what is there")
    args = parser.parse_args(argv)
    name = args.dataset.lower()
    if name not in CORPORA:
        raise UserError(f"there is no corpus {args.dataset!r}: expected one of {', '.join(CORPORA)}")
    prepare(
        name,
        CORPORA[name],
        args.data_dir,
        tokenizer=args.tokenizer,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        again=args.force_redownload,
    )


def prepare(
    name: str,
    corpus: Corpus,
    data_dir: Path,
    *,
    tokenizer: str,
    vocab_file: Path | None = None,
    merge_file: Path | None = None,
    again: bool = False,
    gpt2_files: Mapping[str, str] = GPT2_FILES,
) -> Path:
    """Make a corpus's store, unless it is there already, and return its prefix.

    UserError where files cannot be fetched, with what to put in their place.
    """
    folder = data_dir / corpus.folder
    prefix = folder / f"{corpus.folder}_{_KEY}_document"
    if token_store.idx_path(prefix).is_file() and not again:
        made = token_store.read_maker(prefix).get("tokenizer_type", tokenizer)
        if made != tokenizer:
            raise UserError(f"{prefix} is there already, made by {made}: -f makes it again, by {tokenizer}")
        logger.info("{} is there already: -f makes it again", prefix)
        return prefix
    with storage.storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if tokenizer == "GPT2BPETokenizer":
            vocab_file, merge_file = (
                given or _fetch_as(data_dir / file, address)
                for given, (file, address) in zip((vocab_file, merge_file), gpt2_files.items(), strict=True)
            )
    encoder = neox_tokenizers.load(tokenizer, vocab_file, merge_file if tokenizer == "GPT2BPETokenizer" else None)
    if encoder.end_of_text is None:
        raise UserError(f"{vocab_file} has no {neox_tokenizers.END_OF_TEXT} token, which closes each document")
    files = _find_records(name, corpus, folder)
    job = FieldOptions(encoder, (_KEY,), append_eod=True, ftfy=False, chats=False)
    preprocess(
        files,
        folder / corpus.folder,
        job,
        processes=workers.cores(),
        overwrite=again,
        expected=corpus.documents,
        pace=Pace(),
    )
    token_store.write_maker(prefix, {"tokenizer_type": tokenizer, **_name_files(vocab_file, merge_file)})
    return prefix


def _name_files(vocab_file: Path | None, merge_file: Path | None) -> dict[str, str]:
    files = {"vocab_file": vocab_file, "merge_file": merge_file}
    return {name: str(path.resolve()) for name, path in files.items() if path is not None and path.exists()}


def _fetch_as(path: Path, address: str) -> Path:
    """Fetch a file under another name, unless it is there."""
    if not path.is_file():
        with storage.atomic_path(path) as temporary:
            fetched = fetch(address, path.parent / f".{path.name}.download")
            shutil.copyfile(fetched, temporary)
        shutil.rmtree(fetched.parent)
    return path


def _find_records(name: str, corpus: Corpus, folder: Path) -> list[Path]:
    """Return the corpus's files of records: those put into its folder, or fetched ones, of which none may be missing.

    Where some were fetched, others that are there stand for those of their names.
    """
    there = _list_records(folder)
    by_hand = {path.name for path in there if read_sidecar(path) is None}
    if by_hand and len(by_hand) == len(there):
        logger.info("taking {} files that are in {}", len(there), folder)
        return there
    for address in corpus.addresses:
        if _name_file(address) in by_hand:
            continue
        try:
            fetch(address, folder)
        except UserError as error:
            raise _explain_gone(name, corpus, folder, address, error) from error
    return _list_records(folder)


def _list_records(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if inputs.is_input(path.name) and path.is_file() and not path.name.startswith(".")
    )


def _explain_gone(name: str, corpus: Corpus, folder: Path, address: str, error: UserError) -> UserError:
    hub = f" (as {corpus.hub} of the Hugging Face hub has)" if corpus.hub else ""
    others = "" if _list_records(folder) else f", or any files of records with a {_KEY!r} each{hub},"
    return UserError(
        f"{name}: {error}; where that host is gone, put {_name_file(address)}{others} into {folder} and run the same "
        "command again"
    )


def _name_file(address: str) -> str:
    return address.rsplit("/", 1)[-1]
