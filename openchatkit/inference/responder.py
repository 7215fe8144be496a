"""One reply to one conversation: rendered, fitted into the context, generated, streamed, moderated.

Keeps nothing between calls but what the engine caches; whoever calls owns the conversation. The shell and the server
both stand on it.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

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
from openchatkit.inference.release import Emit, Release, judge
from openchatkit.inference.streaming import ReplyStream
from openchatkit.retrieval.passage import Passage


@dataclass(frozen=True)
class Reply:
    """A reply's text and token ids (a stop string's included), what ended it and what it took.

    `finish` is "end" (the model's own end of turn, or a stop string), "length" (`max_tokens`, or the context's end),
    "interrupted" or "moderated". `dropped` counts the pairs of turns that were left out for want of room, `passages`
    are those that the model read with the question. `verdict` is the moderator's: what it did not allow, else its first
    warning, else its last judgement. `refused` says that the question was not allowed and so not answered: `text` is
    the message instead. `sources` say where each of the `passages` is from, and are None where none were looked for;
    `note` says what went wrong in looking.
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


class Responder:
    """A model ready to answer: the engine, its tokenizer, how conversations are written for it, and a moderator."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, rendering: Rendering, *, moderator: Moderator | None = None
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.rendering = rendering
        self.moderator = moderator

    def fit(self, conversation: Conversation, sampling: Sampling) -> context.Fitted:
        """What of `conversation` the model would read. UserError when its last turn alone is too long."""
        return context.fit(
            conversation,
            encode=self.rendering.tokens,
            sizes=self.rendering.sizes,
            context_length=self.engine.context_length,
            max_tokens=sampling.max_tokens,
        )

    def answer(
        self,
        conversation: Conversation,
        sampling: Sampling,
        *,
        generator: torch.Generator | None = None,
        stop: Sequence[str] = (),
        emit: Emit = lambda text: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """The reply to the conversation's last turn, the human's, or the rest of a reply that is `begun`.

        Its text also goes to `emit` as it comes.

        Ctrl-C, or `cancelled` becoming true, ends it. `stop` are strings that end it besides the rendering's own. With
        a moderator, text comes in stretches that have been judged, and its message takes the place of what is not
        allowed (see `release`); earlier questions that are not allowed are not read. Raises UserError: too long, out of
        memory, no number, no question.
        """
        if not conversation.open:
            raise UserError("the conversation ends with a reply: expected a question that can be answered")
        fitted = self._without_refused(self.fit(conversation, sampling))
        question = conversation.turns[-1]
        begun = fitted.conversation.begun.strip() != ""
        stream = self._stream((*self.rendering.stop_strings, *stop), fitted.tokens if begun else (), trim=True)
        # A passage is read with the question, and can ask for as much as the question itself.
        asked = "\n\n".join((*question.passages, question.text))
        release = Release(emit, self.moderator, asked, system=conversation.system, begun=conversation.begun)
        reply = self._generate(
            fitted.tokens, stream, release, sampling, generator, cancelled, lookup=bool(question.passages)
        )
        return replace(reply, dropped=fitted.dropped, passages=question.passages)

    def complete(
        self,
        prompt: str,
        sampling: Sampling,
        *,
        generator: torch.Generator | None = None,
        stop: Sequence[str] = (),
        emit: Emit = lambda text: None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Reply:
        """Go on from `prompt` as it stands: no roles, nothing trimmed. Moderated, and raises, as `answer`.

        Before it the model reads what its tokenizer puts before any text, a token for its beginning say.
        """
        tokens = rendering.encode(self.tokenizer, chat.parse(prompt))
        if not tokens:
            raise UserError("the prompt is empty: expected a text to go on from")
        tokens = [*self.tokenizer.prefix, *tokens]
        context.check(len(tokens), self.engine.context_length)
        stream = self._stream((*self.rendering.stop_strings, *stop), tokens, trim=False)
        release = Release(emit, self.moderator, prompt)
        return self._generate(tokens, stream, release, sampling, generator, cancelled)

    def _without_refused(self, fitted: context.Fitted) -> context.Fitted:
        """What is left without the earlier questions that the moderator does not allow, and without their replies.

        In the shell such a question leaves no trace; a client of the server sends whatever it likes as the past.
        """
        if self.moderator is None:
            return fitted
        *before, last = fitted.conversation.exchanges()
        kept = [pair for pair in before if all(self._allows(turn.text) for turn in pair if turn.role == "human")]
        if len(kept) == len(before):
            return fitted
        conversation = replace(fitted.conversation, turns=tuple(turn for pair in (*kept, last) for turn in pair))
        return replace(fitted, conversation=conversation, tokens=self.rendering.tokens(conversation))

    def _allows(self, question: str) -> bool:
        return judge(self.moderator, question).allowed

    def _stream(self, stop_strings: Sequence[str], before: Sequence[int], *, trim: bool) -> ReplyStream:
        if not all(stop_strings):
            raise UserError("a stop string is empty: expected at least one character, or no stop string")
        return ReplyStream(
            partial(self.tokenizer.decode, special=False),
            before=before,
            stop_strings=stop_strings,
            trim=trim,
            separator=self.rendering.separator,
        )

    def _generate(
        self,
        prompt: Sequence[int],
        stream: ReplyStream,
        release: Release,
        sampling: Sampling,
        generator: torch.Generator | None,
        cancelled: Callable[[], bool],
        *,
        lookup: bool = False,
    ) -> Reply:
        tokens: list[int] = []
        statistics = Statistics()
        refused = False
        try:
            release.ask()
            refused = release.blocked
            if refused:
                finish = "moderated"
            elif cancelled():
                finish = "interrupted"
            else:
                how = {"statistics": statistics, "lookup": lookup, "cancelled": cancelled}
                drawn = self.engine.generate(prompt, sampling, generator, **how)
                most = most_tokens(len(prompt), sampling.max_tokens, self.engine.context_length)
                with contextlib.closing(drawn):
                    finish = self._follow(drawn, tokens, stream, release, most, cancelled)
        except KeyboardInterrupt:
            finish = "interrupted"
        return Reply(
            release.text, tuple(tokens), finish, statistics=statistics, verdict=release.verdict, refused=refused
        )

    def _follow(
        self,
        drawn: Iterator[int],
        tokens: list[int],
        stream: ReplyStream,
        release: Release,
        most: int,
        cancelled: Callable[[], bool],
    ) -> str:
        """Take at most so many tokens to their text and on to whoever waits for it; return what ended the reply."""
        finish = "end"
        for token in drawn:
            tokens.append(token)
            if token in self.rendering.stop_ids:
                break
            release.push(stream.push(token))
            if release.blocked:
                return "moderated"
            if stream.stopped:
                break
            if cancelled():
                finish = "interrupted"
                break
        else:
            # The engine stops by itself while it reads a long prompt.
            finish = "interrupted" if cancelled() else "length" if len(tokens) == most else "end"
        release.push(stream.flush())
        if finish != "interrupted":
            release.finish()
        return "moderated" if release.blocked else finish
