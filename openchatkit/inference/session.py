"""One chat with one model: questions in, replies out, as text.

Owns what a turn does to the conversation: a reply that came, whole or interrupted, stays; a turn that failed leaves
no trace. Knows no terminal, so whatever else talks to a model can use it.
"""

from collections.abc import Sequence
from dataclasses import asdict

import torch

from openchatkit.errors import UserError
from openchatkit.inference import conversation
from openchatkit.inference.conversation import Conversation
from openchatkit.inference.responder import Emit, Reply, Responder
from openchatkit.inference.sampling import Sampling


class Session:
    """A conversation with a model. `seed` makes its draws repeat, from the start and from each `reset`."""

    def __init__(self, responder: Responder, sampling: Sampling, *, date: bool = True, seed: int | None = None) -> None:
        limit = responder.engine.context_length
        if limit is not None and sampling.max_tokens >= limit:
            raise UserError(
                f"--max-tokens {sampling.max_tokens} leaves no room for a question: expected fewer than the {limit} "
                "tokens that this model reads at once"
            )
        self.sampling = sampling
        self.responder = responder
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
        asked = self.conversation.asked(text, passages)
        reply = self.responder.answer(asked, self.sampling, generator=self._generator, emit=emit)
        if reply.text or reply.finish != "interrupted":
            self.conversation = asked.answered(reply.text)
        return reply

    def complete(self, prompt: str, *, emit: Emit = lambda text: None) -> Reply:
        """Go on from `prompt` as it stands: no preamble, no roles, and the conversation neither read nor changed."""
        return self.responder.complete(prompt, self.sampling, generator=self._generator, emit=emit)

    def prompt(self, text: str = "", passages: Sequence[str] = ()) -> str:
        """The conversation as the model would read it; with `text`, as it would be sent if that were said next."""
        asked = self.conversation.asked(text, passages) if text else self.conversation
        fitted = self.responder.fit(asked, self.sampling).conversation if text else asked
        return self.responder.rendering.text(fitted)

    def hyperparameters(self) -> dict[str, object]:
        """The settings in use, by the names that the original kit printed."""
        return {**asdict(self.sampling), "seed": self._seed}
