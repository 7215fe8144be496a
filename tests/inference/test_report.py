"""Where passages are from, as a line for a terminal and as JSON."""

from openchatkit.inference import report
from openchatkit.inference.responder import Reply
from openchatkit.retrieval.passage import Passage


def test_a_citation_names_all_places_of_a_text():
    plain = Passage("text", "Title", "/a.md", "line 3")
    assert report.citation(1, plain) == "[1] Title, line 3, /a.md"
    copied = Passage("text", "Title", "/a.md", "line 3", also=("/b.md, line 7", "/c\x1b[2J.md"))
    assert report.citation(2, copied) == "[2] Title, line 3, /a.md (also /b.md, line 7; /c\\x1b[2J.md)"
    assert report.citation(3, Passage("text")) == "[3] given with the question"
    plain_told, copied_told = report.sources(Reply("r", (), "end", sources=(plain, copied)))
    assert "also" not in plain_told
    assert copied_told["also"] == ["/b.md, line 7", "/c\x1b[2J.md"]
