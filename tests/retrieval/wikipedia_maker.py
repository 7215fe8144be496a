"""A small Wikipedia as it is published: snippets of articles as Parquet, and a faiss index of their vectors."""

import io
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tiny_encoder import WORDS

from openchatkit.formats.wikipedia_index import INDEX, PUBLISHED

REPOSITORY = "datasets/ChristophSchuhmann/wikipedia-3sentence-level-retrieval-index"
ARTICLES = 60
LENGTH = 6  # snippets an article


def snippets(seed: int = 0) -> list[list[str]]:
    """Texts by article: each article has words of its own, so that its snippets are near each other."""
    random = np.random.default_rng(seed)
    articles = []
    for _ in range(ARTICLES):
        own = random.choice(WORDS, 6, replace=False)
        articles.append([" ".join(random.choice(own, 12)) for _ in range(LENGTH)])
    return articles


def parquet(articles: Sequence[Sequence[str]], *, columns: Sequence[str] = (), group: int = 50) -> bytes:
    """The published table; `columns` are taken from title, article_id, and id, which numbers the rows."""
    rows = [(number, at, text) for number, texts in enumerate(articles) for at, text in enumerate(texts)]
    every = {
        "title": [f"Article {number}" for number, _, _ in rows],
        "article_id": [1000 + number for number, _, _ in rows],
        "id": list(range(len(rows))),
        "text_snippet": [text for _, _, text in rows],
        "position_in_source_text": [at for _, at, _ in rows],
    }
    names = [*columns, "text_snippet", "position_in_source_text"]
    sink = io.BytesIO()
    pq.write_table(pa.table({name: every[name] for name in names}), sink, row_group_size=group)
    return sink.getvalue()


def index(vectors: np.ndarray, lists: int = 4) -> bytes:
    """The bytes of an IVF-PQ index for the inner product, as faiss writes them."""
    made = faiss.index_factory(vectors.shape[1], f"IVF{lists},PQ16x8", faiss.METRIC_INNER_PRODUCT)
    made.do_polysemous_training = False  # twenty seconds of reordering codes, which searching here never uses
    made.train(vectors)
    made.add(vectors)
    made.nprobe = lists
    return faiss.serialize_index(made).tobytes()


def published(articles: Sequence[Sequence[str]], vectors: np.ndarray, **options) -> dict[str, bytes]:
    """The two files of the hub."""
    return {INDEX: index(vectors), PUBLISHED: parquet(articles, **options)}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, body in files.items():
        (folder / name).write_bytes(body)
    return folder
