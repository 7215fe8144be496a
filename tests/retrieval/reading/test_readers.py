"""`reading`: documents of each kind of file, with titles and places; skipped files and reasons."""

import gzip
import os
import zipfile
from pathlib import Path

import pytest

from openchatkit.errors import UserError
from openchatkit.retrieval.reading import discovery, pdf, reader, streams
from openchatkit.retrieval.reading.document import Block, ReadOptions, Unreadable


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def documents(path: Path, options: ReadOptions | None = None) -> list[tuple[str, list[Block]]]:
    return [(each.title, list(each.blocks)) for each in reader.read(path, options or ReadOptions())]


def unreadable(path: Path, options: ReadOptions | None = None) -> str:
    try:
        reader.digest(path)
        documents(path, options)
    except Unreadable as error:
        return str(error)
    pytest.fail(f"{path} was read")


def test_text_is_cut_at_empty_lines(tmp_path):
    path = write(tmp_path / "note.txt", "one\r\ntwo\x1b[31m \n\n \n\n  three\n")
    assert documents(path) == [("note", [Block("one\ntwo [31m", 1, 2), Block("  three", 6, 6)])]


def test_a_byte_order_mark_gives_the_encoding(tmp_path):
    for encoding in ("utf-8-sig", "utf-16"):
        path = write(tmp_path / f"{encoding}.txt", "ein Gruß".encode(encoding))
        reader.digest(path)
        assert documents(path)[0][1] == [Block("ein Gruß", 1, 1)]


FRENCH = "L’été dernier, les élèves ont découvert où l’eau était gelée."  # noqa: RUF001
RUSSIAN = "Проверка оборудования проводится ежегодно. Размер и вес должны совпадать."
POLISH = "Zażółć gęślą jaźń. Urządzenia są sprawdzane corocznie, a następnie oznaczane."
JAPANESE = "図書館は朝八時に開きます。本は五冊まで借りられます。"


@pytest.mark.parametrize(
    ("text", "encoding", "note"),
    [
        ("ein Café", "cp1252", "is not UTF-8: read as Windows-1252"),
        (FRENCH, "cp1252", "is not UTF-8: read as Windows-1252"),
        (RUSSIAN, "cp1251", "is not UTF-8: read as cp1251"),
        (POLISH, "cp1250", "is not UTF-8: read as cp1250"),
        (JAPANESE, "shift_jis", "is not UTF-8: read as cp932"),
    ],
)
def test_text_in_another_encoding_is_read_and_noted(tmp_path, text, encoding, note):
    for name, packed in (("a.txt", False), ("a.md", False), ("a.rst.gz", True)):
        options = ReadOptions()
        data = ("Plain.\n\n" * 3000 + text).encode(encoding)
        path = write(tmp_path / name, gzip.compress(data) if packed else data)
        reader.digest(path)
        assert documents(path, options)[0][1][-1].text == text
        assert options.notes == [note]
    rows = write(tmp_path / "a.csv", f"text,name\n{text.replace(',', ';')},x\n".encode(encoding))
    assert documents(rows)[0][1][0].text == text.replace(",", ";")


def test_one_bad_byte_among_others_does_not_make_it_another_encoding(tmp_path):
    for encoding, name, bad in (("utf-8", "UTF-8", b"\xff"), ("utf-16", "UTF-16", b"\x00\xdc")):
        options = ReadOptions()
        path = write(tmp_path / "a.txt", "Grüße, привет: 5 €".encode(encoding) + bad)
        reader.digest(path)
        assert documents(path, options)[0][1] == [Block("Grüße, привет: 5 €\ufffd", 1, 1)]
        assert options.notes == [f"some bytes are not {name}: \ufffd replaces them"]


def test_a_missing_package_for_encodings_is_noted(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "charset_normalizer", None)
    assert "reading it needs a package: pip install charset-normalizer" in unreadable(
        write(tmp_path / "a.txt", b"caf\xe9")
    )


def test_a_long_line_and_a_long_paragraph_come_in_pieces(tmp_path):
    line = "word " * (streams.LINE_LIMIT // 2)
    [(_, blocks)] = documents(write(tmp_path / "line.txt", f"{line}\nnext\n"))
    assert len(blocks) > 2
    assert {block.first for block in blocks[:-1]} == {1}
    assert blocks[-1].last == 2
    assert sum(len(block.text.split()) for block in blocks) == len(line.split()) + 1
    [(_, blocks)] = documents(write(tmp_path / "log.txt", "".join(f"line {number}\n" for number in range(1, 1001))))
    assert [(block.first, block.last) for block in blocks] == [(1, 400), (401, 800), (801, 1000)]
    assert all(block.text.startswith(f"line {block.first}\n") for block in blocks)


def test_markdown(tmp_path):
    text = """\
---
title: "The whole"
---
Intro.

# First #
text `code`
- item

## Second
```python
x = 1

# no heading
```
Under
=====
~~~
left open
"""
    assert documents(write(tmp_path / "a.md", text)) == [
        (
            "The whole",
            [
                Block("Intro.", 4, 4),
                Block("First", 6, 6, level=1),
                Block("text `code`\n- item", 7, 8),
                Block("Second", 10, 10, level=2),
                Block("x = 1\n\n# no heading", 12, 14, code=True),
                Block("Under", 16, 17, level=1),
                Block("left open", 19, 19, code=True),
            ],
        )
    ]


@pytest.mark.parametrize(
    ("line", "title"),
    [
        *[("# A b", "A b"), ("#\tA", "A"), ("   ## A ##  ", "A"), ("# A #b", "A #b"), ("# A#", "A#"), ("# C# #", "C#")],
        *[("# #", None), ("#", None), ("## ", None), ("#A", "#A"), ("####### A", "####### A")],
        *[("# " + " " * 16_000 + "A", "A"), ("# A" + " #" * 8_000 + " A", None)],
    ],
)
def test_headings_of_markdown(tmp_path, line, title):
    """As CommonMark has them, of any length."""
    [(_, blocks)] = documents(write(tmp_path / "a.md", f"text\n\n{line}\n"))
    assert blocks[0] == Block("text", 1, 1)
    if title is not None:
        assert blocks[1].text.strip() == title
    elif len(line) < 10:
        assert len(blocks) == 1


@pytest.mark.parametrize(
    ("under", "is_table"),
    [
        *[("-|-", True), ("| :--- | ---: |", True), ("---|", True), ("|---", True), ("  |:-:|  ", True)],
        *[("---", False), ("- | x", False), ("|", False), ("-" * 16_000 + "x|", False), ("-|" * 8_000 + "x", False)],
        (" " * 8_000 + "|" + " " * 8_000 + "x", False),
    ],
)
def test_headers_of_tables_in_markdown(tmp_path, under, is_table):
    [(_, blocks)] = documents(write(tmp_path / "a.md", f"a | b\n{under}\n1 | 2\n"))
    assert any(block.head for block in blocks) is is_table


@pytest.mark.parametrize(
    ("value", "title"),
    [("Kit", "Kit"), ("'Kit'", "Kit"), ("\"Kit'", "\"Kit'"), ('""', "a"), ("A" + " " * 16_000 + "B", "A B")],
)
def test_titles_of_front_matter(tmp_path, value, title):
    assert documents(write(tmp_path / "a.md", f"---\ntitle:  {value}  \n---\ntext\n"))[0][0] == title


def test_odd_cells_and_words_take_no_longer_than_others(tmp_path):
    rows = [f"{'@' * 1_000_000},b", f"{'-' * 1_000_000},c"]
    assert len(documents(write(tmp_path / "a.csv", "\n".join(["text,other", *rows])))) == 2
    assert pdf._HALVES.sub("", "x" * 1_000_000) == "x" * 1_000_000


def test_markdown_is_titled_by_the_heading_it_begins_with(tmp_path):
    assert documents(write(tmp_path / "a.md", "# Kit\n\ntext"))[0][0] == "Kit"
    assert documents(write(tmp_path / "b.md", "text\n\n# Kit\n"))[0][0] == "b"
    # A rule at the start that nothing closes is no front matter.
    assert documents(write(tmp_path / "c.md", "---\ntext\n"))[0][1] == [Block("---\ntext", 1, 2)]


def test_restructured_text(tmp_path):
    text = """\
=====
Title
=====

Intro::

    code 1

      code 2

Part
----
Text.

.. note:: Take care.

.. code-block:: sh

    run

----

Deep
~~~~
End.
"""
    assert documents(write(tmp_path / "a.rst", text)) == [
        (
            "Title",
            [
                Block("Title", 1, 3, level=1),
                Block("Intro::", 5, 5),
                Block("    code 1\n\n      code 2", 7, 9, code=True),
                Block("Part", 11, 12, level=2),
                Block("Text.", 13, 13),
                Block(".. note:: Take care.", 15, 15),
                Block(".. code-block:: sh", 17, 17),
                Block("    run", 19, 19, code=True),
                Block("Deep", 23, 24, level=3),
                Block("End.", 25, 25),
            ],
        )
    ]


def test_html(tmp_path):
    text = """\
<html><head><title>A &amp; B</title><style>p {}</style>
<script>document.write("<p>never</p>")</script></head>
<body><h1>Head
 line</h1><p>Some <b>bold</b> text
goes on.<br>Then<ul><li>item</ul>
<svg><text>drawn</text></svg>
<pre>a
  b</pre><table><tr><td>x<td>y</tr></table>
<template><p>no</p></template> tail
"""
    assert documents(write(tmp_path / "a.html", text)) == [
        (
            "A & B",
            [
                Block("Head line", 3, 4, level=1),
                Block("Some bold text goes on.\nThen", 4, 5),
                Block("- item", 5, 5),
                Block("a\n  b", 7, 8, code=True),
                Block("x | y", 8, 8),
                Block("tail", 9, 9),
            ],
        )
    ]


def test_rows_of_a_table_know_its_header(tmp_path):
    text = "Prices:\npart | price\n:-- | --:\nlamp | 5\nwick | 1\n\nEnd. a | b\n\n|x|\n|-|\n|1|\nafter\n"
    blocks = documents(write(tmp_path / "a.md", text))[0][1]
    assert blocks == [
        Block("Prices:", 1, 1),
        Block("part | price\n:-- | --:\nlamp | 5\nwick | 1", 2, 5, head="part | price\n:-- | --:"),
        Block("End. a | b", 7, 7),
        Block("|x|\n|-|\n|1|", 9, 11, head="|x|\n|-|"),
        Block("after", 12, 12),
    ]
    long = "|n|\n|-|\n" + "".join(f"|{number}|\n" for number in range(900))
    blocks = documents(write(tmp_path / "b.md", long))[0][1]
    assert len(blocks) == 3
    assert {block.head for block in blocks} == {"|n|\n|-|"}
    page = "<table><tr><th>part<th>price<tr><td>lamp<td>5<tr><td>wick<td>1</table><p>End<table><tr><td>a<td>b</table>"
    assert [(each.text, each.head) for each in documents(write(tmp_path / "a.html", page))[0][1]] == [
        ("part | price", ""),
        ("lamp | 5", "part | price"),
        ("wick | 1", "part | price"),
        ("End", ""),
        ("a | b", ""),
    ]


def test_html_says_its_own_encoding(tmp_path):
    page = '<meta charset="{}"><p>Gruß</p>'
    assert documents(write(tmp_path / "a.htm", page.format("latin-1").encode("latin-1")))[0][1][0].text == "Gruß"
    for name, written, notes in (
        ("utf-8", "latin-1", ["is not UTF-8: read as Windows-1252"]),
        ("klingon", "utf-8", ["names an encoding that is not known, klingon"]),
        ("undefined", "latin-1", ["is not UNDEFINED: read as Windows-1252"]),
    ):
        options = ReadOptions()
        path = write(tmp_path / "b.htm", page.format(name).encode(written))
        assert documents(path, options)[0][1][0].text == "Gruß"
        assert options.notes == notes


def test_names_of_encodings_in_html_mean_what_they_mean_to_browsers(tmp_path):
    page = '<meta charset="{}"><p>“Gruß” …</p>'
    for name, written in (("iso-8859-1", "cp1252"), ("us-ascii", "cp1252"), ("utf-16", "utf-8")):
        path = write(tmp_path / "a.htm", page.format(name).encode(written))
        assert documents(path)[0][1][0].text == "“Gruß” …"


def test_unknown_declarations_in_html_are_skipped(tmp_path):
    text = "<p>one</p><![foo]><p>two</p><![ ><![if !x]><p>three</p><![endif]><!x y>"
    assert [block.text for block in documents(write(tmp_path / "a.html", text))[0][1]] == ["one", "two", "three"]


def test_rows_of_json(tmp_path):
    first = '{"text": "one\\u0000\\ud800", "title": "T", "url": "http://a/b"}'
    rows = f'{first}\n\n[]\nno\n{{"text": " "}}\n{{"text": "two\\n\\n3"}}\n'
    options = ReadOptions()
    found = list(reader.read(write(tmp_path / "a.jsonl", rows), options))
    assert [(each.title, each.source, each.unit) for each in found] == [("T", "http://a/b", "row"), ("a", "", "row")]
    assert [list(each.blocks) for each in found] == [[Block("one ?", 1, 1)], [Block("two", 6, 6), Block("3", 6, 6)]]
    assert options.notes == ["3 rows without a text, the first of them row 3"]


def test_the_field_of_the_text_can_be_named(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"body_text": "one", "kind": "x"}\n')
    assert unreadable(path) == "no row has a field 'text' (its fields: body_text, kind); see --text-field"
    assert documents(path, ReadOptions(text_field="body_text", title_field="kind")) == [("x", [Block("one", 1, 1)])]


def test_tables(tmp_path):
    path = write(tmp_path / "a.csv", 'name,what\nfox,"red\nand quick"\n,\n')
    options = ReadOptions()
    assert documents(path, options) == [("fox", [Block("name: fox\nwhat: red\nand quick", 1, 1)])]
    assert options.notes == ["1 rows without a text, the first of them row 2"]
    assert documents(path, ReadOptions(text_field="what"))[0][1] == [Block("red\nand quick", 1, 1)]
    path = write(tmp_path / "b.tsv", "text\turl\nhello\tx\n")
    assert [(each.source, [*each.blocks]) for each in reader.read(path, ReadOptions())] == [
        ("x", [Block("hello", 1, 1)])
    ]
    shouted = write(tmp_path / "B.TSV", path.read_bytes())
    assert documents(shouted, ReadOptions(text_field="url"))[0][1] == [Block("x", 1, 1)]
    path = write(tmp_path / "d.csv", 'text;title\n"old; king";A, B\n')
    assert documents(path) == [("A, B", [Block("old; king", 1, 1)])]
    path = write(tmp_path / "b.tsv", "text\turl\nhello\tx\n")
    assert "no row has a field 'what' (its fields: text, url)" in unreadable(path, ReadOptions(text_field="what"))
    assert unreadable(write(tmp_path / "c.csv", "")) == "holds no text"


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("1,The lamp is lit,2020-05-01\n2,Bread rises,2020-05-02\n", "1\nThe lamp is lit\n2020-05-01"),
        ("fox;red\nhen;white\nowl;red\n", "fox\nred"),
        ("Ann,ann@example.org\nBob,bob@example.org\n", "Ann\nann@example.org"),
        ("How tall is it?,It is as tall as I.\nWhy?,Nobody knows that.\n", "How tall is it?\nIt is as tall as I."),
        ("$1.50,tea\n$2,milk\n", "$1.50\ntea"),
    ],
)
def test_a_table_without_a_header_loses_no_row(tmp_path, text, first):
    options = ReadOptions()
    path = write(tmp_path / "a.csv", text)
    found = documents(path, options)
    assert found[0] == ("a", [Block(first, 1, 1)])
    assert len(found) == text.count("\n")
    columns = first.count("\n") + 1
    assert options.notes == [f"has no header: its columns are 1 to {columns} (see --text-field)"]
    assert documents(path, ReadOptions(text_field="2"))[0][1] == [Block(first.split("\n")[1], 1, 1)]


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("kind,what\nfox,red\n", "kind: fox\nwhat: red"),
        ("country,1990,1991\nFrance,5,6\n", "country: France\n1990: 5\n1991: 6"),
        ("What is your name?,How old are you?\nAnn,7\n", "What is your name?: Ann\nHow old are you?: 7"),
        (",a,b\n0,x,y\n", "a: x\nb: y"),
        ("a,b\nx,y,z\n", "a: x\nb: y\n3: z"),
        ("1,text\n2,hello\n", "hello"),
    ],
)
def test_the_header_of_a_table_names_its_columns(tmp_path, text, first):
    options = ReadOptions()
    assert documents(write(tmp_path / "a.csv", text), options) == [("a", [Block(first, 1, 1)])]
    assert options.notes == []


def test_json_is_rows_or_text(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "one", "title": "T"}, 5, {"text": "two"}]')
    options = ReadOptions()
    assert documents(path, options) == [("T", [Block("one", 1, 1)]), ("a", [Block("two", 3, 3)])]
    assert options.notes == ["1 rows without a text, the first of them row 2"]
    for text in ('{"key":\n "value"}', "[1, 2]", "[" * 100_000, '{"no json'):
        [(title, blocks)] = documents(write(tmp_path / "b.json", text))
        assert title == "b.json"
        assert "".join("".join(block.text.split()) for block in blocks) == "".join(text.split())
    data = '[{"text": "Gruß"}]'
    assert documents(write(tmp_path / "c.json", data.encode("utf-16")))[0][1][0].text == "Gruß"


def test_code_and_names_without_an_ending_are_read(tmp_path):
    path = write(tmp_path / "a.py", "import os\n\n\ndef run():\n    return 1\n")
    code = [Block("import os", 1, 1, code=True), Block("def run():\n    return 1", 4, 5, code=True)]
    assert documents(path) == [("a.py", code)]
    assert documents(write(tmp_path / "README", "Read me.\n")) == [("README", [Block("Read me.", 1, 1)])]
    assert documents(write(tmp_path / "LICENSE.gz", gzip.compress(b"Free.")))[0][1] == [Block("Free.", 1, 1)]
    assert "zero bytes" in unreadable(write(tmp_path / "program", b"\x7fELF\0\1"))


def test_a_row_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "ROW_LIMIT", 64)
    path = write(tmp_path / "a.jsonl", '{"text": "short"}\n{"text": "' + "x" * 64 + '"}\n')
    assert unreadable(path) == "line 2 is longer than 64 characters"


def test_compressed_files_are_read_too(tmp_path):
    path = write(tmp_path / "a.MD.gz", gzip.compress(b"# Kit\n\ntext\n"))
    assert documents(path) == [("Kit", [Block("Kit", 1, 1, level=1), Block("text", 3, 3)])]
    whole = path.read_bytes()
    assert documents(write(tmp_path / "B.MD.GZ", whole))[0][0] == "Kit"
    assert documents(write(tmp_path / "B.TXT.GZ", gzip.compress(b"x")))[0][0] == "B"
    assert "cut short or damaged" in unreadable(write(tmp_path / "cut.md.gz", whole[:-9]))
    assert "cut short or damaged" in unreadable(write(tmp_path / "no.md.gz", b"# Kit\n"))


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.txt", b"\xff\xfe\x01", "holds bytes that are not UTF-16: save it as UTF-8"),
        ("a.txt", b"\x80\x01\x02\x9f\x10 etc.", "holds bytes that are not UTF-8: save it as UTF-8"),
        ("a.md", b"a\0b", "holds zero bytes, so it is not text"),
        ("a.bin", b"text", "of no kind that is read"),
        ("a.pdf.gz", b"", "of no kind that is read"),
        ("a.pdf", b"%PDF-1.4\nno more", "broken: "),
    ],
)
def test_unreadable_files_have_a_reason(tmp_path, name, data, reason):
    assert unreadable(write(tmp_path / name, data)).startswith(reason)


def test_a_file_that_is_read_whole_has_a_limit(tmp_path):
    small = ReadOptions(max_bytes=10)
    for name in ("a.html", "a.pdf"):
        assert unreadable(write(tmp_path / name, "<p>more than ten"), small).startswith("too large: more than 10 bytes")
    assert "too large" in unreadable(write(tmp_path / "a.html.gz", gzip.compress(b"<p>" * 99)), small)


def test_a_file_that_may_not_be_opened(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(streams, "open", refuse, raising=False)
    assert unreadable(path) == "cannot be read: Permission denied"


class TestPacked:
    """Documents of office programs, made by the libraries that read them, and books."""

    def test_word(self, tmp_path):
        docx = pytest.importorskip("docx")
        document = docx.Document()
        document.add_heading("Manual", 0)
        document.add_heading("Lamp", 2)
        document.add_paragraph("Light it\nevery evening.")
        table = document.add_table(2, 2)
        for at, text in enumerate(("part", "price", "lamp", "5 €")):
            table.cell(at // 2, at % 2).text = text
        document.save(tmp_path / "a.docx")
        reader.digest(tmp_path / "a.docx")
        [found] = reader.read(tmp_path / "a.docx", ReadOptions())
        assert (found.unit, found.title) == ("paragraph", "a")
        assert list(found.blocks) == [
            Block("Manual", 1, 1, level=1),
            Block("Lamp", 2, 2, level=2),
            Block("Light it\nevery evening.", 3, 3),
            Block("part | price\nlamp | 5 €", 4, 4, head="part | price"),
        ]

    def test_slides(self, tmp_path):
        pptx = pytest.importorskip("pptx")
        show = pptx.Presentation()
        slide = show.slides.add_slide(show.slide_layouts[1])
        slide.shapes.title.text, slide.placeholders[1].text = "Lamp", "Light it"
        slide.notes_slide.notes_text_frame.text = "Say it slowly."
        show.core_properties.title = "Manual"
        show.save(tmp_path / "a.pptx")
        [found] = reader.read(tmp_path / "a.pptx", ReadOptions())
        assert (found.unit, found.title) == ("slide", "Manual")
        said = [Block("Lamp", 1, 1, level=1), Block("Light it", 1, 1), Block("Say it slowly.", 1, 1)]
        assert list(found.blocks) == said

    def test_sheets(self, tmp_path):
        openpyxl = pytest.importorskip("openpyxl")
        book = openpyxl.Workbook()
        book.active.append(["part", "price"])
        book.active.append(["lamp", 5])
        other = book.create_sheet("Facts")
        other.append([1, "The lamp is lit."])
        book.create_sheet("Empty")
        book.save(tmp_path / "a.xlsx")
        options = ReadOptions()
        assert documents(tmp_path / "a.xlsx", options) == [
            ("a > Sheet", [Block("part: lamp\nprice: 5", 1, 1)]),
            ("a > Facts", [Block("1\nThe lamp is lit.", 1, 1)]),
        ]
        assert options.notes == [
            "has no header: its columns are 1 to 2 (see --text-field)",
            "sheet Empty: holds no text",
        ]

    @staticmethod
    def book(path: Path) -> Path:
        package = """<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/">
            <metadata><dc:title>The Lamp</dc:title></metadata>
            <manifest><item id="b" href="text/two%202.xhtml"/><item id="a" href="text/one.xhtml"/></manifest>
            <spine><itemref idref="a"/><itemref idref="b"/></spine></package>"""
        container = """<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>
            <rootfile full-path="OPS/book.opf"/></rootfiles></container>"""
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("META-INF/container.xml", container)
            archive.writestr("OPS/book.opf", package)
            archive.writestr("OPS/text/one.xhtml", "<h1>Dusk</h1><p>It was lit.</p>")
            archive.writestr("OPS/text/two 2.xhtml", "<p>It went\nout.</p>")
        return path

    def test_books(self, tmp_path):
        [found] = reader.read(self.book(tmp_path / "a.epub"), ReadOptions())
        assert (found.unit, found.title) == ("chapter", "The Lamp")
        chapters = [Block("Dusk", 1, 1, level=1), Block("It was lit.", 1, 1), Block("It went out.", 2, 2)]
        assert list(found.blocks) == chapters

    def test_a_missing_package_is_noted(self, tmp_path, monkeypatch):
        for ending, module, package in (
            ("docx", "docx", "python-docx"),
            ("pptx", "pptx", "python-pptx"),
            ("xlsx", "openpyxl", "openpyxl"),
        ):
            monkeypatch.setitem(__import__("sys").modules, module, None)
            path = self.book(tmp_path / f"a.{ending}")
            assert unreadable(path) == f"reading it needs a package: pip install {package}"

    @pytest.mark.parametrize("ending", ["docx", "pptx", "xlsx", "epub"])
    def test_broken_and_large_ones_are_noted(self, tmp_path, monkeypatch, ending):
        assert unreadable(write(tmp_path / f"a.{ending}", b"no zip")).startswith("broken: ")
        with zipfile.ZipFile(tmp_path / f"b.{ending}", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("big", b"0" * 100_000)
        assert unreadable(tmp_path / f"b.{ending}").startswith("broken: ")
        assert "unpacks to more than 8,000" in unreadable(tmp_path / f"b.{ending}", ReadOptions(max_bytes=1000))
        assert "too large: more than 9 bytes" in unreadable(tmp_path / f"b.{ending}", ReadOptions(max_bytes=9))


class TestPDF:
    """PDF files that pypdf writes; their text is drawn by hand."""

    @staticmethod
    def make(path: Path, pages: list[str], *, title: str = "", password: str | None = None) -> Path:
        from pypdf import PdfWriter
        from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

        writer = PdfWriter()
        font = DictionaryObject(
            {NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1")}
        )
        font[NameObject("/BaseFont")] = NameObject("/Helvetica")
        for text in pages:
            page = writer.add_blank_page(200, 200)
            fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
            page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
            stream = DecodedStreamObject()
            stream.set_data(f"BT /F1 12 Tf 10 100 Td ({text}) Tj ET".encode())
            page[NameObject("/Contents")] = writer._add_object(stream)
        if title:
            writer.add_metadata({"/Title": title})
        if password is not None:
            writer.encrypt(password, "owner", algorithm="RC4-128")
        writer.write(str(path))
        return path

    def test_pages_are_places(self, tmp_path):
        path = self.make(tmp_path / "a.pdf", ["First page", "", "Third page"], title="Report\n of pages")
        [document] = reader.read(path, ReadOptions())
        assert (document.title, document.unit) == ("Report of pages", "page")
        assert list(document.blocks) == [Block("First page", 1, 1), Block("Third page", 3, 3)]

    def test_an_encrypted_file_is_skipped(self, tmp_path):
        assert unreadable(self.make(tmp_path / "a.pdf", ["x"], password="secret")).startswith("encrypted: ")
        assert documents(self.make(tmp_path / "b.pdf", ["open"], password="")) == [("b", [Block("open", 1, 1)])]

    def test_pages_without_text_and_too_many_pages(self, tmp_path):
        assert unreadable(self.make(tmp_path / "a.pdf", [""])).startswith("holds no text")
        options = ReadOptions(max_pages=1)
        assert documents(self.make(tmp_path / "b.pdf", ["one", "two"]), options) == [("b", [Block("one", 1, 1)])]
        assert options.notes == ["only 1 of 2 pages (see --max-pages)"]

    def test_words_that_a_line_ends_in_are_joined(self, tmp_path, monkeypatch):
        import pypdf

        text = "The care-\ntaker has a well-\nknown lamp, a well-known one, of Baden-\nBaden, E-\n4, so\u00ad\nfas."
        monkeypatch.setattr(pypdf.PageObject, "extract_text", lambda page: text)
        [(_, [block])] = documents(self.make(tmp_path / "a.pdf", ["x"]))
        joined = "The caretaker has a well-known lamp, a well-known one, of Baden-\nBaden, E-\n4, sofas."
        assert block.text == joined

    def test_pages_that_are_pictures_are_noted_and_empty_ones_are_not(self, tmp_path):
        from pypdf import PdfReader, PdfWriter
        from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject, NumberObject

        writer = PdfWriter(PdfReader(self.make(tmp_path / "a.pdf", ["one", "", "", "", "five", ""])))
        picture = DecodedStreamObject()
        picture.set_data(b"\0")
        picture.update({NameObject(f"/{name}"): NumberObject(1) for name in ("Width", "Height", "BitsPerComponent")})
        picture[NameObject("/ColorSpace")] = NameObject("/DeviceGray")
        picture |= {NameObject("/Type"): NameObject("/XObject"), NameObject("/Subtype"): NameObject("/Image")}
        held = DictionaryObject({NameObject("/I"): writer._add_object(picture)})
        for number in (1, 2, 5):
            writer.pages[number][NameObject("/Resources")] = DictionaryObject({NameObject("/XObject"): held})
        writer.write(str(tmp_path / "b.pdf"))
        options = ReadOptions()
        assert [block.text for block in documents(tmp_path / "b.pdf", options)[0][1]] == ["one", "five"]
        assert options.notes == ["pages 2-3, page 6: pictures without text; recognise their text first"]

    def test_a_broken_file_gives_what_can_be_read_or_a_reason(self, tmp_path):
        data = self.make(tmp_path / "a.pdf", ["one", "two"]).read_bytes()
        reasons = set()
        for cut in range(100, len(data), 101):
            write(tmp_path / "cut.pdf", data[:cut])
            try:
                documents(tmp_path / "cut.pdf")
            except Unreadable as error:
                reasons.add(str(error).partition(":")[0])
        assert reasons <= {"broken", "holds no text"}
        assert "broken" in reasons

    def test_a_broken_page_is_noted(self, tmp_path, monkeypatch):
        import pypdf

        extract = pypdf.PageObject.extract_text

        def break_second(page: pypdf.PageObject) -> str:
            if page.page_number == 1:
                raise KeyError("/Font")
            return extract(page)

        monkeypatch.setattr(pypdf.PageObject, "extract_text", break_second)
        options = ReadOptions()
        assert documents(self.make(tmp_path / "a.pdf", ["one", "two"]), options)[0][1] == [Block("one", 1, 1)]
        assert options.notes == ["page 2 is broken: '/Font'"]

    def test_a_missing_package_is_named(self, tmp_path, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "pypdf", None)
        with pytest.raises(UserError, match="reading PDF needs a package"):
            documents(write(tmp_path / "a.pdf", b""))


class TestWalk:
    """`discovery` and `ignored`: the files of a folder."""

    def test_files_are_sorted_and_skipped_ones_listed(self, tmp_path):
        root = tmp_path / "root"
        outside = write(tmp_path / "outside.txt", "x")
        kept = [write(root / name, "x") for name in ("b.txt", "sub/a.txt", "a.txt")]
        write(root / ".hidden" / "a.txt", "x")
        write(root / "index" / "a.txt", "x")
        (root / "in.txt").symlink_to(root / "a.txt")
        (root / "out.txt").symlink_to(outside)
        (root / "gone.txt").symlink_to(root / "nothing" / ".." / ".." / "nothing")
        (root / "loop").symlink_to(root, target_is_directory=True)
        (root / "over").symlink_to(tmp_path, target_is_directory=True)
        (root / "ring").symlink_to("ring")
        os.mkfifo(root / "pipe.txt")
        files, skipped = discovery.find([root], exclude=[root / "index"])
        assert files == sorted(kept)
        assert [(Path(each.source).name, each.reason) for each in skipped] == [
            (".hidden", "hidden"),
            ("gone.txt", "a link out of the folder"),
            ("in.txt", "a link to what is met there itself"),
            ("loop", "a link to what is met there itself"),
            ("out.txt", "a link out of the folder"),
            ("over", "a link out of the folder"),
            ("pipe.txt", "no ordinary file"),
            ("ring", "a link to what is met there itself"),
        ]

    def test_ignored_files_are_skipped_unless_asked_for(self, tmp_path):
        root = tmp_path / "repository"
        kept = ["a.txt", "docs/keep.log", "docs/a.txt", "docs/deep/out/a.txt", "logs.txt"]
        ignored = ["b.log", "docs/b.log", "out/a.txt", "docs/deep/tmp.txt"]
        others = ["node_modules/x/readme.md", "docs/env/lib/a.py", "docs/env/pyvenv.cfg"]
        for name in [*kept, *ignored, *others, ".git/config.txt"]:
            write(root / name, "x")
        write(root / ".gitignore", "# what is made\n*.log\n/out/\n")
        write(root / "docs" / ".gitignore", "!keep.log\ndeep/tmp.*\n")

        def found(folder, **options):
            files, skipped = discovery.find([folder], **options)
            told = {each.source[len(str(root)) + 1 :]: each.reason for each in skipped if "/." not in each.source}
            return {str(path.relative_to(root)) for path in files}, told

        files, skipped = found(root)
        assert files == set(kept)
        named, made = "named by .gitignore", "made by a program or by others"
        reasons = {"b.log": named, "docs/b.log": named, "out": named, "docs/deep/tmp.txt": named}
        reasons |= {"node_modules": made, "docs/env": made}
        assert skipped == {name: f"{reason} (see --include-ignored)" for name, reason in reasons.items()}
        assert found(root, include_ignored=True) == ({*kept, *ignored, *others}, {})
        # The rules of the repository hold in a folder of it; but what is named itself is read.
        assert found(root / "docs")[0] == {name for name in kept if name.startswith("docs/")}
        assert found(root / "out")[0] == {"out/a.txt"}
        assert found(root / "node_modules")[0] == {"node_modules/x/readme.md"}
        assert discovery.find([root / "b.log"])[0] == [root / "b.log"]

    def test_a_missing_package_for_ignoring_is_noted(self, tmp_path, monkeypatch):
        write(tmp_path / ".gitignore", "a.txt\n")
        path = write(tmp_path / "a.txt", "x")
        monkeypatch.setitem(__import__("sys").modules, "pathspec", None)
        files, skipped = discovery.find([tmp_path])
        assert files == [path]
        assert "not used, which needs a package: pip install pathspec" in [each.reason for each in skipped]

    def test_a_file_that_disappears_while_the_folder_is_read_is_skipped(self, tmp_path, monkeypatch):
        write(tmp_path / "a.txt", "x")

        scan = os.scandir

        def scan_and_remove(folder: Path) -> list[os.DirEntry]:
            entries = list(scan(folder))
            (tmp_path / "a.txt").unlink()
            return entries

        monkeypatch.setattr(os, "scandir", scan_and_remove)
        files, [skipped] = discovery.find([tmp_path])
        assert (files, skipped.reason) == ([], "cannot be read: No such file or directory")

    def test_a_file_name_that_is_not_utf_8_is_refused(self, tmp_path):
        path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
        Path(path).write_text("x")
        with pytest.raises(UserError, match="its name is not in UTF-8: rename it"):
            discovery.find([Path(path)])
        assert [each.reason for each in discovery.find([tmp_path])[1]] == ["its name cannot be shown"]

    def test_a_file_named_itself_is_read_once(self, tmp_path):
        hidden = write(tmp_path / ".notes.txt", "x")
        (tmp_path / "link.txt").symlink_to(hidden)
        assert discovery.find([hidden, tmp_path / "link.txt"]) == ([hidden], [])
        with pytest.raises(UserError, match="nothing: no such file or folder"):
            discovery.find([tmp_path / "nothing"])
