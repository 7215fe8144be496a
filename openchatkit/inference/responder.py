"""One reply to one conversation: passages found, rendered, fitted into the context, generated, streamed, moderated.

Keeps nothing between calls but what the engine caches; the caller owns the conversation. The shell, the server and a
batch all use it.
"""

import contextlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.inference.conversation import context, rendering
from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.conversation.rendering import Rendering
from openchatkit.inference.engine.engine import Engine, Statistics, most_tokens
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.moderation.moderator import Moderator, Verdict
from openchatkit.inference.moderation_gate import Emit, ModerationGate, judge
from openchatkit.inference.streaming import ReplyStream
from openchatkit.retrieval.passage import Passage

if TYPE_CHECKING:
    from openchatkit.inference.retrieval.retriever import Retriever


@dataclass(frozen=True)
class Reply:
    """A reply's text and token ids (a stop string's included), what ended it, and its figures.

    `finish` is "end" (the model's own end of turn, or a stop string), "length" (`max_tokens`, or the context's end),
    "interrupted" or "moderated". `dropped` counts the oldest pairs of turns that had no room, `passages` are those that
    the model read with the question. `verdict` is the moderator's: the one that was not allowed, else the first
    warning, else the last. `refused` says that the question was not allowed and so not answered: `text` is the
    moderator's message instead. `sources` say where each of the `passages` is from, and are None where none were
    looked for; `note` says what went wrong in the search.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    dropped: int = 0
    statistics: Statistics = field(default_factory=Statistics)
    passages: tuple[str, ...] = ()
    verdict: Verdict | None = None
    refused: bool = False
    sources: tuple[Passage, ...] | None = None
    note: str = ""


@dataclass(frozen=True)
class _Prompt:
    """The tokens that a reply continues, and how it is judged and shown.

    `question`, `system` and `begun` are judged before it. Its text continues that of the tokens `before`, if any, and
    is trimmed if `trim`; the rest is as in `Reply`.
    """

    tokens: list[int]
    question: str
    system: str = ""
    begun: str = ""
    before: Sequence[int] = ()
    trim: bool = True
    dropped: int = 0
    passages: tuple[str, ...] = ()
    sources: tuple[Passage, ...] | None = None
    note: str = ""


class _ReplyWriter:
    """Puts the tokens of one reply through its stream and its gate; `finish` says what ended it, as in `Reply`."""

    def __init__(
        self,
        stream: ReplyStream,
        gate: ModerationGate,
        *,
        stop_ids: Collection[int],
        limit: int,
        cancelled: Callable[[], bool],
    ) -> None:
        self._stream, self._gate, self._stop_ids, self._limit = stream, gate, stop_ids, limit
        self._cancelled = cancelled
        self.tokens: list[int] = []
        self.finish = ""

    def begin(self) -> bool:
        """Have the question judged; return whether a reply may follow."""
        self._gate.check_question()
        if self._gate.refused:
            self.finish = "moderated"
        elif self._cancelled():
            self.finish = "interrupted"
        return not self.finish

    def take(self, token: int) -> bool:
        """Take the next token; return whether the reply may go on."""
        self.tokens.append(token)
        if token in self._stop_ids:
            self.finish = "end"
            return False
        self._gate.add(self._stream.push(token))
        if self._gate.blocked or self._stream.stopped:
            self.finish = "end"
        elif self._cancelled():
            self.finish = "interrupted"
        return not self.finish

    def end(self) -> None:
        """Let the last characters through; where tokens ended by themselves, say what ended them."""
        if not self.finish:
            # A cancelled engine stops by itself while it reads a long prompt.
            self.finish = "interrupted" if self._cancelled() else "length" if len(self.tokens) == self._limit else "end"
        if not self._gate.blocked:
            self._gate.add(self._stream.flush())
            if self.finish != "interrupted":
                self._gate.finish()
        if self._gate.blocked:
            self.finish = "moderated"


class Responder:
    """A model ready to answer: the engine, its tokenizer, the rendering of conversations for it, and a moderator."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, rendering: Rendering, *, moderator: Moderator | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.rendering = rendering
        self.moderator = moderator

    def fit(self, conversation: Conversation, sampling: Sampling) -> context.Fitted:
        """Return the part of `conversation` that the model would read. UserError when its last turn is too long."""
        return context.fit(
            conversation,
            encode=self.rendering.tokens,
            sizes=self.rendering.sizes,
            context_length=self.engine.context_length,
            max_tokens=sampling.max_tokens,
        )

    def answer(
        self,
        subject: Conversation | str,
        sampling: Sampling,
        *,
        retriever: "Retriever | None" = None,
        generator: torch.Generator | None = None,
        stop: Sequence[str] = (),
        emit: Emit = lambda text: None,
        cancelled: Callable[[], bool] = lambda: False,
        warn: Callable[[str], None] = lambda note: None,
    ) -> Reply:
        """Answer a conversation's last turn, the human's, or finish a reply that is `begun`; or continue a plain text.

        A `retriever` finds passages for the question first; `warn` gets the reply's `note` at once, also where no reply
        follows. A text is continued as it stands: no roles, no passages, nothing trimmed; before it the model reads
        only what its tokenizer puts before any text.

        The reply's text also goes to `emit` as it comes. Ctrl-C, or `cancelled` becoming true, ends it. `stop` are
        strings that end it besides the rendering's own. With a moderator, text comes in stretches that have been
        judged, and its message takes the place of text that is not allowed (see `moderation_gate`); earlier questions
        that are not allowed are not read. Raises UserError: too long, out of memory, no number, no question.
        """
        if isinstance(subject, str):
            prompt = self._text_prompt(subject)
        else:
            prompt = self._chat_prompt(subject, sampling, retriever, warn)
        gate = ModerationGate(emit, self.moderator, prompt.question, system=prompt.system, begun=prompt.begun)
        writer = _ReplyWriter(
            self._stream(prompt, stop),
            gate,
            stop_ids=self.rendering.stop_ids,
            limit=most_tokens(len(prompt.tokens), sampling.max_tokens, self.engine.context_length),
            cancelled=cancelled,
        )
        statistics = Statistics()
        try:
            if writer.begin():
                new = self.engine.generate(
                    prompt.tokens,
                    sampling,
                    generator,
                    statistics=statistics,
                    lookup=bool(prompt.passages),
                    cancelled=cancelled,
                )
                with contextlib.closing(new):
                    for token in new:
                        if not writer.take(token):
                            break
                writer.end()
        except KeyboardInterrupt:
            writer.finish = "interrupted"
        return Reply(
            gate.text,
            tuple(writer.tokens),
            writer.finish,
            dropped=prompt.dropped,
            statistics=statistics,
            passages=prompt.passages,
            verdict=gate.verdict,
            refused=gate.refused,
            # A question that was refused has no sources.
            sources=() if gate.refused and prompt.sources is not None else prompt.sources,
            note=prompt.note,
        )

    def _chat_prompt(
        self,
        conversation: Conversation,
        sampling: Sampling,
        retriever: "Retriever | None",
        warn: Callable[[str], None],
    ) -> _Prompt:
        if not conversation.open:
            raise UserError("the conversation ends with a reply: expected a question that can be answered")
        sources, note = None, ""
        if retriever is not None:
            found = retriever.retrieve(conversation, self, sampling)
            conversation, sources, note = found.conversation, found.sources, found.note
            if note:
                warn(note)
        fitted = self._without_refused(self.fit(conversation, sampling))
        question = conversation.turns[-1]
        return _Prompt(
            fitted.tokens,
            # A passage is read with the question, and can ask for as much as the question itself.
            "\n\n".join((*question.passages, question.text)),
            system=conversation.system,
            begun=conversation.begun,
            before=fitted.tokens if fitted.conversation.begun.strip() else (),
            dropped=fitted.dropped,
            passages=question.passages,
            sources=sources,
            note=note,
        )

    def _text_prompt(self, text: str) -> _Prompt:
        tokens = rendering.encode(self.tokenizer, chat.parse(text))
        if not tokens:
            raise UserError("the prompt is empty: expected a text to go on from")
        tokens = [*self.tokenizer.prefix, *tokens]
        context.check(len(tokens), self.engine.context_length)
        return _Prompt(tokens, text, before=tokens, trim=False)

    def _without_refused(self, fitted: context.Fitted) -> context.Fitted:
        """Leave out the earlier questions that the moderator does not allow, and their replies.

        In the shell such a question leaves no trace; a client of the server may send any past.
        """
        if self.moderator is None:
            return fitted
        moderator = self.moderator
        *before, last = fitted.conversation.exchanges()
        allowed = [
            pair for pair in before if all(judge(moderator, turn.text).allowed for turn in pair if turn.role == "human")
        ]
        if len(allowed) == len(before):
            return fitted
        conversation = replace(fitted.conversation, turns=tuple(turn for pair in (*allowed, last) for turn in pair))
        return replace(fitted, conversation=conversation, tokens=self.rendering.tokens(conversation))

    def _stream(self, prompt: _Prompt, stop: Sequence[str]) -> ReplyStream:
        if not all(stop):
            raise UserError("a stop string is empty: expected at least one character, or no stop string")
        return ReplyStream(
            partial(self.tokenizer.decode, special=False),
            before=prompt.before,
            stop_strings=(*self.rendering.stop_strings, *stop),
            trim=prompt.trim,
            separator=self.rendering.separator,
        )
