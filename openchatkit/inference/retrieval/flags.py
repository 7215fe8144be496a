"""The flags of retrieval in a chat, and opening the index that they name."""

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.retrieval.passage import Passage, Searcher

if TYPE_CHECKING:
    from openchatkit.inference.retrieval.retriever import Retriever
    from openchatkit.retrieval.encoder import Encoder
    from openchatkit.retrieval.index import Index

_DEFAULT_K = 3  # passages


def add_flags(flags: argparse.ArgumentParser) -> None:
    """Add --retrieval and the flags that go with it."""
    flags.add_argument(
        "--retrieval",
        nargs="?",
        const=True,
        metavar="PATH",
        help="look each question up and give the model what is found: in the index of this folder, which "
        "retrieval/build_index.py makes of your own files, or, without PATH, in Wikipedia",
    )
    flags.add_argument(
        "--retrieval-k", type=cli.positive_int, default=_DEFAULT_K, metavar="N", help="passages that are looked for"
    )
    flags.add_argument(
        "--retrieval-device",
        default="auto",
        metavar="DEVICE",
        help="where questions are encoded and, if faiss has GPUs, vectors searched: auto, cpu, cuda:1",
    )
    flags.add_argument(
        "--retrieval-encoder",
        metavar="NAME",
        help="folder or hub name of the encoder that the index was made with, if it is not where the index says",
    )
    flags.add_argument(
        "--retrieval-reranker",
        metavar="NAME",
        help="folder or hub name of a cross-encoder that orders the best 30 passages again",
    )


def retriever(given: argparse.Namespace, announce: Callable[[str], None]) -> "Retriever | None":
    """Open the index that the flags name, and load its encoder; None when they name none.

    UserError when it is missing or incomplete, or its encoder is missing.
    """
    if given.retrieval is None:
        return None
    from openchatkit.inference.retrieval.retriever import Retriever
    from openchatkit.retrieval.reloading_index import ReloadingIndex

    folder, wikipedia = _find_index(given)
    searcher: Searcher
    if wikipedia:
        searcher = _open_wikipedia(folder, given.retrieval_encoder, given.retrieval_device, announce)
    else:
        index = _open_index(folder, given.retrieval_encoder, given.retrieval_device, announce)
        # A batch answers all its rows from one snapshot: see `contents_digest`.
        searcher = index if getattr(given, "batch", None) else ReloadingIndex(index)
    if given.retrieval_reranker:
        searcher = _add_reranker(searcher, given.retrieval_reranker, given.retrieval_device, announce)
    return Retriever(searcher, k=given.retrieval_k)


def contents_digest(given: argparse.Namespace) -> str | None:
    """A digest of the contents of the index that the flags name, whatever its folder; None when they name none.

    UserError when it is missing.
    """
    if given.retrieval is None:
        return None
    from openchatkit.formats import manifest, retrieval_index, wikipedia_index

    folder, wikipedia = _find_index(given)
    (wikipedia_index.check if wikipedia else retrieval_index.read)(folder)  # says what is missing
    digests = sorted(file.sha256 for file in manifest.read(folder).files.values())
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()


def _find_index(given: argparse.Namespace) -> tuple[Path, bool]:
    """The folder of the index that the flags name, and whether it is Wikipedia's."""
    from openchatkit.formats import wikipedia_index

    if given.retrieval is True:
        return wikipedia_index.FOLDER, True
    folder = Path(given.retrieval).expanduser()
    return folder, wikipedia_index.is_one(folder)


def _open_index(folder: Path, encoder: str | None, device: str, announce: Callable[[str], None]) -> "Index":
    from openchatkit.retrieval.encoder import Encoder
    from openchatkit.retrieval.index import Index

    index = Index.open(folder)
    if made_with := index.record.encoder:
        index.close()
        loaded = Encoder(encoder or made_with.name, device, made_with.max_tokens)
        announce(f"loading {loaded.name} to look things up in {folder}")
        _check_encoder(loaded, folder)
        index = Index.open(folder, loaded, device=device)
        index.encode("ready?")
        index.to_gpus()
    return index


def _open_wikipedia(folder: Path, encoder: str | None, device: str, announce: Callable[[str], None]) -> Searcher:
    from openchatkit.inference.retrieval.retriever import WikipediaSearcher
    from openchatkit.retrieval.encoder import Encoder
    from openchatkit.retrieval.wikipedia.index import ENCODER, WikipediaIndex

    loaded = Encoder(encoder or ENCODER, device)
    index = WikipediaIndex(folder, loaded)
    announce(f"loading {loaded.name} to look things up in Wikipedia")
    _check_encoder(loaded, folder)
    index.encoder.encode(["ready?"], query=True)
    return WikipediaSearcher(index)


def _add_reranker(searcher: Searcher, name: str, device: str, announce: Callable[[str], None]) -> Searcher:
    from openchatkit.retrieval.rerank import Reranked, Reranker

    reranker = Reranker(name, device)
    announce(f"loading {name} to order what is found")
    reranker.rerank("ready?", [Passage("ready")], 1)
    return Reranked(searcher, reranker)


def _check_encoder(encoder: "Encoder", folder: Path) -> None:
    try:
        _ = encoder.folder
    except UserError as error:
        raise UserError(
            f"no encoder for {folder}: {error} (--retrieval-encoder NAME takes it from elsewhere)"
        ) from error
