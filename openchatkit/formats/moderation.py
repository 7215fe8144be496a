"""The prompt of a moderation model, its five labels, and the record that such a model is trained on.

The prompt is that of GPT-JT-Moderation-6B, to the character:

    Possible labels:
    1. casual
    2. needs caution
    3. needs intervention
    4. possibly needs caution
    5. probably needs caution

    Input: The text to judge, on one line.
    Output:

and the model goes on with a space and a label. A record is a prompt and its label, or several exchanges below one list
of labels, separated by empty lines; its labels are trained on, and the end-of-text after the last.

A judged text is put in on one line: every run of white space, line breaks of all kinds included, becomes one space. So
the only lines of a prompt that begin with `Input:`, `Output:` or `Possible labels:` are its own, whatever the text
contains. A text cannot forge a label; it can still try to persuade the model.

Head, text, tail and label are tokenised each by itself, in training and in judging alike.
"""

import re
from collections.abc import Sequence

from openchatkit.formats import chat
from openchatkit.formats.chat import Segment

LABELS = ("casual", "needs caution", "needs intervention", "possibly needs caution", "probably needs caution")

_LIST = "Possible labels:\n" + "".join(f"{number}. {label}\n" for number, label in enumerate(LABELS, 1))
_INPUT = "\nInput:"
HEAD = _LIST + _INPUT
TAIL = "\nOutput:"

# As prosocial-dialog writes them: __needs_caution__.
_DATASET_LABELS = {f"__{label.replace(' ', '_')}__": label for label in LABELS}
# An exchange, up to the next or to the end of the text; its input may have lines, but none that starts another part.
_EXCHANGE = re.compile(
    rf"Input:(?P<text>(?:(?!\n(?:Input|Output):).)*){TAIL}[ \t]*(?P<label>{'|'.join(LABELS)})[ \t\r]*"
    r"(?:\n\s*(?=Input:)|\s*\Z)",
    re.DOTALL,
)
_SURROGATE = re.compile("[\ud800-\udfff]")


def one_line(text: str) -> str:
    """Return `text` as it is put into a prompt: on one line, with halves of surrogate pairs replaced."""
    return _SURROGATE.sub("\ufffd", " ".join(text.split()))


def body(text: str) -> str:
    """Return the part of a prompt between `HEAD` and `TAIL`."""
    return f" {one_line(text)}"


def continuation(label: str) -> str:
    """Return what a model that gives this label writes after the prompt."""
    assert label in LABELS, label
    return f" {label}"


def prompt(text: str) -> str:
    """Return the whole prompt for a text, as one string."""
    return HEAD + body(text) + TAIL


def judged_forms(text: str) -> list[str]:
    """Return the forms in which a text is judged: as it is written, and as it looks, where that differs.

    As it looks: compatibility forms (full-width letters, ligatures) are plain, and invisible characters are removed.
    Readers see words in such text, and models see something they were never trained on.
    """
    forms = dict.fromkeys((one_line(text), one_line(chat.visible_text(text))))
    return [form for form in forms if form]


def label_of(value: str) -> str | None:
    """Return the label that a data set writes as `value`: as it is, or as `__needs_caution__`; else None."""
    return value if value in LABELS else _DATASET_LABELS.get(value)


def record(exchanges: Sequence[tuple[str, str]]) -> list[Segment]:
    """Return the segments of a training record made of texts with their labels."""
    segments = []
    for number, (text, label) in enumerate(exchanges):
        opening = HEAD if number == 0 else f"\n{_INPUT}"
        segments += [Segment(opening, False), Segment(body(text), False), Segment(TAIL, False)]
        segments.append(Segment(continuation(label), True))
    return segments


def parse(text: str) -> list[tuple[str, str]] | None:
    """Parse the texts and labels of a record written as text, with or without the list of labels above it.

    None for any other text. ValueError for one that begins as such a record and continues otherwise.
    """
    rest = text.strip()
    listed = rest.startswith(_LIST)
    if listed:
        rest = rest[len(_LIST) :].lstrip()
    exchanges: list[tuple[str, str]] = []
    place = 0
    while found := _EXCHANGE.match(rest, place):
        if not one_line(found["text"]):
            raise ValueError(f"input {len(exchanges) + 1} is empty")
        exchanges.append((found["text"], found["label"]))
        place = found.end()
        if place == len(rest):
            return exchanges
    if not exchanges and not listed:
        return None
    raise ValueError(
        f"it begins as a moderation record, and exchange {len(exchanges) + 1} is invalid: expected 'Input:', a text, "
        f"and on a line of its own 'Output:' with one of {', '.join(LABELS)}"
    )
