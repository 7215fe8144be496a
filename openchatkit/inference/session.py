"""One chat with one model: questions in, replies out, as text.

Owns the effect of a turn on the conversation: a reply, whole or interrupted, stays; a turn that failed, or whose
question was not allowed, leaves no trace. Owns the settings and their changes, and saved chats. Knows no terminal, so
any program that talks to a model can use it.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from openchatkit.errors import UserError
from openchatkit.formats import chat_file
from openchatkit.inference.conversation import conversation
from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.engine import sampling
from openchatkit.inference.engine.engine import Statistics
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.responder import Emit, Reply, Responder
from openchatkit.inference.streaming import clean
from openchatkit.retrieval.passage import Passage

if TYPE_CHECKING:
    from openchatkit.inference.retrieval.retriever import Retriever

_STOP_LIMIT = 16
_SEED_LIMIT = 1 << 63


class Session:
    """A conversation with a model. `seed` makes its draws repeat, from the start and from each `reset`.

    `retriever`, if any, finds passages for every question while `retrieval` is on. `model` is the name that saved chats
    carry. `last` is the last reply, `totals` are the summed figures of all replies.
    """

    def __init__(
        self,
        responder: Responder,
        sampling: Sampling,
        *,
        date: bool = True,
        seed: int | None = None,
        stop: Sequence[str] = (),
        retriever: "Retriever | None" = None,
        model: str = "",
    ) -> None:
        self.responder = responder
        self.sampling = sampling
        self.last: Reply | None = None
        self.totals = Statistics()
        self._date = date
        self._seed = seed
        self._stop = tuple(stop)
        self.retriever = retriever
        self._retrieval = retriever is not None
        # The sources of each question's passages, which the conversation does not have.
        self._sources: dict[tuple[str, ...], tuple[Passage, ...] | None] = {}
        self._model = model
        self._generator = torch.Generator()
        self.conversation = conversation.begin(date=date)
        self._seed_generator()

    def reset(self) -> None:
        """Forget the conversation. The system text stays, as do the settings."""
        self.conversation = conversation.begin(date=self._date).with_system(self.system)
        self._seed_generator()

    # -- turns

    def say(self, text: str, passages: Sequence[str] = (), *, emit: Emit = lambda text: None) -> Reply:
        """Ask, and return the reply; its text also goes to `emit` as it comes.

        Ctrl-C ends the reply and keeps the text so far. Raises UserError (too long, out of memory, no number) with the
        conversation as it was before.
        """
        asked = self.conversation.asked(text, passages)
        retriever = self.retriever if self.retrieval else None
        reply = self.responder.answer(
            asked, self.sampling, retriever=retriever, generator=self._generator, stop=self._stop, emit=emit
        )
        return self._record(asked, reply)

    def regenerate(self, *, emit: Emit = lambda text: None) -> Reply:
        """Answer the last question, passages included, once more; the old reply stays when no new one comes.

        UserError when there is no question, and as `say`.
        """
        question = self._last_question("nothing to answer again")
        asked = self.conversation.undone().asked(question.text, question.passages)
        reply = self.responder.answer(asked, self.sampling, generator=self._generator, stop=self._stop, emit=emit)
        sources = self._sources.get(question.passages)
        return self._record(asked, replace(reply, sources=() if reply.refused and sources is not None else sources))

    def undo(self) -> str:
        """Take back the last question and its reply; returns the question. UserError when there is none."""
        question = self._last_question("nothing to undo")
        self.conversation = self.conversation.undone()
        return question.text

    def complete(self, prompt: str, *, emit: Emit = lambda text: None) -> Reply:
        """Continue `prompt` as it stands: no preamble, no roles, and the conversation neither read nor changed."""
        reply = self.responder.answer(prompt, self.sampling, generator=self._generator, stop=self._stop, emit=emit)
        self._count(reply)
        return reply

    def prompt(self, text: str = "", passages: Sequence[str] = ()) -> str:
        """The conversation as the model would read it; with `text`, as if that were asked next."""
        if not text:
            return self.responder.rendering.text(self.conversation)
        asked = self.conversation.asked(text, passages)
        if self.retriever is not None and self.retrieval:
            asked = self.retriever.retrieve(asked, self.responder, self.sampling).conversation
        return self.responder.rendering.text(self.responder.fit(asked, self.sampling).conversation)

    # -- settings

    @property
    def system(self) -> str:
        """The system text, without date and time; setting it keeps the turns, "" removes it."""
        return self.conversation.system

    @system.setter
    def system(self, text: str) -> None:
        self.conversation = self.conversation.with_system(text.strip())

    @property
    def retrieval(self) -> bool:
        """Whether passages are looked for; turning it on without an index is a UserError."""
        return self._retrieval

    @retrieval.setter
    def retrieval(self, on: bool) -> None:
        if on and self.retriever is None:
            raise UserError(
                "there is no index to look in: start with --retrieval PATH, or give passages with /passage TEXT"
            )
        self._retrieval = on

    def settings(self) -> dict[str, object]:
        """The settings in use, by the names that `set` takes: those of sampling, `seed` and `stop`."""
        return {**self.hyperparameters(), "stop": list(self._stop)}

    def hyperparameters(self) -> dict[str, object]:
        """The settings of sampling, which the original kit printed, and the seed."""
        return {**asdict(self.sampling), "seed": self._seed}

    def set(self, name: str, text: str) -> None:
        """Change a setting, given as text. UserError, with nothing changed, when there is no such name or value.

        `seed` takes a number, which restarts the draws, or none. `stop` takes one string as it stands, or a JSON
        string, or a JSON list of strings; none removes them.
        """
        name = name.replace("-", "_")
        if name == "seed":
            self._seed = _parse_seed(text)
            self._seed_generator()
        elif name == "stop":
            self._stop = _parse_stop_strings(text)
        else:
            if name not in (names := [*asdict(self.sampling), "seed", "stop"]):
                raise UserError(f"there is no setting {clean(name)[:40]!r}: there are {', '.join(names)}")
            self.sampling = sampling.change(self.sampling, name, text)

    # -- saved chats

    def save(self, name: str, overwrite: bool = False) -> Path:
        """Save the conversation and its settings; the file. UserError when there is none, or the name is taken."""
        if not self.conversation.turns:
            raise UserError("there is nothing to save yet: ask something first")
        messages = _clean(self.conversation).messages()
        return chat_file.write(name, messages, model=self._model, settings=self.settings(), overwrite=overwrite)

    def load(self, name: str) -> None:
        """Continue a saved chat: its turns and its system text, under today's date.

        The settings stay those in use. UserError, with everything as it was, when it cannot be read.
        """
        saved = conversation.from_messages(chat_file.read(name).messages)
        begun = conversation.begin(date=self._date)
        self.conversation = conversation.Conversation(saved.system, saved.turns, begun.preamble)
        self._seed_generator()

    # -- the rest

    def _record(self, asked: Conversation, reply: Reply) -> Reply:
        self._count(reply)
        if not reply.refused and (reply.text or reply.finish != "interrupted"):
            self._sources[reply.passages] = reply.sources
            self.conversation = asked.with_passages(reply.passages).answered(reply.text)
        return reply

    def _count(self, reply: Reply) -> None:
        self.last = reply
        for field in fields(Statistics):
            total = getattr(self.totals, field.name) + getattr(reply.statistics, field.name)
            setattr(self.totals, field.name, total)

    def _last_question(self, problem: str) -> conversation.Turn:
        if question := self.conversation.last_question:
            return question
        raise UserError(f"{problem}: no question has been asked yet")

    def _seed_generator(self) -> None:
        if self._seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self._seed)


def _clean(kept: Conversation) -> Conversation:
    """A conversation without control characters, which a saved chat should not hold."""
    turns = [
        replace(turn, text=clean(turn.text), passages=tuple(clean(passage) for passage in turn.passages))
        for turn in kept.turns
    ]
    return replace(kept, system=clean(kept.system), turns=tuple(turns))


def _parse_seed(text: str) -> int | None:
    text = text.strip()
    if text.lower() in ("none", "off"):
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and int(text) < _SEED_LIMIT):
        raise UserError(f"seed {clean(text)[:40]!r}: expected a whole number from 0 to 2**63 - 1, or none")
    return int(text)


def _parse_stop_strings(text: str) -> tuple[str, ...]:
    if text.strip().lower() in ("none", "off"):
        return ()
    value: object = text
    if text.lstrip().startswith(("[", '"')):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f'stop {clean(text)[:40]}: expected a text, or JSON such as ["\\n\\n", "END"]') from error
    strings = [value] if isinstance(value, str) else value
    if not isinstance(strings, list) or not all(isinstance(string, str) for string in strings):
        raise UserError(f'stop {clean(text)[:40]}: expected strings, as in ["\\n\\n", "END"]')
    if not all(strings) or len(strings) > _STOP_LIMIT:
        raise UserError(f"stop {clean(text)[:40]}: expected at most {_STOP_LIMIT} strings, none of them empty")
    return tuple(strings)
