"""A sample as a person reads it: its tokens as text, cut where they change from read to trained on.

Nothing is drawn here: `terminal` and `page` do that.
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

# What may hide, reorder or command; the categories say which of these characters does.
_SUSPECT = re.compile("[^\n -~\u00a1-\u00ac\u00ae-\u02ff]")
_UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


@dataclass(frozen=True)
class Span:
    """A run of tokens of one kind, with their text as it was, control characters and all; None where it is left out.

    trained: each of these tokens is a label that counts in the loss. special: a token such as end-of-text, spelled
    out. border: a document begins here, and sees nothing of what is before it.
    """

    text: str | None
    tokens: int
    trained: bool = False
    special: bool = False
    border: bool = False


@dataclass(frozen=True)
class Sample:
    """One row of a batch: `trained` of its `length` labels count in the loss, and behind what `spans` show are
    `padding` more tokens. `local` is its number among its source's samples."""

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
    """`count` of the sample numbers below `total`, fewer if there are fewer, drawn by `seed`; sources take turns."""
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
    """Sample `number` as text; with `ends`, a long one keeps so many tokens of its beginning and of its end."""
    batch = dataset.batch(number, 1)
    tokens, labels = batch.tokens[0].tolist(), batch.labels[0].tolist()
    starts = None if batch.document_starts is None else batch.document_starts[0].tolist()
    source, local = dataset.interleaving.locate(number)
    padding = _padding(tokens, labels, starts, tokenizer)
    shown = list(_shown(tokens[: len(tokens) - padding], labels, starts, _Special(tokenizer)))
    return Sample(
        number=number,
        source=dataset.sources[source].name,
        local=local,
        length=len(labels),
        trained=len(labels) - labels.count(IGNORE),
        padding=padding,
        spans=tuple(_spans(shown, tokenizer, ends)),
    )


def visible(text: str) -> str:
    """`text` with every character spelled out that hides, reorders or commands, newlines aside: data cannot drive a
    terminal, nor show in a page as something else."""
    return _SUSPECT.sub(lambda match: _spelled(match[0]), text)


def _spelled(character: str) -> str:
    code = ord(character)
    if unicodedata.category(character) not in _UNSEEN:
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"<U+{code:04X}>"


class _Special(dict[int, bool]):
    """Whether an id stands for no text but for something that is spelled out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token: int) -> bool:
        spelled, text = (self._tokenizer.decode([token], special=special) for special in (True, False))
        self[token] = bool(spelled) and not text
        return self[token]


def _padding(tokens: Sequence[int], labels: Sequence[int], starts: Sequence[int] | None, tokenizer: Tokenizer) -> int:
    """How many tokens at the end of a row are padding. Where documents are set apart, so is each token of it."""
    size = 0
    for place in reversed(range(len(tokens))):
        apart = starts is None or starts[place] == place
        if tokens[place] != tokenizer.padding or labels[place] != IGNORE or not apart:
            break
        size += 1
    # Where end-of-text is also what pads, the first of them is the document's own, unless that is never fed.
    return size - 1 if size and starts is None and tokenizer.padding == tokenizer.end_of_text else size


def _shown(
    tokens: Sequence[int], labels: Sequence[int], starts: Sequence[int] | None, special: _Special
) -> Iterator[_Token]:
    """What is read or predicted, in order.

    The label at place t belongs to the token behind it. That is tokens[t + 1], unless the row or the document ends
    there: then the label is only predicted, and comes in between.
    """
    trained = False
    for place, (token, label) in enumerate(zip(tokens, labels, strict=False)):
        yield _Token(token, trained, special[token], starts is not None and starts[place] == place > 0)
        begins = starts is not None and place + 1 < len(tokens) and starts[place + 1] == place + 1
        trained = label != IGNORE and not begins and tokens[place + 1 : place + 2] == [label]
        if label != IGNORE and not trained:
            yield _Token(label, True, special[label], False)


def _spans(shown: Sequence[_Token], tokenizer: Tokenizer, ends: int | None) -> Iterator[Span]:
    """Cut tokens into spans. A character whose bytes lie in two of them goes to the later one."""
    borders = {0, *(i for i in range(1, len(shown)) if not shown[i].joins(shown[i - 1])), len(shown)}
    gap = range(ends, len(shown) - ends) if ends and len(shown) > 3 * ends else range(0)
    if gap:
        borders = {border for border in borders if border not in gap} | {gap.start, gap.stop}
    ids = [token.id for token in shown]
    text = tokenizer.decode(ids)
    taken = 0
    for first, stop in itertools.pairwise(sorted(borders)):
        end = _agreement(text, tokenizer.decode(ids[:stop]), taken) if stop < len(shown) else len(text)
        if gap and first == gap.start:
            yield Span(None, stop - first)
        else:
            like = shown[first]
            yield Span(text[taken:end], stop - first, like.trained, like.special, like.border)
        taken = end


def _agreement(text: str, prefix: str, least: int) -> int:
    """How many of the first characters of both are the same, at least `least`.

    They differ at most in what half a character at the end of `prefix` became.
    """
    end = min(len(prefix), len(text))
    while end > least and text[:end] != prefix[:end]:
        end -= 1
    return max(end, least)
