"""A sample as readable text, cut where its tokens change from only read to trained on.

`terminal` and `page` show it.
"""

import itertools
import random
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from openchatkit.data.batch import IGNORE
from openchatkit.data.dataset import Dataset
from openchatkit.data.tokenizer import Tokenizer

# Characters that may hide text, reorder it or control a terminal; their Unicode category decides.
_SUSPECT = re.compile("[^\n -~\u00a1-\u00ac\u00ae-\u02ff]")
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@dataclass(frozen=True)
class Span:
    """Adjacent tokens of one kind, with their text, control characters included; None where it is not shown.

    trained: each of these tokens is a label that counts in the loss. special: a token such as end-of-text, spelled
    out. border: a document begins here, and does not attend to anything before it.
    """

    text: str | None
    tokens: int
    trained: bool = False
    special: bool = False
    border: bool = False


@dataclass(frozen=True)
class Sample:
    """One row of a batch: `trained` of its `length` labels count in the loss, and after the tokens in `spans` come
    `padding` more. `local` is its number among its source's samples."""

    number: int
    source: str
    local: int
    length: int
    trained: int
    padding: int
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class _Token:
    id: int
    trained: bool
    special: bool
    border: bool

    def joins(self, before: "_Token") -> bool:
        return (self.trained, self.special, self.border) == (before.trained, before.special, False)


def choose(dataset: Dataset, total: int, count: int, *, seed: int) -> list[int]:
    """Draw `count` of the sample numbers below `total`, or all if there are fewer, by `seed`; sources take turns."""
    generator = random.Random(seed)
    tries = 64 * count
    drawn = range(total) if total <= tries else (generator.randrange(total) for _ in range(tries))
    numbers = list(dict.fromkeys(drawn))
    generator.shuffle(numbers)
    by_source: dict[int, list[int]] = {}
    for number in numbers:
        by_source.setdefault(dataset.interleaving.locate(number)[0], []).append(number)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_source.values()))
    return sorted(itertools.islice((number for number in turns if number is not None), count))


def read_sample(dataset: Dataset, number: int, tokenizer: Tokenizer, *, ends: int | None = None) -> Sample:
    """Read sample `number` as text; with `ends`, only so many tokens of a long one's beginning and of its end."""
    batch = dataset.batch(number, 1)
    tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
    document_starts = None if batch.document_starts is None else batch.document_starts[0].tolist()
    source, local = dataset.interleaving.locate(number)
    padding = _count_padding(tokens, labels, document_starts, tokenizer)
    shown = list(_order_tokens(tokens[: len(tokens) - padding], labels, document_starts, _Special(tokenizer)))
    return Sample(
        number=number,
        source=dataset.sources[source].name,
        local=local,
        length=len(labels),
        trained=len(labels) - labels.count(IGNORE),
        padding=padding,
        spans=tuple(_cut_spans(shown, tokenizer, ends)),
    )


def visible(text: str) -> str:
    """Spell out the characters of `text` that hide or reorder text or control a terminal, newlines excepted.

    Data can then neither drive a terminal nor look like something else in a page.
    """
    return _SUSPECT.sub(lambda match: _spell_out(match[0]), text)


def _spell_out(character: str) -> str:
    code = ord(character)
    if unicodedata.category(character) not in _UNSEEN:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


class _Special(dict[int, bool]):
    """Id -> whether it is a special token, which has no text of its own."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bool:
        spelled, text = (self._tokenizer.decode([token], special=special) for special in (True, False))
        self[token] = bool(spelled) and not text
        return self[token]


def _count_padding(
    tokens: Sequence[int], labels: Sequence[int], document_starts: Sequence[int] | None, tokenizer: Tokenizer
) -> int:
    """Count the tokens of padding at the end of a row. Where documents are kept apart, so is each of these."""
    size = 0
    for place in reversed(range(len(tokens))):
        apart = document_starts is None or document_starts[place] == place
        if tokens[place] != tokenizer.padding or labels[place] != IGNORE or not apart:
            break
        size += 1
    # Where end-of-text also pads, the first of them is the document's own, unless that is never fed.
    return size - 1 if size and document_starts is None and tokenizer.padding == tokenizer.end_of_text else size


def _order_tokens(
    tokens: Sequence[int], labels: Sequence[int], document_starts: Sequence[int] | None, special: _Special
) -> Iterator[_Token]:
    """Yield the tokens that are read or predicted, in order.

    The label at place t is the next token. That is tokens[t + 1], unless the row or the document ends there: then the
    label is only predicted, and comes in between.
    """
    trained = False
    for place, (token, label) in enumerate(zip(tokens, labels, strict=False)):
        yield _Token(
            token, trained, special[token], document_starts is not None and document_starts[place] == place > 0
        )
        begins = document_starts is not None and place + 1 < len(tokens) and document_starts[place + 1] == place + 1
        trained = label != IGNORE and not begins and tokens[place + 1 : place + 2] == [label]
        if label != IGNORE and not trained:
            yield _Token(label, True, special[label], False)


def _cut_spans(shown: Sequence[_Token], tokenizer: Tokenizer, ends: int | None) -> Iterator[Span]:
    """Cut tokens into spans. A character whose bytes lie in two of them goes to the later one."""
    borders = {0, *(i for i in range(1, len(shown)) if not shown[i].joins(shown[i - 1])), len(shown)}
    gap = range(ends, len(shown) - ends) if ends and len(shown) > 3 * ends else range(0)
    if gap:
        borders = {border for border in borders if border not in gap} | {gap.start, gap.stop}
    ids = [token.id for token in shown]
    text = tokenizer.decode(ids)
    taken = 0
    for first, stop in itertools.pairwise(sorted(borders)):
        end = _count_equal(text, tokenizer.decode(ids[:stop]), taken) if stop < len(shown) else len(text)
        if gap and first == gap.start:
            yield Span(None, stop - first)
        else:
            like = shown[first]
            yield Span(text[taken:end], stop - first, like.trained, like.special, like.border)
        taken = end


def _count_equal(text: str, prefix: str, least: int) -> int:
    """Return how many of the first characters of both are the same, at least `least`.

    They differ at most in the replacement for half a character at the end of `prefix`.
    """
    end = min(len(prefix), len(text))
    while end > least and text[:end] != prefix[:end]:
        end -= 1
    return max(end, least)
