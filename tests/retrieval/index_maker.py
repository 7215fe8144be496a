"""Small indices for tests, with an encoder that needs no network."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from openchatkit.formats.retrieval_index import EncoderRecord, IndexRecord
from openchatkit.retrieval import ranking
from openchatkit.retrieval.snapshot import lock_for_writing, write_snapshot
from openchatkit.retrieval.table import PassageRow
from openchatkit.retrieval.tokenization import tokenize

TEXTS = [
    "The lighthouse keeper lights the lamp every evening.",
    "A kettle boils water for tea within three minutes.",
    "getObject returns the bytes of an object by its key.",
    "Sourdough bread rises overnight in a cool kitchen.",
    "The moon draws the tides of the sea twice a day.",
]


class WordEncoder:
    """The sum of a random direction for each word, at length 1: texts with common words are near each other."""

    name, digest, dimension = "words", "d" * 64, 256

    def encode(self, texts: Sequence[str], *, query: bool = False) -> np.ndarray:
        vectors = np.full((len(texts), self.dimension), 1e-3, np.float32)
        for number, text in enumerate(texts):
            for word in tokenize(text):
                seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
                vectors[number] += np.random.default_rng(seed).standard_normal(self.dimension)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def record(self) -> EncoderRecord:
        return EncoderRecord(self.name, self.digest, self.dimension, "cosine", 128)


def make(
    folder: Path,
    texts: Sequence[str] = TEXTS,
    *,
    encoder: WordEncoder | None = None,
    titles: Sequence[str] | None = None,
    **options,
) -> IndexRecord:
    titles = titles or [f"title {at}" for at in range(len(texts))]
    rows = [
        PassageRow(text, titles[at], "notes.txt", f"line {at + 1}", bytes([at]), 0, at) for at, text in enumerate(texts)
    ]
    vectors = [encoder.encode(texts)] if encoder else None
    if encoder and "score_threshold" not in options:
        options["score_threshold"] = ranking.measure_threshold(encoder, vectors[0])
    with lock_for_writing(folder):
        return write_snapshot(
            folder, rows=rows, vectors=vectors, encoder=encoder.record() if encoder else None, **options
        )
