"""The encoding of text that is not valid UTF-8: guessed from its bytes, and always noted."""

import codecs
import re
from dataclasses import dataclass

from openchatkit.retrieval.reading.document import Unreadable

_MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_WESTERN = "cp1252"
_CONTROLS = re.compile(rb"[\0-\x08\x0e-\x1a\x1c-\x1f]")
_NO_GUESS = ["utf_7", "utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le"]  # have marks, or zeros
_OF_MANY_BYTES = [
    *("big5", "big5hkscs", "cp932", "cp949", "cp950", "euc_jis_2004", "euc_jisx0213", "euc_jp", "euc_kr", "gb18030"),
    *("gb2312", "gbk", "hz", "johab", "shift_jis", "shift_jis_2004", "shift_jisx0213"),
]
_FEW = 32  # bytes that are not ASCII: too few to recognise words of Chinese characters
_LATIN_SHARE = 0.3  # in a Latin alphabet, a smaller share of bytes are accented letters
_NO_WORSE = 0.02  # in charset-normalizer's coherence, from 0 to 1
_SAMPLE = 1 << 16  # bytes; enough to guess from


@dataclass(frozen=True)
class Encoding:
    """How bytes are read as text; `note` says what was guessed, empty if nothing was."""

    name: str
    note: str = ""

    @property
    def errors(self) -> str:
        return "replace" if self.note else "strict"


def detect_mark(data: bytes) -> str | None:
    """Return the encoding given by a byte order mark, if there is one."""
    return next((name for mark, name in _MARKS if data.startswith(mark)), None)


def decode(data: bytes, name: str, notes: list[str]) -> str:
    """Decode bytes in an encoding, or else in the one guessed; Unreadable: they are not text."""
    try:
        return data.decode(name)
    except UnicodeError:
        found = guess(data, name)
        notes.append(found.note)
        return data.decode(found.name, found.errors)


def guess(sample: bytes, name: str) -> Encoding:
    """Guess the encoding of bytes that are not all valid in `name`: still `name` if few bytes are invalid.

    Unreadable: they are not text in any encoding.
    """
    shown_name, of_zeros = name.removesuffix("-sig").upper(), name.startswith("utf-16")
    try:
        text = sample.decode(name, "replace")
    except UnicodeError:  # not a text encoding
        text = "\ufffd"
    few = 2 * text.count("\ufffd") <= len(text) - sum(map(str.isascii, text))
    if not (few if of_zeros else 20 * len(_CONTROLS.findall(sample)) <= len(sample) and b"\0" not in sample):
        raise Unreadable(f"holds bytes that are not {shown_name}: save it as UTF-8")
    if few:
        return Encoding(name, f"some bytes are not {shown_name}: \ufffd replaces them")
    found = _guess_legacy(sample[:_SAMPLE])
    return Encoding(found, f"is not {shown_name}: read as {'Windows-1252' if found == _WESTERN else found}")


def _guess_legacy(sample: bytes) -> str:
    """Return the likeliest encoding of text that is not UTF-8: Windows-1252, unless another is clearly likelier."""
    try:
        import charset_normalizer
    except ImportError:
        raise Unreadable("is not UTF-8, and reading it needs a package: pip install charset-normalizer") from None
    others = sum(byte > 127 for byte in sample)
    excluded = _OF_MANY_BYTES if others < min(_FEW, _LATIN_SHARE * len(sample)) else []
    found = charset_normalizer.from_bytes(sample, cp_exclusion=[*_NO_GUESS, *excluded])
    best = found.best()
    western = next((each for each in found if _WESTERN in each.could_be_from_charset), None)
    if best is None or (western is not None and western.coherence >= best.coherence - _NO_WORSE):
        return _WESTERN
    return best.encoding
