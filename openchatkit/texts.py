"""Texts that users type and read: yes or no, a text on one line, another library's error in a message of ours."""

import re
import unicodedata

# Characters of a line that is typed or piped: far beyond any model's context, and tokenised in a second or two.
MAX_LINE = 1 << 20
# On one letter, of the Stream-Safe Text Format (UAX #15). Putting marks in order takes the square of their number.
_MOST_MARKS = 30
_MAYBE_MARKS = re.compile(rf"[^\w\s!-~]{{{_MOST_MARKS + 1},}}")


def parse_bool(text: str) -> bool | None:
    """Return the answer that a text gives to a yes/no question, None where it gives none."""
    answers = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}
    return answers.get(text.strip().lower())


def normalize(text: str) -> str:
    """Return a text in Unicode's form NFKC, with at most 30 marks on a letter; further ones are dropped."""
    return unicodedata.normalize("NFKC", _MAYBE_MARKS.sub(_drop_marks, text))


def _drop_marks(found: re.Match[str]) -> str:
    kept, marks = [], 0
    for character in found[0]:
        marks = marks + 1 if unicodedata.combining(character) else 0
        if marks <= _MOST_MARKS:
            kept.append(character)
    return "".join(kept)


def shorten(text: str, limit: int = 60) -> str:
    """Return a text on one line of at most `limit` characters, which ends with `...` if more is left."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def reason_of(error: BaseException) -> str:
    """Return an error for a message: one line of at most 300 characters, or its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
