"""Which characters belong to scripts that part no words by spaces, and which are marks on the letter before them."""

import re
import unicodedata

# Thai and Lao, Myanmar, Khmer, kana, Chinese characters; as classes of a regular expression, without brackets.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
# Korean parts words, but writes particles and endings on to them.
HANGUL = "\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3"
PAIRED = _UNSPACED + HANGUL
# Vowels and tones that a letter carries, from Hebrew to Khmer: no letters to `re`, but parts of words.
MARKS = "".join(chr(code) for code in range(0x300, 0x1800) if unicodedata.category(chr(code)).startswith("M"))
_TOKENS = re.compile(rf"[{PAIRED}]|[^\W{PAIRED}]+|[^\w\s]")
_PAIRED = re.compile(f"[{PAIRED}]")
_LETTERS = 3  # of other scripts than the Latin one, that make about one token


def paired(text: str) -> int:
    """How many characters of a text are of scripts whose words cannot be told apart by spaces."""
    return 0 if text.isascii() else len(_PAIRED.findall(text))


def tokens(text: str) -> int:
    """About how many tokens a tokenizer makes of a text: one of an English word, a mark or a Chinese character."""
    found = _TOKENS.findall(text)
    return len(found) if text.isascii() else sum(1 if run.isascii() else -(-len(run) // _LETTERS) for run in found)
