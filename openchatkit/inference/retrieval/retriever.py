"""Passages for the last question of a conversation: found, cut to the room that they may take, and put into it.

They belong to that question alone (see `conversation`). Together with those that the user gave they may take a quarter
of what the model reads at once; the user's count first. Where that leaves no room for any, one whole passage is put in
all the same, if question and reply still fit.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.retrieval.queries import queries, telling_words
from openchatkit.retrieval.passage import Passage, Searcher

if TYPE_CHECKING:
    from openchatkit.inference.responder import Responder
    from openchatkit.retrieval.wikipedia.index import WikipediaIndex

_SHARE = 4  # passages may take this part of the context
_WIDTH = 2  # snippets of Wikipedia on each side of one that is found
_STEM = 5  # characters by which two forms of a word are taken for one


@dataclass(frozen=True)
class Retrieved:
    """A conversation whose last question has its passages, and the source of each.

    Passages that the user gave have neither source nor title. `note` says what went wrong in the search, or that the
    passages found have no room.
    """

    conversation: Conversation
    sources: tuple[Passage, ...]
    note: str = ""


class Retriever:
    """Looks for at most `k` passages for each question."""

    def __init__(self, searcher: Searcher, *, k: int) -> None:
        self.searcher = searcher
        self.k = k

    def retrieve(self, asked: Conversation, responder: "Responder", sampling: Sampling) -> Retrieved:
        """Give the last question of `asked` the passages found for it. A search that fails is a note, not an error."""
        question = asked.turns[-1]
        given = tuple(Passage(text) for text in question.passages)
        try:
            hits = self._search(asked)
        # What faiss, pyarrow, torch and the system raise when an index or an encoder has changed or is damaged.
        except (UserError, OSError, RuntimeError, ValueError) as error:
            return Retrieved(asked, given, f"no passages were looked up: {cli.one_line(error)}")
        known = {" ".join(text.split()) for text in question.passages}
        hits = [hit for hit in hits if known.isdisjoint((as_read(hit), " ".join(hit.text.split())))]
        chosen = _choose(asked, hits, responder, sampling)
        return Retrieved(_with(asked, chosen), (*given, *chosen), _no_room(hits) if hits and not chosen else "")

    def _search(self, asked: Conversation) -> list[Passage]:
        for query in queries(asked.turns):
            if found := self.searcher.search(query, self.k):
                return list(found)
        return []


class WikipediaSearcher:
    """Wikipedia as a chat searches it.

    For any question some snippets are the nearest, and how near is near enough has not been measured. So a passage
    counts only if it holds one of the question's telling words. A passage has few neighbours: with all that
    `WikipediaIndex.search` shows by default, one alone is more than a quarter of 2,048 tokens.
    """

    def __init__(self, index: "WikipediaIndex") -> None:
        self._index = index

    def search(self, query: str, k: int) -> list[Passage]:
        """The passages of the k nearest snippets, each with its neighbours, that are about the question."""
        stems = _stems(query)
        found = self._index.passages(query, k, w=_WIDTH, disjoint=True) if stems else []
        return [passage for passage in found if _stems(f"{passage.title} {passage.text}") & stems]


def _stems(text: str) -> set[str]:
    return {word[:_STEM] for word in telling_words(text)}


def as_read(passage: Passage) -> str:
    """A passage as the model reads it: after its title, unless it begins with that."""
    title, text = " ".join(passage.title.split()), " ".join(passage.text.split())
    return text if not title or text.startswith(title) else f"{title}: {text}"


def _no_room(hits: list[Passage]) -> str:
    passages = "a passage was" if len(hits) == 1 else f"{len(hits)} passages were"
    return f"{passages} found, and none fits beside the question into what the model reads at once"


def _with(asked: Conversation, passages: list[Passage]) -> Conversation:
    return asked.with_passages((*asked.turns[-1].passages, *map(as_read, passages)))


def _choose(asked: Conversation, hits: list[Passage], responder: "Responder", sampling: Sampling) -> list[Passage]:
    """The best of these passages that have room."""
    length = responder.engine.context_length
    if not hits or length is None:
        return hits
    question = asked.turns[-1]
    texts = [*question.passages, *map(as_read, hits)]
    sizes = [len(ids) for ids in responder.tokenizer.encode([f"> {text}\n" for text in texts])]
    room = length // _SHARE - sum(sizes[: len(question.passages)])
    chosen = []
    for hit, size in zip(hits, sizes[len(question.passages) :], strict=True):
        if size <= room:
            chosen.append(hit)
            room -= size

    def fits(passages: list[Passage]) -> bool:
        try:
            return responder.fit(_with(asked, passages), sampling).roomy
        except UserError:
            return False

    if not chosen and not question.passages:
        return next(([hit] for hit in hits if fits([hit])), [])
    while chosen and not fits(chosen):
        chosen.pop()
    return chosen
