"""One chat with one model: questions in, replies out, as text.

Owns what a turn does to the conversation: a reply that came, whole or interrupted, stays; a turn that failed leaves
no trace. Knows no terminal, so whatever else talks to a model can use it.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.inference import context, conversation
from openchatkit.inference.conversation import Conversation
from openchatkit.inference.engine import Engine, Sampling
from openchatkit.inference.streaming import ReplyStream

Emit = Callable[[str], None]


@dataclass(frozen=True)
class Reply:
    """A reply's text and token ids (a stop string's included), and what ended it.

    `finish` is "end" (the model's own end of turn), "length" (`max_tokens`) or "interrupted". `dropped` counts the
    pairs of turns that were forgotten for want of room.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    dropped: int = 0


class Session:
    """A conversation with a model. `seed` makes its draws repeat, from the start and from each `reset`."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        sampling: Sampling,
        *,
        date: bool = True,
        seed: int | None = None,
    ) -> None:
        limit = engine.context_length
        if limit is not None and sampling.max_tokens >= limit:
            raise UserError(
                f"--max-tokens {sampling.max_tokens} leaves no room for a question: expected fewer than the {limit} "
                "tokens that this model reads at once"
            )
        self.sampling = sampling
        self._engine = engine
        self._tokenizer = tokenizer
        self._date = date
        self._seed = seed
        self._generator = torch.Generator()
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self.conversation: Conversation = conversation.begin(date=self._date)
        if self._seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self._seed)

    def say(self, text: str, passages: Sequence[str] = (), *, emit: Emit = lambda text: None) -> Reply:
        """Ask, and return the reply; its text also goes to `emit` as it comes.

        Ctrl-C ends the reply and keeps what was said. Raises UserError (too long, out of memory, no number) with the
        conversation as it was before.
        """
        fitted = self._fit(text, passages)
        reply = self._reply(fitted.tokens, emit, trim=True, dropped=fitted.dropped)
        if reply.text or reply.finish != "interrupted":
            self.conversation = fitted.conversation.answered(reply.text)
        return reply

    def complete(self, prompt: str, *, emit: Emit = lambda text: None) -> Reply:
        """Go on from `prompt` as it stands: no preamble, no roles, and the conversation neither read nor changed."""
        tokens = self._encode(chat.parse(prompt))
        limits = {"context_length": self._engine.context_length, "max_tokens": self.sampling.max_tokens}
        if not context.fits(len(tokens), **limits):
            raise context.too_long(len(tokens), **limits)
        return self._reply(tokens, emit, trim=False)

    def prompt(self, text: str = "", passages: Sequence[str] = ()) -> str:
        """The conversation as the model would read it; with `text`, as it would be sent if that were said next."""
        return self._fit(text, passages).conversation.text() if text else self.conversation.text()

    def hyperparameters(self) -> dict[str, object]:
        """The settings in use, by the names that the original kit printed."""
        return {**asdict(self.sampling), "seed": self._seed}

    def _fit(self, text: str, passages: Sequence[str]) -> context.Fitted:
        return context.fit(
            self.conversation.asked(text, passages),
            encode=self._encode,
            context_length=self._engine.context_length,
            max_tokens=self.sampling.max_tokens,
        )

    def _encode(self, segments: Sequence[chat.Segment]) -> list[int]:
        """Token ids of each segment by itself, as in training."""
        return [token for ids in self._tokenizer.encode([segment.text for segment in segments]) for token in ids]

    def _reply(self, prompt: Sequence[int], emit: Emit, *, trim: bool, dropped: int = 0) -> Reply:
        stream = ReplyStream(partial(self._tokenizer.decode, special=False), stop_strings=chat.STOP_STRINGS, trim=trim)
        tokens: list[int] = []
        finish = "end"
        try:
            for token in self._engine.generate(prompt, self.sampling, self._generator):
                tokens.append(token)
                if text := stream.push(token):
                    emit(text)
                if stream.stopped:
                    break
            else:
                finish = "length" if len(tokens) == self.sampling.max_tokens else "end"
            if text := stream.flush():
                emit(text)
        except KeyboardInterrupt:
            finish = "interrupted"
        return Reply(stream.text, tuple(tokens), finish, dropped)
