"""`chunks`: where a text is cut, places of chunks, and their greatest length."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openchatkit.errors import UserError
from openchatkit.retrieval import chunks as chunking_module
from openchatkit.retrieval.chunks import Chunk, Chunking, chunk_document
from openchatkit.retrieval.reading.document import Block, Document, ReadOptions
from openchatkit.retrieval.reading.reader import read


def words(texts: Sequence[str]) -> list[int]:
    """A tokenizer whose tokens are words and marks."""
    return [len(re.findall(r"\w+|[^\w\s]", text)) for text in texts]


def cut(text: str, tmp_path: Path, tokens: int, overlap: int = 0, name: str = "a.md") -> list[Chunk]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    [document] = [each for each in map(whole, read(path, ReadOptions()))]
    return list(chunk_document(document, Chunking(tokens, overlap), words))


def whole(document: Document) -> Document:
    """The document with all blocks in memory, so that another can be read after it."""
    document.blocks = iter(list(document.blocks))
    return document


def test_a_short_text_is_one_chunk_and_paragraphs_stay_apart(tmp_path):
    assert cut("one\ntwo\n\nthree\n", tmp_path, 20, name="n.txt") == [Chunk("one\ntwo\n\nthree", "n", "lines 1-4")]


def test_headings_end_chunks_and_make_their_titles(tmp_path):
    text = "# Kit\nintro\n\n## Use\n### Deep\nx\n## Use more\ny\n# End\nz\n"
    assert cut(text, tmp_path, 20) == [
        Chunk("intro", "Kit", "line 2"),
        Chunk("x", "Kit > Use > Deep", "line 6"),
        Chunk("y", "Kit > Use more", "line 8"),
        Chunk("z", "Kit > End", "line 10"),
    ]


def test_cuts_are_between_paragraphs_then_sentences_then_words(tmp_path):
    text = "One two three. Four five?\n\nSix seven eight\nnine. Ten eleven twelve.\n\n" + "w " * 14 + "\n"
    assert [(each.text, each.place) for each in cut(text, tmp_path, 9, name="n.txt")] == [
        ("One two three. Four five?", "line 1"),
        ("Six seven eight\nnine.", "lines 3-4"),
        ("Ten eleven twelve.\n\nw w w w", "lines 4-6"),
        ("w w w w w w w w", "line 6"),
        ("w w", "line 6"),
    ]


def test_the_last_sentences_are_repeated(tmp_path):
    text = "Aa bb cc dd. Ee ff. Gg hh.\n\nIi jj kk ll mm.\n\nNn oo.\n"
    assert [(each.text, each.place) for each in cut(text, tmp_path, 13, 6, name="n.txt")] == [
        ("Aa bb cc dd. Ee ff. Gg hh.", "line 1"),
        ("Ee ff. Gg hh.\n\nIi jj kk ll mm.", "lines 1-3"),
        ("Ii jj kk ll mm.\n\nNn oo.", "lines 3-5"),
    ]
    assert [each.text for each in cut("One. Two. Three. Four.", tmp_path, 5, 2, name="n.txt")] == [
        "One. Two.",
        "Two. Three.",
        "Three. Four.",
    ]


def test_code_stays_whole_if_it_fits_or_is_cut_between_lines(tmp_path):
    text = "Run it. Now.\n\n```\na = 1\n\nb = 2\n```\n\nmore\n"
    assert [each.text for each in cut(text, tmp_path, 7, name="n.md")] == ["Run it. Now.", "a = 1\n\nb = 2", "more"]
    text = "```\n" + "x = 1\n" * 5 + "```\n"
    assert [(each.text, each.place) for each in cut(text, tmp_path, 7)] == [
        ("x = 1\nx = 1", "lines 2-3"),
        ("x = 1\nx = 1", "lines 4-5"),
        ("x = 1", "line 6"),
    ]


def test_a_table_is_cut_at_rows_and_each_chunk_has_its_header(tmp_path):
    rows = [f"| part {number} | {number} euros each |" for number in range(30)]
    head = ["| what | price |", "|---|---|"]
    found = cut("\n".join(["Prices follow.", "", *head, *rows, "", "The end."]), tmp_path, 60, 15, name="n.md")
    assert len(found) > 3
    seen = []
    for each in found:
        lines = [line for line in each.text.split("\n") if line.startswith("|")]
        assert lines[:2] == head
        seen += [row for row in lines[2:] if row not in seen]
        assert set(lines[2:]) <= set(rows)
        assert words([each.text])[0] <= 60
    assert seen == rows
    assert found[0].text.startswith("Prices follow.\n\n| what")
    assert found[-1].text.endswith("|\n\nThe end.")
    # A header that leaves no room is not repeated, and a row that is too long is cut.
    wide = f"| {'name ' * 40} |\n|---|\n| {'value ' * 40} |\n"
    assert all(words([each.text])[0] <= 20 for each in cut(wide, tmp_path, 20, name="w.md"))


def test_only_a_word_too_long_alone_is_cut(tmp_path):
    [first, *rest] = cut("short " + "x" * 500 + " end", tmp_path, 9, name="n.txt")
    assert first.text == "short"
    assert "".join(each.text for each in rest) == "x" * 500 + "end"
    # The tokenizer takes it for one token, and the encoder would see nothing of it.
    assert max(len(each.text) for each in rest) <= 8 * 16


def test_chinese_is_cut_after_its_full_stops(tmp_path):
    def characters(texts: Sequence[str]) -> list[int]:
        return [len(text) for text in texts]

    sentences = ["我是学生。", "你好吗。", "我很好。"]
    document = Document(iter([Block("".join(sentences), 3, 3)]), "page", "")
    assert [each.text for each in chunk_document(document, Chunking(9, 0), characters)] == [
        "我是学生。你好吗。",
        "我很好。",
    ]


def test_text_without_spaces_is_cut_to_size_whatever_the_tokenizer_knows():
    def unknown(texts: Sequence[str]) -> list[int]:
        return [len(text.split()) for text in texts]

    for sentence in ("図書館は月曜日に休みです。", "ห้องสมุดเปิดทุกวัน ", "天地玄黄，宇宙洪荒，", "ខ្ញុំជាសិស្ស។ "):  # noqa: RUF001
        document = Document(iter([Block(sentence * 100, 1, 1)]), "line", "")
        found = [each.text for each in chunk_document(document, Chunking(40, 0), unknown)]
        assert max(map(len, found)) <= 45
        assert {each.strip()[-1] for each in found} == {sentence.strip()[-1]}
        assert "".join("".join(found).split()) == "".join((sentence * 100).split())
    document = Document(iter([Block("永" * 1000, 1, 1)]), "line", "")
    assert {len(each.text) for each in chunk_document(document, Chunking(40, 0), unknown)} == {40}


def test_a_long_title_leaves_room_for_the_text(tmp_path):
    [chunk] = cut(f"# {'very long ' * 30}\ntext here", tmp_path, 20)
    assert chunk.text == "text here"
    assert 0 < words([chunk.title])[0] <= 5


def test_places_are_pages_and_rows():
    blocks = [Block("one two", 1, 1), Block("three", 2, 2), Block("four five", 2, 2)]
    document = Document(iter(blocks), "page", "T")
    assert [each.place for each in chunk_document(document, Chunking(5, 0), words)] == ["pages 1-2", "page 2"]
    document = Document(iter([Block("x", 7, 7)]), "row", "T")
    assert [each.place for each in chunk_document(document, Chunking(5, 0), words)] == ["row 7"]


def test_a_passage_lies_on_one_page_unless_a_sentence_runs_on():
    blocks = [Block(f"Page {number} says this.", number, number) for number in range(1, 7)]
    blocks += [Block("This one goes", 7, 7), Block("on here.", 8, 8), Block("Last", 9, 9)]
    for unit, places in (("page", [1, 2, 3, 4, 5, 6, "7-8", 9]), ("slide", [1, 2, 3, 4, 5, 6, "7-8", 9])):
        found = [each.place for each in chunk_document(Document(iter(blocks), unit, ""), Chunking(200, 30), words)]
        assert found == [f"{unit}s {at}" if isinstance(at, str) else f"{unit} {at}" for at in places]
    [chunk] = chunk_document(Document(iter(blocks), "line", ""), Chunking(200, 30), words)
    assert chunk.place == "lines 1-9"


def test_many_blocks_are_not_held_at_once(monkeypatch):
    monkeypatch.setattr(chunking_module, "_AT_ONCE", 4)
    taken = 0

    def blocks() -> Iterator[Block]:
        nonlocal taken
        for number in range(1, 101):
            taken = number
            yield Block("one two", number, number)

    found = chunk_document(Document(blocks(), "line", ""), Chunking(4, 0), words)
    assert next(found).place == "lines 1-2"
    assert taken < 12
    assert sum(1 for _ in found) == 49


PIECES = st.sampled_from(["# H a", "word", "end. New", "x" * 200, "```", "", "  indented", "a.b", "…? So", "ü"])


@given(st.lists(st.lists(PIECES, max_size=12).map(" ".join), max_size=30), st.integers(4, 30), st.integers(0, 10))
def test_all_words_are_kept_and_no_chunk_is_too_long(lines, tokens, overlap):
    blocks = [Block(line, number, number) for number, line in enumerate(lines, 1) if line.strip()]
    found = list(
        chunk_document(Document(iter(blocks), "line", "Title"), Chunking(tokens, min(overlap, tokens // 2)), words)
    )
    assert found == list(
        chunk_document(Document(iter(blocks), "line", "Title"), Chunking(tokens, min(overlap, tokens // 2)), words)
    )
    for chunk in found:
        assert chunk.text.strip()
        assert words([chunk.title])[0] + words([chunk.text])[0] <= tokens
    # With no overlap nothing is lost and nothing comes twice; the space between two chunks may go.
    if not overlap:
        joined = "".join("".join(chunk.text.split()) for chunk in found)
        assert joined == "".join("".join(line.split()) for line in lines)


@pytest.mark.parametrize(
    ("tokens", "overlap", "says"), [(300, 10, "sees 254 tokens"), (100, 51, "expected at most half of --chunk-tokens")]
)
def test_settings_that_lose_text_are_refused(tokens, overlap, says):
    with pytest.raises(UserError, match=says):
        Chunking(tokens, overlap).check(254)
