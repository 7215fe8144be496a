"""BM25: finding passages by their words.

A row's score for a word is that of Lucene's BM25, computed when the index is built:

    idf * f / (f + k1 * (1 - b + b * length / mean length)),    idf = log(1 + (N - n + 0.5) / (n + 0.5))

with f how often the word is in the row, n in how many of N rows it is, and lengths in words. The scores lie word by
word in arrays as bm25s (https://github.com/xhluca/bm25s, method "lucene") keeps them, and bm25s can open them. bm25s
itself does not build an index in less memory than its texts take, nor score given rows or shares of rare words, which
the score threshold needs. Its search sums an array as long as the index for every question; `Sparse.search` takes the
rarest words first and stops adding rows once the remaining words cannot lift one into the best k (MaxScore: Turtle and
Flood, Query evaluation: strategies and optimizations, 1995). The result is the same.
"""

import bisect
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa

from openchatkit import progress
from openchatkit.errors import UserError
from openchatkit.formats.retrieval_index import SparseRecord
from openchatkit.retrieval.tokenization import content_words, tokenize

K1, B = 1.2, 0.75
_PIECE = 8192  # rows at a time
_FEW = 64  # rows that may contain a rare word in a small index; in a large one, a quarter of all rows
_NAME = 4  # weight of a word with digits, relative to others
_MOST_WORDS = 64  # of a question: fewer are enough to find a pasted page
_SCORE, _ROW, _START = np.dtype("<f4"), np.dtype("<i4"), np.dtype("<i8")
_ENTRY = np.dtype([("word", "<i4"), ("row", "<i4"), ("count", "<i4")])
_WORDS = pa.schema([("word", pa.large_string()), ("weight", pa.float32()), ("highest", pa.float32())])


@dataclass(frozen=True)
class SparsePaths:
    """Paths of the files of a BM25 index; see `formats.retrieval_index`."""

    scores: Path
    postings: Path
    starts: Path
    words: Path


def build(texts: Iterable[str], paths: SparsePaths, *, rows: int, temporary: Path) -> SparseRecord:
    """Write the index of `rows` texts; `temporary` is a file that takes 12 bytes for each distinct word of a text.

    Memory grows with the vocabulary, not with the texts.
    """
    numbers: dict[str, int] = {}
    lengths = np.zeros(rows, np.int32)
    sizes = []
    try:
        with open(temporary, "wb") as file, progress.bar(rows, "words counted", unit="row") as bar:
            for first, entries in _count_words(texts, numbers, lengths):
                file.write(entries.tobytes())
                sizes.append(len(entries))
                bar.update(min(_PIECE, rows - first))
        return _arrange(temporary, sizes, numbers, lengths, paths)
    finally:
        temporary.unlink(missing_ok=True)


def _count_words(
    texts: Iterable[str], numbers: dict[str, int], lengths: np.ndarray
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the first number and the entries of each piece of texts; numbers the words and fills in the lengths."""
    texts = iter(texts)
    first = 0
    # Words become numbers one text at a time: as strings, those of a piece would take ten times the memory.
    while piece := [_number_words(text, numbers) for text in islice(texts, _PIECE)]:
        lengths[first : first + len(piece)] = sizes = [len(text) for text in piece]
        flat = np.concatenate(piece)
        keys, counts = np.unique(np.repeat(np.arange(len(piece)), sizes) << 32 | flat, return_counts=True)
        entries = np.empty(len(keys), _ENTRY)
        entries["word"], entries["row"], entries["count"] = keys & 0xFFFFFFFF, first + (keys >> 32), counts
        yield first, entries
        first += len(piece)
    assert first == len(lengths), (first, len(lengths))


def _number_words(text: str, numbers: dict[str, int]) -> np.ndarray:
    return np.array([numbers.setdefault(word, len(numbers)) for word in tokenize(text)], np.int32)


def _arrange(
    temporary: Path, sizes: list[int], numbers: dict[str, int], lengths: np.ndarray, paths: SparsePaths
) -> SparseRecord:
    """Sort the entries by word, then row, a piece at a time; score them."""
    rows, mean = len(lengths), max(float(lengths.mean()), 1e-9)
    vocabulary = sorted(numbers)
    ranks = np.empty(len(numbers), np.int64)
    ranks[[numbers[word] for word in vocabulary]] = np.arange(len(vocabulary))
    found_in = np.zeros(len(vocabulary), np.int64)
    for entries in _pieces(temporary, sizes):
        found_in += np.bincount(ranks[entries["word"]], minlength=len(vocabulary))
    weights = np.log(1 + (rows - found_in + 0.5) / (found_in + 0.5)).astype(_SCORE)
    starts = np.concatenate([[0], np.cumsum(found_in)]).astype(_START)
    heads, highest = starts[:-1].copy(), np.zeros(len(vocabulary), _SCORE)
    scores, postings = _create(paths.scores, _SCORE, starts[-1]), _create(paths.postings, _ROW, starts[-1])
    with progress.bar(int(starts[-1]), "words arranged", unit="entry") as bar:
        for entries in _pieces(temporary, sizes):
            ranked = ranks[entries["word"]]
            order = np.argsort(ranked, kind="stable")
            entries, ranked = entries[order], ranked[order]
            present, begin, count = np.unique(ranked, return_index=True, return_counts=True)
            places = np.repeat(heads[present] - begin, count) + np.arange(len(entries))
            often = entries["count"].astype(_SCORE)
            fullness = often / (often + K1 * (1 - B + B * lengths[entries["row"]] / mean))
            scored = (weights[ranked] * fullness).astype(_SCORE)
            scores[places], postings[places] = scored, entries["row"]
            heads[present] += count
            if len(present):
                highest[present] = np.maximum(highest[present], np.maximum.reduceat(scored, begin))
            bar.update(len(entries))
    begins = _create(paths.starts, _START, len(starts))
    begins[:] = starts
    for array in (scores, postings, begins):
        if isinstance(array, np.memmap):
            array.flush()
    table = pa.record_batch([pa.array(vocabulary, pa.large_string()), weights, highest], schema=_WORDS)
    with pa.OSFile(str(paths.words), "wb") as file, pa.ipc.new_file(file, _WORDS) as writer:
        writer.write_batch(table)
    return SparseRecord(K1, B, len(vocabulary), int(starts[-1]), round(mean, 3))


def _pieces(temporary: Path, sizes: list[int]) -> Iterator[np.ndarray]:
    with open(temporary, "rb") as file:
        for size in sizes:
            yield np.frombuffer(file.read(size * _ENTRY.itemsize), _ENTRY)


def _create(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    """Create an array in a new file, to be filled by memory map.

    Its disk space is allocated here: a map that finds none left ends the process.
    """
    with open(path, "wb") as file:
        header = {"descr": dtype.str, "fortran_order": False, "shape": (int(size),)}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        if not size:
            return np.empty(0, dtype)  # an empty file cannot be mapped
        begin, length = file.tell(), int(size) * dtype.itemsize
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), begin, length)
        else:
            file.truncate(begin + length)
    return np.memmap(path, dtype, "r+", begin, (int(size),))


class Sparse:
    """A BM25 index by memory map, safe to read from several threads.

    UserError: a file is not of the kind and size that the record says.
    """

    def __init__(self, paths: SparsePaths, record: SparseRecord, rows: int) -> None:
        self._rows = rows
        self._scores = _open(paths.scores, _SCORE, record.entries)
        self._postings = _open(paths.postings, _ROW, record.entries)
        self._starts = _open(paths.starts, _START, record.words + 1)
        try:
            self._file = pa.memory_map(str(paths.words), "r")
            batch = pa.ipc.open_file(self._file).get_batch(0)
            if batch.schema != _WORDS or batch.num_rows != record.words:
                raise ValueError(f"it holds {batch.num_rows:,} words, the manifest says {record.words:,}")
        except (ValueError, OSError) as error:
            raise UserError(f"{paths.words} is not a table of words: {error}; build the index again") from error
        self._words, self._weights, self._highest = batch.columns

    def search(self, query: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and numbers of the k best rows, best first; fewer if fewer have a word in common."""
        known = sorted(self._find_words(query), key=lambda word: -self._highest[word].as_py())
        above = [self._highest[word].as_py() for word in known]
        rows, scores = np.empty(0, np.int64), np.empty(0, _SCORE)
        for number, word in enumerate(known):
            left = sum(above[number:])
            enough = _kth(scores, k)
            if enough >= left:  # a row without any of the previous words cannot be among the best
                possible = scores + left >= enough
                rows, scores = self._add_scores(word, rows[possible], scores[possible])
            else:
                rows, scores = _merge(rows, scores, *self._entries(word))
        order = np.lexsort((rows, -scores))[:k] if len(rows) <= 4 * k else _best(rows, scores, k)
        return scores[order], rows[order]

    def scores(self, query: str, rows: np.ndarray) -> np.ndarray:
        """Return the scores of these rows, 0 without a word in common: float32 [n]."""
        order = np.argsort(rows, kind="stable")
        ranked, found = rows[order], np.zeros(len(rows), _SCORE)
        for word in self._find_words(query):
            found = self._add_scores(word, ranked, found)[1]
        result = np.empty_like(found)
        result[order] = found
        return result

    def shares(self, query: str, rows: np.ndarray) -> np.ndarray:
        """Return the share of what a question is about that each row contains, by its rare words: float64 [n], 0 to 1.

        A rare word is not a stop word, and few rows contain it. Each word of the question has the weight of its rarity:
        a stop word none, a word of no row as much as one of a single row, and a number or a code such as `E4021` four
        times as much.
        """
        few = max(_FEW, self._rows // 4)
        found, whole = np.zeros(len(rows)), 0.0
        numbers = {self._words[number].as_py(): number for number in self._find_words(query)}
        for word in content_words(query):
            number = numbers.get(word)
            weight = self.rarest if number is None else float(self._weights[number].as_py())
            weight *= _NAME if any(character.isdigit() for character in word) else 1
            whole += weight
            if number is not None and len(postings := self._entries(number)[0]) <= few:
                at = np.minimum(np.searchsorted(postings, rows), len(postings) - 1)
                found += weight * (postings[at] == rows)
        return found / max(whole, 1e-9)

    def vocabulary(self) -> list[str]:
        """Return all words, sorted: the number of a word in the arrays is its place here."""
        return self._words.to_pylist()

    def close(self) -> None:
        """Close the map of the words; those of the arrays close with the last reference."""
        self._words = self._weights = self._highest = None
        self._file.close()

    @property
    def rarest(self) -> float:
        """Weight of a word that is in one row; no score for a single word reaches it."""
        return math.log(1 + (self._rows - 0.5) / 1.5)

    def _find_words(self, query: str) -> list[int]:
        """Return the numbers of the words of a question that are in the index; of a long one, the 64 of most weight."""
        known = []
        for word in dict.fromkeys(tokenize(query)):
            number = bisect.bisect_left(range(len(self._words)), word, key=lambda at: self._words[at].as_py())
            if number < len(self._words) and self._words[number].as_py() == word:
                known.append(number)
        return sorted(known, key=lambda number: -self._weights[number].as_py())[:_MOST_WORDS]

    def _entries(self, word: int) -> tuple[np.ndarray, np.ndarray]:
        first, end = int(self._starts[word]), int(self._starts[word + 1])
        return self._postings[first:end], self._scores[first:end]

    def _add_scores(self, word: int, rows: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Add the scores for a word to those of ascending rows."""
        postings, values = self._entries(word)
        at = np.minimum(np.searchsorted(postings, rows), len(postings) - 1)
        return rows, scores + np.where(postings[at] == rows, values[at], np.float32(0))


def _open(path: Path, dtype: np.dtype, size: int) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r" if size else None, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} cannot be read: {error}; build the index again") from error
    if array.shape != (size,) or array.dtype != dtype:
        raise UserError(
            f"{path} holds {array.dtype} {array.shape}, the manifest says {dtype} {(size,)}: build the index again"
        )
    return np.asarray(array)


def _kth(scores: np.ndarray, k: int) -> float:
    """Return the k-th highest score; -1 if there are fewer."""
    return float(np.partition(scores, len(scores) - k)[len(scores) - k]) if len(scores) >= k else -1.0


def _best(rows: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    some = np.flatnonzero(scores >= _kth(scores, k))
    return some[np.lexsort((rows[some], -scores[some]))[:k]]


def _merge(rows: np.ndarray, scores: np.ndarray, more: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Merge two ascending lists of rows; the scores of rows in both are added."""
    if not len(rows):
        return more.astype(np.int64), values.astype(_SCORE)
    every = np.concatenate([rows, more])
    order = np.argsort(every, kind="stable")
    every = every[order]
    first = np.flatnonzero(np.concatenate([[True], every[1:] != every[:-1]]))
    return every[first], np.add.reduceat(np.concatenate([scores, values])[order], first)
