"""One reply to one conversation: rendered, fitted into the context, generated, streamed, moderated.

Keeps nothing between calls but what the engine caches; whoever calls owns the conversation. The shell and the server
both stand on it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.formats import chat
from openchatkit.inference import context, rendering
from openchatkit.inference.conversation import Conversation
from openchatkit.inference.engine import Engine, Statistics
from openchatkit.inference.moderation.moderator import Moderator
from openchatkit.inference.rendering import Rendering
from openchatkit.inference.sampling import Sampling
from openchatkit.inference.streaming import ReplyStream

Emit = Callable[[str], None]


@dataclass(frozen=True)
class Reply:
    """A reply's text and token ids (a stop string's included), what ended it and what it took.

    `finish` is "end" (the model's own end of turn, or a stop string), "length" (`max_tokens`), "interrupted" or
    "moderated". `dropped` counts the pairs of turns that were left out for want of room.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    dropped: int = 0
    statistics: Statistics = field(default_factory=Statistics)


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
        """The reply to the conversation's last turn, the human's; its text also goes to `emit` as it comes.

        Ctrl-C, or `cancelled` becoming true, ends it. `stop` are strings that end it besides the rendering's own.
        Raises UserError: too long, out of memory, no number.
        """
        fitted = self.fit(conversation, sampling)
        passages = bool(conversation.turns[-1].passages)
        stream = self._stream((*self.rendering.stop_strings, *stop), trim=True)
        return self._generate(
            fitted.tokens, stream, sampling, generator, emit, cancelled, dropped=fitted.dropped, lookup=passages
        )

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
        """Go on from `prompt` as it stands: no roles, nothing trimmed. Raises as `answer` does."""
        tokens = rendering.encode(self.tokenizer, chat.parse(prompt))
        limits = {"context_length": self.engine.context_length, "max_tokens": sampling.max_tokens}
        if not context.fits(len(tokens), **limits):
            raise context.too_long(len(tokens), **limits)
        stream = self._stream((*self.rendering.stop_strings, *stop), trim=False)
        return self._generate(tokens, stream, sampling, generator, emit, cancelled)

    def _stream(self, stop_strings: Sequence[str], *, trim: bool) -> ReplyStream:
        return ReplyStream(partial(self.tokenizer.decode, special=False), stop_strings=stop_strings, trim=trim)

    def _generate(
        self,
        prompt: Sequence[int],
        stream: ReplyStream,
        sampling: Sampling,
        generator: torch.Generator | None,
        emit: Emit,
        cancelled: Callable[[], bool],
        *,
        dropped: int = 0,
        lookup: bool = False,
    ) -> Reply:
        tokens: list[int] = []
        finish = "end"
        statistics = Statistics()
        try:
            for token in self.engine.generate(prompt, sampling, generator, statistics=statistics, lookup=lookup):
                tokens.append(token)
                if text := stream.push(token):
                    emit(text)
                if stream.stopped:
                    break
                if cancelled():
                    finish = "interrupted"
                    break
            else:
                finish = "length" if len(tokens) == sampling.max_tokens else "end"
            if text := stream.flush():
                emit(text)
        except KeyboardInterrupt:
            finish = "interrupted"
        return Reply(stream.text, tuple(tokens), finish, dropped, statistics)
