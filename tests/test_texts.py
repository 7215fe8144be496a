"""Texts that users type and read."""

import pytest

from openchatkit.texts import normalize, parse_bool, reason_of, shorten


@pytest.mark.parametrize(
    ("text", "value"),
    [("yes", True), (" ON ", True), ("1", True), ("No", False), ("0", False), ("", None), ("2", None)],
)
def test_yes_or_no(text: str, value: bool | None) -> None:
    assert parse_bool(text) is value


def test_a_long_text_is_cut_to_one_line() -> None:
    assert shorten("a\n b\tc") == "a b c"
    assert shorten("x" * 60) == "x" * 60
    assert shorten("x" * 61) == "x" * 57 + "..."
    assert shorten("abcdefgh", 6) == "abc..."


def test_an_error_is_one_line_or_its_type() -> None:
    assert reason_of(ValueError("a\nb")) == "a b"
    assert reason_of(ValueError()) == "ValueError"
    assert len(reason_of(ValueError("x" * 999))) == 300


def test_normalized_texts_are_nfkc_with_at_most_thirty_marks_on_a_letter() -> None:
    assert normalize("\ufb01\uff11 e\u0301 \uff1chuman>") == "fi1 \u00e9 <human>"
    assert normalize("b" + "\u0337\u0321" * 15 + "c") == "b" + "\u0337" * 15 + "\u0321" * 15 + "c"
    assert normalize("b" + "\u0321\u0337" * 500_000 + "c\u0327") == "b" + "\u0337" * 15 + "\u0321" * 15 + "\u00e7"
    assert normalize("\u2500" * 100 + "\uff1c") == "\u2500" * 100 + "<"  # signs, not marks
