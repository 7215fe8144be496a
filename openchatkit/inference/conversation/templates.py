"""Conversations rendered by a model's own chat template.

A template is a program that anyone may have written, so it never sees the texts: it gets placeholders, and its output
is cut at them. Special tokens are tokens in the template's parts alone; in questions, replies, passages and system
texts they are characters. Marks of turns that a template writes in plain characters, [INST] say, are disarmed there.

A template's changes to a text itself are not applied, with two exceptions: white space around it is stripped, and a
model's thoughts before an earlier reply are removed where its template removes them. The date preamble belongs to the
kit's own form and is left out.
"""

import itertools
import re
from collections.abc import Sequence

from openchatkit.data.tokenizer import Tokenizer
from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.formats.chat import Turn
from openchatkit.inference.conversation.conversation import Conversation
from openchatkit.inference.conversation.rendering import begun_text
from openchatkit.texts import reason_of

_ROLES = {"human": "user", "bot": "assistant"}
_ADVICE = "use --template kit"
# Models write their thoughts between these.
_THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<seed:think>", "</seed:think>"))
# A turn's mark in plain characters: something in brackets, or a line such as `### Response:`.
_BRACKETED = re.compile(r"[<\[{]+[^<>\[\]{}\s]{1,60}[>\]}]+")
_HEADING = re.compile(r"(?m)^[ \t]*(#.{2,60}?|\S.{0,60}?:)[ \t]*$")


class TemplateRendering:
    """The model's chat template. Where it takes no system text, that precedes the first question."""

    name = "model"
    separator = ""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._placeholder = "placeholder0x"
        while self._placeholder in str(tokenizer.chat_template):
            self._placeholder = f"0{self._placeholder}"
        pieces = self._lay_out(["user", "assistant", "user"], open=True)
        self._takes_system = self._try_system()
        self._thoughts_end = tuple(mark[1] for mark in _THOUGHTS if self._removes(*mark))
        self._marks = _marks(tokenizer, [*pieces, *(self._lay_out(["system", "user"]) if self._takes_system else ())])
        self.stop_ids, self.stop_strings = _stops(tokenizer, pieces)
        # The template's tokens around a pair of turns: those of two more turns, without those at its ends.
        around = self._count(pieces) - self._count(self._lay_out(["user"], open=True))
        self._around = -(-around // 2)

    def text(self, conversation: Conversation) -> str:
        return "".join(text for text, _ in self._pieces(conversation))

    def tokens(self, conversation: Conversation) -> list[int]:
        return self._tokenizer.encode_pieces(self._pieces(conversation))

    def sizes(self, turns: Sequence[Turn]) -> list[int]:
        return [len(ids) + self._around for ids in self._tokenizer.encode(list(map(self._without_thoughts, turns)))]

    def _pieces(self, conversation: Conversation) -> list[tuple[str, bool]]:
        """The prompt in pieces: (text, whether it is the template's own)."""
        read = conversation.as_read().alternating()
        roles = [_ROLES[turn.role] for turn in read.turns]
        last = max((place for place, role in enumerate(roles) if role == "user"), default=0)
        texts = [
            chat.human_text(turn)
            if turn.role == "human"
            else chat.content(self._without_thoughts(turn) if place < last else turn.text)
            for place, turn in enumerate(read.turns)
        ]
        texts = list(map(self._disarm, texts))
        if system := self._disarm(chat.content(read.system)):
            if self._takes_system:
                roles, texts = ["system", *roles], [system, *texts]
            elif "user" in roles:
                first = roles.index("user")
                texts[first] = f"{system}\n\n{texts[first]}"
        if not roles:
            return []
        if begun := self._disarm(begun_text(read.begun)):
            roles, texts = [*roles, "assistant"], [*texts, begun]
        pieces = self._lay_out(roles, open=conversation.open and not begun)
        if begun and len(roles) - 1 in pieces:
            pieces = pieces[: pieces.index(len(roles) - 1) + 1]
        if missing := set(range(len(roles))).difference(piece for piece in pieces if isinstance(piece, int)):
            number = min(missing)
            raise UserError(
                f"the model's chat template leaves out message {number + 1} of {len(roles)}, the {roles[number]}'s: "
                f"{_ADVICE}"
            )
        return [(texts[piece], False) if isinstance(piece, int) else (piece, True) for piece in pieces]

    def _lay_out(self, roles: Sequence[str], *, open: bool = False) -> list[str | int]:
        """The template applied to messages of these roles: its own text, and the numbers of the messages."""
        contents = [f"{self._placeholder}{number}x" for number in range(len(roles))]
        return self._apply(roles, contents, open=open)

    def _apply(self, roles: Sequence[str], contents: Sequence[str], *, open: bool) -> list[str | int]:
        """`_lay_out` of messages with such contents, in which placeholders stand."""
        messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        try:
            text = self._tokenizer.apply_chat_template(messages, generation_prompt=open)
        except Exception as error:  # a template is a program: besides jinja2's errors it can raise any of Python's
            reason = reason_of(error)
            raise UserError(
                f"the model's chat template does not take this conversation ({reason}): {_ADVICE}"
            ) from error
        parts = re.split(f"{self._placeholder}([0-9]+)x", text)
        return [int(part) if place % 2 else part for place, part in enumerate(parts)]

    def _try_system(self) -> bool:
        """Whether the template takes a system message, and does not leave it out."""
        try:
            return 0 in self._lay_out(["system", "user"])
        except UserError:
            return False

    def _removes(self, begin: str, end: str) -> bool:
        """Whether the template removes the text between these marks from an earlier reply."""
        contents = [f"{self._placeholder}{number}x" for number in range(4)]
        contents[1:3] = [f"{begin}\n{contents[1]}\n{end}\n\n{contents[2]}"]
        try:
            pieces = self._apply(["user", "assistant", "user"], contents, open=True)
        except UserError:
            return False
        return 1 not in pieces and 2 in pieces

    def _without_thoughts(self, turn: Turn) -> str:
        """The text of a turn that is not the last, without the model's thoughts before it."""
        text = turn.text
        for end in self._thoughts_end if turn.role == "bot" else ():
            text = text.rpartition(end)[2]
        return text

    def _count(self, pieces: Sequence[str | int]) -> int:
        """The number of tokens of the template's own."""
        return len(self._tokenizer.encode_pieces([(piece, True) for piece in pieces if isinstance(piece, str)]))

    def _disarm(self, text: str) -> str:
        """`text` without the template's marks of turns: a space parts the last character of each from the rest."""
        if self._marks is None or not self._marks.search(chat.visible_text(text)):
            return text
        seen, places = chat.visible_positions(text)
        cuts = [0, *(places[found.end() - 1] for found in self._marks.finditer(seen)), len(text)]
        return " ".join(text[start:end] for start, end in itertools.pairwise(cuts))


def _marks(tokenizer: Tokenizer, pieces: Sequence[str | int]) -> re.Pattern[str] | None:
    """Return a pattern of the texts that open or close a turn, except special tokens, which no text can write."""
    plain = [
        part
        for piece in pieces
        if isinstance(piece, str)
        for part in tokenizer.split_special(piece)
        if isinstance(part, str)
    ]
    found = {mark for part in plain for pattern in (_BRACKETED, _HEADING) for mark in pattern.findall(part)}
    seen = sorted({mark for text in found if len(mark := chat.visible_text(text).strip()) > 2}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, seen)), re.IGNORECASE) if seen else None


def _stops(tokenizer: Tokenizer, pieces: Sequence[str | int]) -> tuple[frozenset[int], tuple[str, ...]]:
    """The stops that the template puts between a reply (message 1) and a question: special tokens, else its text."""
    after = str(pieces[pieces.index(1) + 1]) if 1 in pieces else ""
    ids = frozenset(part for part in tokenizer.split_special(after) if isinstance(part, int))
    mark = after.rstrip().lstrip(" ")
    return ids, (mark,) if mark.strip() and not ids else ()
