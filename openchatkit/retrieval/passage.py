"""A passage, and the protocol of everything that finds passages for a question."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Passage:
    """A piece of a document, and where it is from.

    `source` is a path or an address, `place` the position in it ("page 3", "lines 10-20", "row 7"). `score` orders the
    passages of one search and cannot be compared across searches; `id` is the row of the index, -1 for none. `also`
    names the other places where the same text was found.
    """

    text: str
    title: str = ""
    source: str = ""
    place: str = ""
    score: float = 0.0
    id: int = -1
    also: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """Source and place in one line."""
        return f"{self.source}, {self.place}" if self.place else self.source


@dataclass(frozen=True)
class Hit(Passage):
    """A passage that an index found.

    `dense` is the similarity of its vector to that of the question: the cosine, if that is the metric of the encoder;
    None if only words were searched. `sparse` is its BM25 score: 0 without a word in common.
    """

    dense: float | None = None
    sparse: float = 0.0


def merge_copies(hits: Iterable[Hit], k: int) -> list[Hit]:
    """Return the first k hits with different texts; `also` of each names the places of its copies.

    Under two headings of one file, the same text may mean two things: those are no copies.
    """
    kept: dict[str, list[Hit]] = {}
    also: dict[int, list[str]] = {}
    for hit in hits:
        alike = kept.setdefault(" ".join(hit.text.split()), [])
        first = next((each for each in alike if each.source != hit.source or each.title == hit.title), None)
        if first is not None:
            also[first.id].append(hit.where)
        elif len(also) < k:
            alike.append(hit)
            also[hit.id] = []
    found = {hit.id: hit for alike in kept.values() for hit in alike}
    return [dataclasses.replace(found[number], also=tuple(dict.fromkeys(places))) for number, places in also.items()]


class Searcher(Protocol):
    """An index or anything else that finds passages."""

    def search(self, query: str, k: int) -> Sequence[Passage]:
        """Return at most `k` passages for a question, the best first; none if nothing fits."""
        ...
