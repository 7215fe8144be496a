"""The one rendering of a chat: roles, date preamble, passage block, end of turn, and the trained segments.

Training data, the loss mask, the chat template of converted models and the shell all come here, so a model meets in
the shell exactly the characters it was trained on:

    Current Date: 2026-11-20
    Current Time: 22:35:00 PM UTC

    <human>: Passages:
    > A passage that belongs to this turn, on one line.

    What does it say?
    <bot>: The reply.
    <human>: The next question.
    <bot>: The next reply.
    <|endoftext|>

A bot turn ends with a newline; the next `<human>:` or end-of-text after it shows a reader that the turn is over, and
not only a line of it. Both are therefore part of the end of turn, and trained on with the reply.

The text of a turn stands as it was written, indentation included, but for three things: empty lines before it and white
space after it are removed, passages stand on one line each, and a role tag at the start of a line (it would open a
turn) begins with `(` instead of `<`. `CHAT_TEMPLATE` and `render` do the same, and so does `content` for a single text.

Text is cut into segments at these borders and each is tokenised by itself, in training and in the shell alike, so no
token ever straddles the border between what is trained on and what is not.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from openchatkit.texts import normalize

HUMAN = "<human>:"
BOT = "<bot>:"
STOP_STRINGS = (f"\n{HUMAN}", f"\n{BOT}")

_PASSAGES = "Passages:"
# Invisible characters: control characters but white space, and Unicode's Default_Ignorable_Code_Point.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_BORDER = re.compile(f"(?m)(^{HUMAN}|^{BOT})")

# Jinja for `tokenizer.chat_template`: the same characters as `render`, from messages with roles system, user and
# assistant. A user message may carry `passages`, a list of strings. Other implementations of Jinja support it all.
_DISARM = r".replace('\n<human>:', '\n(human>:').replace('\n<bot>:', '\n(bot>:')"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    r"{%- set text = message['content'].lstrip('\r\n').rstrip()" + _DISARM + " -%}"
    "{%- if message['role'] == 'system' -%}"
    r"{%- if text -%}{{ ('\n' + text)" + _DISARM + r"[1:] + '\n\n' }}{%- endif -%}"
    "{%- elif message['role'] == 'user' and message['passages'] -%}"
    r"{{ '<human>: Passages:\n' }}"
    r"{%- for passage in message['passages'] -%}{{ '> ' + passage.split() | join(' ') + '\n' }}{%- endfor -%}"
    r"{{ ('\n' + text)" + _DISARM + r" + '\n' }}"
    r"{%- elif message['role'] == 'user' -%}{{ '<human>: ' + text + '\n' }}"
    r"{%- elif message['role'] == 'assistant' -%}{{ '<bot>: ' + text + '\n' }}"
    "{%- else -%}{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<bot>:' }}{%- endif -%}"
)
# SHA-256 of what earlier versions of this kit wrote into models; `render` is the better rendering of these.
_FORMER_TEMPLATES = ("f1bf9a3a533858992651c4eb6fa757aeea1f90eb4ae3c67c4174f5793a9e927f",)


@dataclass(frozen=True)
class Turn:
    """One side's text; `passages` are retrieved texts that belong to this turn of the human alone.

    A bot's turn that is not `trained` is context: its tokens never count in the loss.
    """

    role: str
    text: str
    passages: tuple[str, ...] = ()
    trained: bool = True

    def __post_init__(self) -> None:
        assert self.role in ("human", "bot"), self.role


@dataclass(frozen=True)
class Segment:
    """A run of characters tokenised by itself; `trained` says whether its tokens count in the loss on responses.

    Those of an `excluded` one never count.
    """

    text: str
    trained: bool
    excluded: bool = False


def preamble(now: datetime) -> str:
    """Return the date and time that may open a chat, in the original kit's form."""
    return now.strftime("Current Date: %Y-%m-%d\nCurrent Time: %H:%M:%S %p %Z").rstrip() + "\n\n"


def is_own_template(template: object) -> bool:
    """Return whether a chat template is one that this kit has written."""
    if template == CHAT_TEMPLATE:
        return True
    return isinstance(template, str) and hashlib.sha256(template.encode()).hexdigest() in _FORMER_TEMPLATES


def content(text: str) -> str:
    """Return the text of a message as it stands in a turn: see the module."""
    return _disarm(text.lstrip("\r\n").rstrip())


def join_system(texts: Sequence[str]) -> str:
    """Return several system texts as one, with an empty line between them; empty ones are skipped."""
    return "\n\n".join(text for text in map(content, texts) if text)


def _disarm(text: str, *, at_line_start: bool = False) -> str:
    """Return `text` without role tags at the start of a line; `at_line_start`: its first character is at one."""
    for tag in (HUMAN, BOT):
        text = text.replace(f"\n{tag}", f"\n({tag[1:]}")
        if at_line_start and text.startswith(tag):
            text = f"({text[1:]}"
    return text


def visible_text(text: str) -> str:
    """Return `text` as it may look to a reader: compatibility forms made plain, invisible characters removed."""
    return _INVISIBLE.sub("", normalize(text))


def visible_positions(text: str) -> tuple[str, list[int]]:
    """Return `visible_text`, taken character by character, and the position in `text` of each character of it."""
    seen = [(part, place) for place, character in enumerate(text) for part in visible_text(character)]
    return "".join(part for part, _ in seen), [place for _, place in seen]


def human_text(turn: Turn) -> str:
    """Return a human turn's text after `<human>: `: the passage block, one quoted line each, and the question."""
    if not turn.passages:
        return content(turn.text)
    quoted = "".join(f"> {' '.join(passage.split())}\n" for passage in turn.passages)
    return f"{_PASSAGES}\n{quoted}\n{_disarm(content(turn.text), at_line_start=True)}"


def render(turns: Sequence[Turn], *, system: str = "", prompt: bool = True) -> list[Segment]:
    """Cut a chat into segments.

    `system` (a date preamble, say; several texts are joined by `join_system`) opens it, followed by an empty line. When
    the last turn is the human's, `prompt` leaves the chat open for a reply: it ends with `<bot>:`.
    """
    opening = _disarm(content(system), at_line_start=True)
    text = f"{opening}\n\n" if opening else ""
    for turn in turns:
        if turn.role == "human":
            text += f"{HUMAN} {human_text(turn)}\n"
        else:
            text += f"{BOT} {content(turn.text)}\n"
    if prompt and turns and turns[-1].role == "human":
        text += BOT
    # No turn's text can hold a tag, so the trained segments are the bot's turns, one each and in order.
    replies = iter([turn for turn in turns if turn.role == "bot"])
    return [segment if not segment.trained else _of_turn(segment, next(replies)) for segment in parse(text)]


def _of_turn(segment: Segment, turn: Turn) -> Segment:
    return segment if turn.trained else Segment(segment.text, trained=False, excluded=True)


def render_text(turns: Sequence[Turn], *, system: str = "") -> str:
    """Return `render` as one string: the `text` of a training record."""
    return "".join(segment.text for segment in render(turns, system=system))


def parse(text: str) -> list[Segment]:
    """Cut any text in this form into segments; text without a line that starts with `<bot>:` is one, not trained on.

    Trained segments run from after `<bot>:` up to and including the end of the turn: the newline, and the next
    `<human>:` or `<bot>:` where there is one. The tokenizer adds end-of-text after the last turn.
    """
    segments: list[Segment] = []
    pending, trained = "", False
    for piece in _BORDER.split(text):
        pending += piece
        if piece == BOT or (piece == HUMAN and trained):
            segments.append(Segment(pending, trained))
            pending, trained = "", piece == BOT
    if pending:
        segments.append(Segment(pending, trained))
    return segments
