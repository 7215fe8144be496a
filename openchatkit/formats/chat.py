"""The one rendering of a chat: roles, date preamble, passage block, end of turn, and what is trained on.

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

A bot turn ends with a newline; what follows it, the next `<human>:` or end-of-text, tells a reader that the turn is
over and not merely a line of it. Both are therefore part of the end of turn, and trained on with the reply.
Text is cut into segments at these borders and each is tokenised by itself, in training and in the shell alike, so no
token ever straddles the border between what is trained on and what is not.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

HUMAN = "<human>:"
BOT = "<bot>:"
STOP_STRINGS = (f"\n{HUMAN}", f"\n{BOT}")

_PASSAGES = "Passages:"
_ROLE_TAG = re.compile(r"<(?=[\W_]{0,8}(?:human|bot)[\W_]{0,8}>)", re.IGNORECASE)
# What shows nothing: control characters but white space, and Unicode's Default_Ignorable_Code_Point.
_INVISIBLE = re.compile(
    "[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f"
    "\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3"
    "\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_BORDER = re.compile(f"(?m)(^{HUMAN}|^{BOT})")

# Jinja for `tokenizer.chat_template`: the same characters as `render`, from messages with roles system, user and
# assistant. A user message may carry `passages`, a list of strings.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] | trim + '\\n\\n' }}"
    "{%- elif message['role'] == 'user' -%}"
    "{{ '<human>: ' }}"
    "{%- if message['passages'] -%}{{ 'Passages:\\n' }}"
    "{%- for passage in message['passages'] -%}{{ '> ' + passage.split() | join(' ') + '\\n' }}{%- endfor -%}"
    "{{ '\\n' }}{%- endif -%}"
    "{{ message['content'] | trim + '\\n' }}"
    "{%- elif message['role'] == 'assistant' -%}{{ '<bot>: ' + message['content'] | trim + '\\n' }}"
    "{%- else -%}{{ raise_exception('roles are system, user and assistant, got ' + message['role']) }}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<bot>:' }}{%- endif -%}"
)


@dataclass(frozen=True)
class Turn:
    """What one side said; `passages` are retrieved texts that belong to this turn of the human's alone.

    A bot's turn that is not `trained` is context: its tokens do not count in the loss on responses.
    """

    role: str
    text: str
    passages: tuple[str, ...] = ()
    trained: bool = True

    def __post_init__(self) -> None:
        assert self.role in ("human", "bot"), self.role


@dataclass(frozen=True)
class Segment:
    """A run of characters tokenised by itself; `trained` says whether its tokens count in the loss on responses."""

    text: str
    trained: bool


def preamble(now: datetime) -> str:
    """The date and time that may open a chat, in the original kit's form."""
    return now.strftime("Current Date: %Y-%m-%d\nCurrent Time: %H:%M:%S %p %Z").rstrip() + "\n\n"


def neutralise(text: str) -> str:
    """`text` with role tags disarmed (compatibility forms and invisible characters seen through), else unchanged.

    Every turn's text and passages go through here as they are rendered, so none of them can forge another turn.
    """
    seen = seen_through(text)
    return _ROLE_TAG.sub("(", seen) if _ROLE_TAG.search(seen) else text


def seen_through(text: str) -> str:
    """`text` as it may look to a reader: compatibility forms of characters made plain, invisible ones taken out."""
    return _INVISIBLE.sub("", unicodedata.normalize("NFKC", text))


def human_text(turn: Turn) -> str:
    """What stands between `<human>: ` and the newline: the passage block, one quoted line each, and the question."""
    text = neutralise(turn.text).strip()
    if not turn.passages:
        return text
    quoted = "".join(f"> {' '.join(neutralise(passage).split())}\n" for passage in turn.passages)
    return f"{_PASSAGES}\n{quoted}\n{text}"


def render(turns: Sequence[Turn], *, system: str = "", prompt: bool = True) -> list[Segment]:
    """Cut a chat into segments.

    `system` (a date preamble, say) opens it, followed by an empty line. When the last turn is the human's, `prompt`
    leaves the chat open for a reply: it ends with `<bot>:`.
    """
    text = f"{neutralise(system).strip()}\n\n" if system.strip() else ""
    for turn in turns:
        if turn.role == "human":
            text += f"{HUMAN} {human_text(turn)}\n"
        else:
            text += f"{BOT} {neutralise(turn.text).strip()}\n"
    if prompt and turns and turns[-1].role == "human":
        text += BOT
    # No turn's text can hold a tag, so the trained segments are the bot's turns, one each and in order.
    replies = iter([turn for turn in turns if turn.role == "bot"])
    return [Segment(segment.text, segment.trained and next(replies).trained) for segment in parse(text)]


def render_text(turns: Sequence[Turn], *, system: str = "") -> str:
    """`render` as one string: the `text` of a training record."""
    return "".join(segment.text for segment in render(turns, system=system))


def parse(text: str) -> list[Segment]:
    """Cut any text in this form into segments; text without a line that starts with `<bot>:` is one, not trained on.

    Trained segments run from behind `<bot>:` up to and including the end of the turn: the newline, and the next
    `<human>:` or `<bot>:` where there is one. End-of-text after the last turn is the tokeniser's to add (see
    `ends_with_reply`).
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


def ends_with_reply(segments: Sequence[Segment]) -> bool:
    """Whether the chat ends with a bot's turn that is trained on; the end-of-text behind it is part of that turn."""
    return bool(segments) and segments[-1].trained
