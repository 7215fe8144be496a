"""How well an index finds passages, and how fast: recall, reciprocal rank, nDCG, and the time of each step.

A question names its targets; a passage hits a target if it matches every field of it. Several passages that hit one
target count once, at the first of them.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from openchatkit import jsonl, progress
from openchatkit.errors import UserError
from openchatkit.retrieval.index import Index, Mode
from openchatkit.retrieval.passage import Hit, Passage
from openchatkit.retrieval.rerank import DEPTH, Reranker

_DEPTHS = (1, 5, 10)
_MOST = max(_DEPTHS)
# The rows of a report: the parts of the index that are searched.
_MODES: dict[str, Mode] = {"BM25": "sparse", "dense": "dense", "fused": "fused"}
_RERANKED = "reranked"


@dataclass(frozen=True)
class Target:
    """Fields that a passage must match: source (or the end of its path), title, place, and a text that it contains."""

    source: str = ""
    title: str = ""
    place: str = ""
    text: str = ""

    def matches(self, passage: Passage) -> bool:
        """Whether a passage matches all fields."""
        source = passage.source == self.source or passage.source.endswith(f"/{self.source}")
        return (
            (not self.source or source)
            and self.title in ("", passage.title)
            and self.place in ("", passage.place)
            and self.text in passage.text
        )


@dataclass(frozen=True)
class EvaluationQuestion:
    """A question and the passages that answer it."""

    query: str
    targets: tuple[Target, ...]


@dataclass
class SearchMetrics:
    """Means over all questions; `milliseconds` has the 50th and 99th percentile of each step of a search."""

    questions: int
    recall: dict[int, float]
    mrr: float
    ndcg: float
    milliseconds: dict[str, tuple[float, float]] = field(default_factory=dict)


def gains(passages: Sequence[Passage], targets: Sequence[Target]) -> list[int]:
    """Return for each passage in order how many targets it is the first to hit."""
    left = list(targets)
    found = []
    for passage in passages:
        hit = [target for target in left if target.matches(passage)]
        left = [target for target in left if target not in hit]
        found.append(len(hit))
    return found


def recall(found: Sequence[int], targets: int, k: int) -> float:
    """Return the share of the targets that the first k passages hit."""
    return sum(found[:k]) / targets


def reciprocal_rank(found: Sequence[int], k: int) -> float:
    """Return 1 / rank of the first of k passages that hits a target; 0 if none does."""
    return next((1 / place for place, gain in enumerate(found[:k], 1) if gain), 0.0)


def ndcg(found: Sequence[int], targets: int, k: int) -> float:
    """Return the normalised discounted cumulative gain of the first k passages; rank i has the weight 1 / log2(i + 1).

    The ideal order has a target at each of the first ranks (Järvelin and Kekäläinen, 2002).
    """
    weights = 1 / np.log2(np.arange(2, k + 2))
    gained = np.asarray(found[:k], np.float64) @ weights[: len(found[:k])]
    return float(min(gained / weights[: min(targets, k)].sum(), 1.0))


def read_questions(path: Path) -> list[EvaluationQuestion]:
    """Read questions: rows {"query": ..., "source": ...}, with "title", "place" or "text" in addition or instead.

    One of these may be a list: the other fields hold for each target.
    UserError: no such file, or a row of another kind.
    """

    def refuse(number: int, error: Exception) -> NoReturn:
        raise UserError(
            f"{path}:{number} is no question ({error}): expected "
            '{"query": "...", "source": "..."}, with "title", "place" or "text" beside or instead'
        ) from error

    try:
        found = list(jsonl.read(path, _parse_question, refuse, skip_blank=True))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not found:
        raise UserError(f'{path} holds no questions: expected rows such as {{"query": "...", "source": "..."}}')
    return found


def evaluate(
    index: Index, questions: Sequence[EvaluationQuestion], *, reranker: Reranker | None = None
) -> dict[str, SearchMetrics]:
    """Evaluate the search by words, by vectors, by both, and reranked, as far as the index has the parts.

    No score threshold is used.
    """
    modes = {name: mode for name, mode in _MODES.items() if index.record.encoder is not None or mode == "sparse"}
    ways: dict[str, tuple[Mode, Reranker | None]] = {name: (mode, None) for name, mode in modes.items()}
    if reranker is not None:
        ways[_RERANKED] = (list(modes.values())[-1], reranker)
    found: dict[str, list[list[int]]] = {name: [] for name in ways}
    times: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
    for mode, judge in ways.values():
        _answer(index, questions[0].query, mode, judge, {})  # loads everything that is loaded at first use
    with progress.bar(len(questions), "questions asked", unit="question") as bar:
        for question in questions:
            for name, (mode, judge) in ways.items():
                hits = _answer(index, question.query, mode, judge, times[name])
                found[name].append(gains(hits, question.targets))
            bar.update()
    targets = [len(question.targets) for question in questions]
    return {name: _summarize(found[name], targets, times[name]) for name in ways}


def table(figures: Mapping[str, SearchMetrics]) -> str:
    """Return a report as a Markdown table: shares in percent, times in milliseconds as 50th / 99th percentile."""
    parts = list(dict.fromkeys(part for each in figures.values() for part in each.milliseconds))
    head = ["", *(f"R@{k}" for k in _DEPTHS), f"MRR@{_MOST}", f"nDCG@{_MOST}", *(f"{part} ms" for part in parts)]
    lines = [f"| {' | '.join(head)} |", f"|{'-|' * len(head)}"]
    for name, each in figures.items():
        shares = [f"{100 * each.recall[k]:.1f}" for k in _DEPTHS]
        cells = [name, *shares, f"{each.mrr:.3f}", f"{each.ndcg:.3f}"]
        cells += ["{:.1f} / {:.1f}".format(*each.milliseconds[p]) if p in each.milliseconds else "" for p in parts]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _answer(
    index: Index, query: str, mode: Mode, reranker: Reranker | None, times: dict[str, list[float]]
) -> list[Hit]:
    """Return the passages for a question, and append the milliseconds of each step to `times`."""

    @contextlib.contextmanager
    def timed(part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        times.setdefault(part, []).append(1000 * (time.perf_counter() - start))

    vector = None
    if mode != "sparse":
        with timed("encode"):
            vector = index.encode(query)
    with timed("search"):
        ranking = index.rank(query, vector, DEPTH if reranker else _MOST, mode=mode, score_threshold=False)
    with timed("fetch"):
        hits = index.fetch(ranking)
    if reranker is not None:
        with timed("rerank"):
            hits = reranker.rerank(query, hits, _MOST)
    return hits


def _summarize(found: list[list[int]], targets: list[int], times: dict[str, list[float]]) -> SearchMetrics:
    pairs = list(zip(found, targets, strict=True))
    return SearchMetrics(
        len(pairs),
        {k: float(np.mean([recall(gain, count, k) for gain, count in pairs])) for k in _DEPTHS},
        float(np.mean([reciprocal_rank(gain, _MOST) for gain, _ in pairs])),
        float(np.mean([ndcg(gain, count, _MOST) for gain, count in pairs])),
        {part: tuple(np.percentile(values, (50, 99)).tolist()) for part, values in times.items()},
    )


def _parse_question(row: dict[str, Any]) -> EvaluationQuestion:
    kinds = [kind.name for kind in fields(Target)]
    query = row["query"]
    given = {kind: row[kind] for kind in kinds if row.get(kind)}
    lists = [kind for kind, value in given.items() if isinstance(value, list)]
    if len(lists) > 1:
        raise ValueError(f"{lists[0]} and {lists[1]} are both lists")
    several = [{lists[0]: value} for value in given[lists[0]]] if lists else [{}]
    targets = [Target(**{**given, **each}) for each in several if given]
    if not isinstance(query, str) or not query.strip() or not targets:
        raise ValueError("it names no question or no target")
    if not all(value and isinstance(value, str) for each in several for value in {**given, **each}.values()):
        raise ValueError("a target is not text")
    return EvaluationQuestion(query, tuple(dict.fromkeys(targets)))
