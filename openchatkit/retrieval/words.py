"""What counts as a word for BM25: the same in an index and in a question.

Text is taken as NFKC, cut at what is no letter or digit, and case-folded. A word in camel case counts whole and in its
parts, so that `getObject` is found by "get object" and `GitHub` by "github". Of plurals, the singular counts, but not
within a name such as `json.dumps`, where an ending tells one thing from another. Of scripts that part no words, such as
Chinese, Japanese and Thai, and of Korean, whose particles are written on to a word, pairs of characters count, a letter
with its marks as one. The points of Arabic and Hebrew, which few write, are passed over, and English words that say
nothing about a subject are left out.
"""

import re
import unicodedata
from collections.abc import Iterator

from openchatkit.retrieval.scripts import HANGUL, MARKS, PAIRED

LONGEST = 64  # characters; what is longer is no word: an encoded file, say
# Letters and digits; those of the first group are part of a name: joined to others by a point, a colon or a low line.
_RUN = rf"[^\W_]+(?:[{MARKS}]+[^\W_]*)*"
_RUNS = re.compile(rf"((?<=[\w.:][._:]){_RUN}|{_RUN}(?=[._:]+[^\W_]))|{_RUN}")
_HUMPS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_PAIRED = re.compile(f"([{PAIRED}][{PAIRED}{MARKS}]*)")
_LETTER = re.compile(f".[{MARKS}]*")
_SYLLABLES = re.compile(f"[{HANGUL}]{{2}}")
_POINTS = re.compile("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u0640\u064b-\u065f\u0670]")
_EMPTY_WORDS = """
a about am an and are as at be been but by can could d did do does for from had has have he her his how i if in into is
it its ll m me my no not of on or our re s she should so such t than that the their them then there these they this to
too us ve very was we were what when where which who why will with would you your
"""
_EMPTY = frozenset(_EMPTY_WORDS.split())


def words(text: str) -> list[str]:
    """The words of a text in order, repeated ones too."""
    return [word for word, _ in terms(text)]


def terms(text: str) -> Iterator[tuple[str, bool]]:
    """The words of a text in order, repeated ones too, each with whether it is part of a name such as `json.dumps`."""
    for match in _RUNS.finditer(_normal(text)):
        run, in_name = match[0], match[1] is not None
        for word in _of_ascii(run, in_name) if run.isascii() else _of_other(run):
            yield word, in_name


def singular(word: str) -> str:
    """A lower-case word without the ending of an English plural: the S stemmer of Harman, How effective is suffixing?

    (JASIS 42, 1991). Words of up to three letters stay, since many are abbreviations.
    """
    if len(word) <= 3 or not word.endswith("s") or word.endswith(("us", "ss")):
        return word
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return f"{word[:-3]}y"
    return word[:-1]


def stands_in(title: str, question: str) -> bool:
    """Whether a question holds a title whole, in its own case, and not as a part of a longer name."""
    return bool(title) and re.search(rf"(?<![\w.]){re.escape(title)}(?!\.?\w)", question) is not None


def _of_ascii(run: str, in_name: bool) -> list[str]:
    word = run.lower()
    if word in _EMPTY or len(word) > LONGEST:
        return []
    parts = [] if word == run or run[1:] == word[1:] or run.isupper() else _HUMPS.split(run)
    if len(parts) > 1:
        return [word, *(singular(part.lower()) for part in parts)]
    return [word if in_name else singular(word)]


def _of_other(run: str) -> list[str]:
    found = []
    for piece in _PAIRED.split(run):
        if _PAIRED.fullmatch(piece):
            letters = _LETTER.findall(piece)
            found += ["".join(letters[at : at + 2]) for at in range(max(1, len(letters) - 1))]
            if _SYLLABLES.fullmatch(piece):
                found.append(piece[0])  # a word of one syllable, and its particle
        elif piece and len(piece) <= LONGEST:
            found.append(piece.casefold())
    return [word for word in found if word not in _EMPTY]


def _normal(text: str) -> str:
    return text if text.isascii() else _POINTS.sub("", unicodedata.normalize("NFKC", text))
