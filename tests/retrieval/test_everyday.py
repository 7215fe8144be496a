"""Which words of a question tell what it is about."""

import pytest

from openchatkit.retrieval.everyday import telling


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
def test_everyday_words_tell_nothing(question, expected):
    assert telling(question) == expected
