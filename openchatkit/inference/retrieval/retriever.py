"""Passages for the last question of a conversation: looked for, cut to the room that they may take, and put into it.

They belong to that question alone (see `conversation`). Together with those that the user gave they may take a quarter
of what the model reads at once; the user's count first. Where that leaves room for none, one whole passage is put in
all the same, if question and reply still fit.
"""

from dataclasses import dataclass, replace

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.responder import Reply, Responder
from openchatkit.inference.retrieval.queries import queries
from openchatkit.retrieval.passage import Passage, Searcher

SHARE = 4  # passages may take this part of the context


@dataclass(frozen=True)
class Found:
    """A conversation whose last question has its passages, and where each is from; None if none was looked for.

    Passages that the user gave have neither source nor title. `note` says what went wrong in looking, or that what was
    found has no room.
    """

    conversation: Conversation
    sources: tuple[Passage, ...] | None = None
    note: str = ""

    def told(self, reply: Reply) -> Reply:
        """The reply with what was found for it; a question that was refused has no sources."""
        sources = () if reply.refused and self.sources is not None else self.sources
        return replace(reply, sources=sources, note=self.note)


class Retriever:
    """Looks for at most `k` passages for each question."""

    def __init__(self, searcher: Searcher, *, k: int) -> None:
        self.searcher = searcher
        self.k = k

    def add(self, asked: Conversation, responder: Responder, sampling: Sampling) -> Found:
        """Give the last question of `asked` what is found for it. A search that fails is a note, and no error."""
        question = asked.turns[-1]
        given = tuple(Passage(text) for text in question.passages)
        try:
            hits = self._search(asked)
        # What faiss, pyarrow, torch and the system raise when an index or an encoder is not what it was.
        except (UserError, OSError, RuntimeError, ValueError) as error:
            return Found(asked, given, f"no passages were looked up: {cli.one_line(error)}")
        known = {" ".join(text.split()) for text in question.passages}
        hits = [hit for hit in hits if known.isdisjoint((as_read(hit), " ".join(hit.text.split())))]
        kept = _kept(asked, hits, responder, sampling)
        return Found(_with(asked, kept), (*given, *kept), _no_room(hits) if hits and not kept else "")

    def _search(self, asked: Conversation) -> list[Passage]:
        for query in queries(asked.turns):
            if found := self.searcher.search(query, self.k):
                return found
        return []


def as_read(passage: Passage) -> str:
    """A passage as the model reads it: with its title in front, unless it begins with that."""
    title, text = " ".join(passage.title.split()), " ".join(passage.text.split())
    return text if not title or text.startswith(title) else f"{title}: {text}"


def _no_room(hits: list[Passage]) -> str:
    passages = "a passage was" if len(hits) == 1 else f"{len(hits)} passages were"
    return f"{passages} found, and none fits beside the question into what the model reads at once"


def _with(asked: Conversation, passages: list[Passage]) -> Conversation:
    if not passages:
        return asked
    question = asked.turns[-1]
    texts = (*question.passages, *map(as_read, passages))
    return replace(asked, turns=(*asked.turns[:-1], replace(question, passages=texts)))


def _kept(asked: Conversation, hits: list[Passage], responder: Responder, sampling: Sampling) -> list[Passage]:
    """The best of these passages that may be put in."""
    length = responder.engine.context_length
    if not hits or length is None:
        return hits
    question = asked.turns[-1]
    texts = [*question.passages, *map(as_read, hits)]
    sizes = [len(ids) for ids in responder.tokenizer.encode([f"> {text}\n" for text in texts])]
    room = length // SHARE - sum(sizes[: len(question.passages)])
    kept = []
    for hit, size in zip(hits, sizes[len(question.passages) :], strict=True):
        if size <= room:
            kept.append(hit)
            room -= size

    def fits(passages: list[Passage]) -> bool:
        try:
            return responder.fit(_with(asked, passages), sampling).roomy
        except UserError:
            return False

    if not kept and not question.passages:
        return next(([hit] for hit in hits if fits([hit])), [])
    while kept and not fits(kept):
        kept.pop()
    return kept
