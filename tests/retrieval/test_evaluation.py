"""`evaluation` against cases counted by hand, `question_sets`, and reports."""

import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
from tiny_encoder import make_encoder

from openchatkit.errors import UserError
from openchatkit.retrieval import evaluation, question_sets
from openchatkit.retrieval.building import operations
from openchatkit.retrieval.evaluation import EvaluationQuestion, SearchMetrics, Target
from openchatkit.retrieval.index import Index
from openchatkit.retrieval.passage import Passage
from openchatkit.retrieval.question_sets import Example


def test_measures_by_hand():
    # Two targets; the second passage hits one, the fourth the other.
    found = [0, 1, 0, 1, 0]
    assert [evaluation.recall(found, 2, k) for k in (1, 2, 3, 4, 10)] == [0, 0.5, 0.5, 1, 1]
    assert evaluation.reciprocal_rank(found, 10) == 0.5
    assert evaluation.reciprocal_rank(found, 1) == 0
    gained = 1 / math.log2(3) + 1 / math.log2(5)
    ideal = 1 / math.log2(2) + 1 / math.log2(3)
    assert evaluation.ndcg(found, 2, 10) == pytest.approx(gained / ideal)
    assert evaluation.ndcg(found, 2, 2) == pytest.approx(1 / math.log2(3) / ideal)
    assert evaluation.ndcg([1], 3, 1) == 1
    assert evaluation.ndcg([], 1, 10) == 0


def test_a_target_counts_once_and_a_passage_must_be_all_that_it_says():
    passages = [
        Passage("one two", source="/docs/a.txt", place="line 1"),
        Passage("three", source="/docs/a.txt", place="line 2"),
        Passage("one", title="T", source="/docs/aa.txt"),
    ]
    assert evaluation.gains(passages, [Target(source="a.txt")]) == [1, 0, 0]
    assert evaluation.gains(passages, [Target(source="a.txt", place="line 2"), Target(text="one")]) == [1, 1, 0]
    assert evaluation.gains(passages, [Target(source="docs/aa.txt", title="T"), Target(title="U")]) == [0, 0, 1]


def test_questions_of_a_file(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"query": "a", "source": ["x", "y"]}\n\n{"query": "b", "source": "x", "place": "page 2"}\n')
    assert evaluation.read_questions(path) == [
        EvaluationQuestion("a", (Target("x"), Target("y"))),
        EvaluationQuestion("b", (Target("x", place="page 2"),)),
    ]


def test_fields_beside_a_list_apply_to_each_target(tmp_path):
    path = tmp_path / "q.jsonl"
    row = '{"query": "a\u2028b", "source": "x.pdf", "place": ["page 1", "page 2"], "title": null}'
    path.write_bytes(b"\xef\xbb\xbf" + row.encode())  # as some editors begin a file
    [question] = evaluation.read_questions(path)
    assert question.query == "a\u2028b"
    assert question.targets == (Target(source="x.pdf", place="page 1"), Target(source="x.pdf", place="page 2"))


@pytest.mark.parametrize(
    "row",
    [
        '{"query": "a"}',
        '{"query": "", "source": "x"}',
        "[]",
        "no",
        '{"source": "x"}',
        '{"query": "a", "text": [1]}',
        '{"query": "a", "text": [""]}',
        '{"query": "a", "text": ["b"], "source": ["c"]}',
    ],
)
def test_a_row_that_is_not_a_question_is_named(tmp_path, row):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"query": "a", "source": "x"}}\n{row}\n')
    with pytest.raises(UserError, match=r'q\.jsonl:2 is no question \(.*expected \{"query": "\.\.\.", "source"'):
        evaluation.read_questions(path)


def test_a_file_without_questions_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        evaluation.read_questions(tmp_path / "q.jsonl")
    (tmp_path / "q.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no questions"):
        evaluation.read_questions(tmp_path / "q.jsonl")


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    things = ["apple", "bridge", "castle", "engine", "fox", "honey", "island", "king", "lamp", "moon"]
    return [Example(f"{name}.rst", f"how to make the {name}", f"plain text with {name} in it") for name in things]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, examples: list[Example]) -> Path:
    folder = tmp_path_factory.mktemp("set")
    encoder = make_encoder(folder / "encoder")
    operations.build_rows(question_sets.source("set", examples), folder / "index", encoder=str(encoder))
    return folder / "index"


def test_an_index_of_a_set_is_made_once_and_its_passages_found(index, examples):
    again = operations.build_rows(question_sets.source("set", examples), index, encoder=None)
    assert (again.snapshot, again.rows) == (1, len(examples))
    questions = question_sets.questions(examples, count=6)
    assert len({question.query for question in questions}) == 6
    assert questions == question_sets.questions(examples, count=6)
    assert questions != question_sets.questions(examples, count=6, seed=1)
    with Index.open(index) as opened:
        figures = evaluation.evaluate(opened, questions)
    assert list(figures) == ["BM25", "dense", "fused"]
    assert figures["BM25"].recall[1] == figures["fused"].recall[10] == 1
    assert figures["BM25"].mrr == figures["BM25"].ndcg == 1
    assert set(figures["BM25"].milliseconds) == {"search", "fetch"}
    assert set(figures["fused"].milliseconds) == {"encode", "search", "fetch"}
    assert all(low <= high for low, high in figures["fused"].milliseconds.values())


def test_another_set_replaces_the_first(index, examples, tmp_path):
    encoder = make_encoder(tmp_path / "encoder")
    for count in (5, 7):
        source = question_sets.source("set", examples[:count])
        assert operations.build_rows(source, tmp_path / "index", encoder=str(encoder)).rows == count


def test_a_report():
    figures = {"BM25": SearchMetrics(2, {1: 0.5, 5: 1, 10: 1}, 0.75, 0.8, {"search": (1.0, 2.25)})}
    figures["fused"] = SearchMetrics(2, {1: 1, 5: 1, 10: 1}, 1.0, 1.0, {"encode": (10, 20), "search": (1, 2)})
    assert evaluation.table(figures).splitlines() == [
        "|  | R@1 | R@5 | R@10 | MRR@10 | nDCG@10 | search ms | encode ms |",
        "|-|-|-|-|-|-|-|-|",
        "| BM25 | 50.0 | 100.0 | 100.0 | 0.750 | 0.800 | 1.0 / 2.2 |  |",
        "| fused | 100.0 | 100.0 | 100.0 | 1.000 | 1.000 | 1.0 / 2.0 | 10.0 / 20.0 |",
    ]


def test_examples_of_a_wheel(tmp_path):
    files = {
        "awscli/examples/s3/cp.rst": "\r\n**Example 1: To copy a file**\r\n\r\nRun ``cp``.\r\n\r\n**More**\r\n",
        "awscli/examples/s3/ls.rst": "**To list**\n\nRun ``ls``.",
        "awscli/examples/s4/ls.rst": "**To List**\n\nRun another.",
        "awscli/examples/empty.rst": "**To do nothing**\n",
        "awscli/examples/untitled.rst": "Text.",
        "awscli/other.rst": "**Not an example**\n\nText.",
    }
    with zipfile.ZipFile(tmp_path / "awscli.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    assert question_sets.awscli(tmp_path / "awscli.whl") == [
        Example("awscli/examples/s3/cp.rst", "To copy a file", "Run ``cp``.\n\n**More**"),
        Example("awscli/examples/s3/ls.rst", "To list", "Run ``ls``."),
    ]
    with pytest.raises(UserError, match=r"cannot be read: .*pip download awscli=="):
        question_sets.awscli(tmp_path / "nothing.whl")
    with zipfile.ZipFile(tmp_path / "other.whl", "w"):
        pass
    with pytest.raises(UserError, match="holds no examples"):
        question_sets.awscli(tmp_path / "other.whl")


def test_docstrings_of_a_library(tmp_path):
    code = '"""One line."""\n\ndef f():\n    """First\n    part.\n\n    Second.\n\n    Third.\n    """\n'
    (tmp_path / "a.py").write_text(code)
    (tmp_path / "b.py").write_text("no python")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "c.py").write_text(code)
    assert question_sets.stdlib(tmp_path) == [Example("a.py:3", "First part.", "Second.\n\nThird.")]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no docstrings"):
        question_sets.stdlib(tmp_path / "none")


def test_the_ideal_is_never_beaten():
    rng = np.random.default_rng(0)
    for _ in range(100):
        targets = int(rng.integers(1, 5))
        hits = rng.permutation([1] * targets + [0] * 8)[: rng.integers(0, 10)].tolist()
        assert 0 <= evaluation.ndcg(hits, targets, 10) <= 1 + 1e-12
