"""Texts that users type and read: yes or no, a text on one line, another library's error in a message of ours."""

# Characters of a line that is typed or piped: far beyond any model's context, and tokenised in a second or two.
MAX_LINE = 1 << 20


def parse_bool(text: str) -> bool | None:
    """Return the answer that a text gives to a yes/no question, None where it gives none."""
    answers = {"yes": True, "on": True, "true": True, "1": True, "no": False, "off": False, "false": False, "0": False}
    return answers.get(text.strip().lower())


def shorten(text: str, limit: int = 60) -> str:
    """Return a text on one line of at most `limit` characters, which ends with `...` if more is left."""
    line = " ".join(text.split())
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def reason_of(error: BaseException) -> str:
    """Return an error for a message: one line of at most 300 characters, or its type where it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
