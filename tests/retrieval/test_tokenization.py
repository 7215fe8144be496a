"""Words, content words, and titles in questions."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openchatkit.retrieval.tokenization import LONGEST, content_words, is_named_in, strip_plural, tokenize


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Quick, brown fox", ["quick", "brown", "fox"]),
        ("getObject", ["getobject", "get", "object"]),
        ("on GitHub", ["github", "git", "hub"]),
        ("HTTPServer list_objects_v2", ["httpserver", "http", "server", "list", "objects", "v2"]),
        ("AWS::S3::Bucket --dry-runs", ["aws", "s3", "bucket", "dry", "run"]),
        ("listObjects of CLASSES", ["listobjects", "list", "object", "classe"]),
        ("json.dumps, not dumps. Use std::maps", ["json", "dumps", "dump", "use", "std", "maps"]),
        ("Ünïcode STRASSE straße", ["ünïcode", "strasse", "strasse"]),
        ("\ufb01le \uff11\uff12", ["file", "12"]),
        ("東京都 tower", ["東京", "京都", "tower"]),
        ("水", ["水"]),
        ("人々はABCを", ["人々", "々は", "abc", "を"]),
        ("도서관", ["도서", "서관"]),
        ("도서관은 GPU를", ["도서", "서관", "관은", "gpu", "를"]),
        ("물은", ["물은", "물"]),
        ("ห้องสมุด", ["ห้อ", "อง", "งส", "สมุ", "มุด"]),
        ("हिन्दी भाषा", ["हिन्दी", "भाषा"]),
        ("كِتَاب كتاب", ["كتاب", "كتاب"]),
        ("סֵפֶר־ספר", ["ספר", "ספר"]),
        ("who are you?", []),
        # Marks in the order that Unicode gives them: below the letter, then through it.
        ("a" + "\u0321\u0337" * 12 + "b", ["a" + "\u0337" * 12 + "\u0321" * 12 + "b"]),
        ("a" + "\u0321\u0337" * 500_000 + "b kept", ["a" + "\u0337" * 15 + "\u0321" * 15 + "b", "kept"]),
        ("ก" + "\u0e49" * 1_000_000 + " kept", ["ก" + "\u0e49" * 30, "kept"]),
        ("x" * (LONGEST + 1) + " kept", ["kept"]),
        ("\0 \n", []),
    ],
)
def test_texts_are_split_into_words(text, expected):
    assert tokenize(text) == expected


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        *[("policies", "policy"), ("tags", "tag"), ("caches", "cache"), ("gas", "gas"), ("dns", "dns")],
        *[("access", "access"), ("status", "status"), ("zombies", "zomby"), ("aies", "aie"), ("tag", "tag")],
    ],
)
def test_plurals_count_as_their_singular(word, expected):
    assert strip_plural(word) == expected
    assert tokenize(word) == tokenize(word.upper()) == [expected]


@given(st.text())
def test_words_do_not_depend_on_case_of_plain_words_or_on_what_is_between(text):
    for word in tokenize(text):
        assert word
        assert not any(character.isspace() for character in word)
        assert len(word) <= 3 * LONGEST  # case-folding may make one letter three


@pytest.mark.parametrize(
    ("title", "question", "expected"),
    [
        ("json", "What does json do?", True),
        ("json", "What does json.dumps do?", False),
        ("dumps", "What does json.dumps do?", False),
        ("json.dumps", "Explain json.dumps.", True),
        ("json.dumps", "Is json.dumps_all there?", False),
        ("Text Editing", "Who wrote Text Editing?", True),
        ("Good", "good morning", False),
        ("c++ (17)", "What is new in c++ (17)?", True),
        ("", "What?", False),
    ],
)
def test_a_title_is_named_whole_or_not_at_all(title, question, expected):
    assert is_named_in(title, question) is expected


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What does E4021 mean?", ["e4021"]),
        ("Where did you put the gizmos yesterday?", ["gizmo"]),
        ("How is the seed server printing it?", ["seed", "server", "printing"]),
        ("What does json.nothing do?", ["json", "nothing"]),
        ("I'm so bored, tell me a joke. Are you doing well?", []),
        ("What happened on the 3rd in 1998?", ["3rd"]),
        ("Guten Morgen, wie geht es dir?", []),
        ("Привет! Как у тебя?", []),  # noqa: RUF001
        ("你好,你是谁?", []),
        ("안녕하세요, 감사합니다", []),
        ("도서관은 어디에 있나요?", ["도서", "서관"]),
        ("สวัสดีครับ ขอบคุณ", ["ดีค"]),
        ("ありがとうございます", []),
        ("図書館はどこですか", ["図書", "書館", "館は"]),
    ],
)
def test_stop_words_are_not_content_words(question, expected):
    assert content_words(question) == expected
