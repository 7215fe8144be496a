"""A passage, and what finds passages for a question."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Passage:
    """A piece of a document, and where it is from.

    `source` is a path or an address, `place` where in it ("page 3", "lines 10-20", "row 7"). `score` orders the
    passages of one search and means nothing across searches; `id` is the row of the index, -1 for none.
    """

    text: str
    title: str = ""
    source: str = ""
    place: str = ""
    score: float = 0.0
    id: int = -1


@dataclass(frozen=True)
class Hit(Passage):
    """A passage that an index found.

    `dense` is the similarity of its vector to the question's: the cosine, where the encoder's metric is that; None
    where only words were searched. `sparse` is its BM25 score: 0 without a word in common.
    """

    dense: float | None = None
    sparse: float = 0.0


class Searcher(Protocol):
    """Whatever finds passages."""

    def search(self, query: str, k: int) -> list[Passage]:
        """At most `k` passages for a question, the best first; none where nothing fits."""
        ...
