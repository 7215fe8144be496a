"""Searching English Wikipedia, in the index of three-sentence snippets that the chat of the original kit used.

The index and its table are read by memory map; the encoder, contriever-msmarco, is loaded at the first question.
`data/wikipedia-3sentence-level-retrieval-index/prepare.py` fetches and converts the files.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.formats import wikipedia_index as layout
from openchatkit.retrieval.dense import import_faiss, read_index
from openchatkit.retrieval.encoder import Encoder
from openchatkit.retrieval.passage import Passage
from openchatkit.retrieval.wikipedia.expansion import expand, without_overlap
from openchatkit.retrieval.wikipedia.table import WikipediaTable

ENCODER = "facebook/contriever-msmarco"
# The type of the index was never published. These are possible; none of them can run code.
_TYPES = {
    *("IndexIVFPQ", "IndexIVFPQFastScan", "IndexIVFScalarQuantizer", "IndexIVFFlat"),
    *("IndexPQ", "IndexPQFastScan", "IndexScalarQuantizer", "IndexFlat", "IndexFlatIP"),
    *("IndexHNSWFlat", "IndexHNSWPQ", "IndexHNSWSQ", "IndexPreTransform"),
}
_PROBES = 32  # lists to search, if the index does not say


class WikipediaIndex:
    """The index in a folder, by default that of prepare.py. `encoder` is a name, a folder, or an encoder.

    UserError: it is not found, or a file is missing, cut, changed by its size or time stamp, or of another kind.
    """

    def __init__(
        self, folder: Path | str | None = None, encoder: Any = None, device: str = "auto", probes: int | None = None
    ) -> None:
        self.folder = Path(folder) if folder is not None else layout.FOLDER
        record = layout.check(self.folder)
        path = self.folder / layout.INDEX
        self._index = open_index(path)
        if self._index.ntotal != record.rows:
            raise UserError(
                f"{path} has {self._index.ntotal:,} rows, its table {record.rows:,}: they do not belong together; "
                f"run python {layout.SCRIPT} again"
            )
        _set_probes(self._index, probes)
        self.table = WikipediaTable(self.folder / layout.TABLE, record.rows)
        self._given, self._device = encoder, device

    @functools.cached_property
    def encoder(self) -> Any:
        """Encoder of questions and snippets; UserError: its vectors differ in length from those of the index."""
        encoder = self._given
        if encoder is None or isinstance(encoder, str | Path):
            encoder = Encoder(encoder or ENCODER, self._device)
        if encoder.dimension != self._index.d:
            raise UserError(
                f"{encoder.name} makes vectors of {encoder.dimension} numbers, {self.folder / layout.INDEX} holds "
                f"vectors of {self._index.d}: it was made with {ENCODER}"
            )
        return encoder

    def search(self, query: str, k: int = 1, w: int = 5, w_th: float = 0.5) -> list[str]:
        """Return at most k texts for a question, the best first.

        Each is a snippet of three sentences with at most `w` snippets of the same article on each side, as far as their
        cosine to it is above `w_th`.
        """
        return [passage.text for passage in self.passages(query, k, w=w, w_th=w_th)]

    def passages(
        self, query: str, k: int = 1, *, w: int = 5, w_th: float = 0.5, disjoint: bool = False
    ) -> list[Passage]:
        """Return the results of `search` as passages, with titles if known; `score` is the inner product.

        Adjacent snippets are often found together, and their texts overlap; with `disjoint`, no snippet is in two
        passages, and there may be fewer.
        """
        if k < 1 or w < 0 or not np.isfinite(w_th):
            raise UserError(f"k={k}, w={w}, w_th={w_th}: expected k of at least 1, w of at least 0, and a number")
        if not query.strip():
            return []
        vector = np.asarray(self.encoder.encode([query], query=True), dtype=np.float32)
        if not np.isfinite(vector).all():
            raise UserError(f"{self.encoder.name} makes numbers that are not finite of the question: fetch it again")
        scores, rows = self._index.search(vector, min(k, len(self.table)))
        # -1 stands for missing rows; a vector that is not finite has no score.
        found = {int(row): float(score) for score, row in zip(scores[0], rows[0], strict=True) if row >= 0}
        found = {row: score for row, score in found.items() if np.isfinite(score)}
        if wrong := [row for row in found if row >= len(self.table)]:
            raise UserError(f"{self.folder / layout.INDEX} is damaged: it names row {wrong[0]:,}; prepare it again")
        shown = expand(self.table, list(found), self.encoder.encode, width=w, threshold=w_th)
        texts = without_overlap(list(found), shown) if disjoint else zip(found, shown, strict=True)
        return [
            Passage(
                " ".join(self.table.text(number).strip() for number in numbers),
                title=self.table.title(row),
                source="Wikipedia",
                place=f"snippet {row}",
                score=found[row],
                id=row,
            )
            for row, numbers in texts
        ]

    def close(self) -> None:
        """Close the files."""
        self.table.close()
        self._index = None

    def __enter__(self) -> "WikipediaIndex":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Print the results of `search` for one question: the command `retrieval/wikipedia.py`."""
    parser = cli.Parser(prog="retrieval/wikipedia.py", description="Look something up in Wikipedia.")
    parser.add_argument("question", help="what to look for")
    parser.add_argument("-k", type=cli.positive_int, default=1, help="how many texts to print")
    parser.add_argument("-w", type=cli.natural, default=5, help="how many snippets on each side may be added to one")
    parser.add_argument("--w-th", type=float, default=0.5, help="the least cosine of a snippet that is added")
    parser.add_argument("--folder", type=Path, default=layout.FOLDER, help="where prepare.py put the index")
    parser.add_argument("--encoder", default=ENCODER, help="folder or hub name of the encoder it was made with")
    parser.add_argument("--device", default="auto", help="where the encoder runs: auto, cpu, cuda, cuda:1, mps")
    given = parser.parse_args(argv)
    with WikipediaIndex(given.folder, given.encoder, given.device) as index:
        for passage in index.passages(given.question, given.k, w=given.w, w_th=given.w_th):
            print(f"{passage.title}\n{passage.text}\n" if passage.title else f"{passage.text}\n")


def open_index(path: Path) -> Any:
    """Open a faiss index of one of the possible types by memory map; UserError for any other file."""
    return read_index(path, types=_TYPES)


def _set_probes(index: Any, probes: int | None) -> None:
    """Set the number of lists to search: the given one, else that of the index, unless it is faiss's default of 1."""
    faiss = import_faiss()
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None and (probes or lists.nprobe == 1):
        lists.nprobe = min(probes or _PROBES, lists.nlist)
