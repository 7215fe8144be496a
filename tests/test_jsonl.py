"""JSON Lines: values with the numbers of their lines, and bad lines in the caller's words."""

from pathlib import Path

import pytest

from openchatkit import jsonl
from openchatkit.errors import UserError


def test_each_line_is_a_value(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"n": 1}\n\n{"n": "\u2028é"}\r\n{"n": 3}'.encode())
    bad: list[int] = []
    assert list(jsonl.read(path, lambda row: row["n"], lambda number, _: bad.append(number))) == [1, None, "\u2028é", 3]
    assert bad == [2]
    assert list(jsonl.read(path, lambda row: row["n"], lambda *_: None, skip_blank=True)) == [1, "\u2028é", 3]


@pytest.mark.parametrize("line", [b'{"n": 1', b"\xff", b"[1]", b'{"m": 1}', b"[" * 100_000])
def test_a_bad_line_is_named_in_the_callers_words(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n' + line + b"\n")

    def refuse(number: int, error: Exception) -> int:
        raise UserError(f"{path}:{number} is no number") from error

    rows = jsonl.read(path, lambda row: int(row["n"]), refuse)
    assert next(rows) == 0
    with pytest.raises(UserError, match=r"a\.jsonl:2 is no number"):
        next(rows)


def test_a_line_that_is_ended_while_it_is_read_is_one_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"n": 0}\n{"n"')
    bad: list[int] = []

    def end_line(number: int, error: Exception) -> None:
        bad.append(number)
        with open(path, "ab") as file:
            file.write(b': 1}\n{"n": 2}\n')

    assert list(jsonl.read(path, lambda row: row["n"], end_line)) == [0, None]
    assert bad == [2]


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(jsonl.read(tmp_path / "none", int, lambda *_: 0))


@pytest.mark.parametrize(
    ("line", "value"), [(b'{"a": 1}\n', {"a": 1}), ("[]", None), ("{", None), (b"\xff", None), ("[" * 100_000, None)]
)
def test_the_object_of_a_line(line: str | bytes, value: object) -> None:
    assert jsonl.parse_object(line) == value
