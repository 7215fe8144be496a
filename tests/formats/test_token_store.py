"""The `.bin/.idx` store read by memory map, and errors for damaged stores."""

import struct
from pathlib import Path

import numpy as np
import pytest
from small_stores import DOCUMENTS, packed, write

from openchatkit.errors import UserError
from openchatkit.formats.token_store import TokenStore


@pytest.mark.parametrize("code", [1, 2, 3, 4, 5, 8])
def test_reads_every_whole_number_type(tmp_path: Path, code: int) -> None:
    letter = {1: "B", 2: "b", 3: "h", 4: "i", 5: "q", 8: "H"}[code]
    documents = [[5, 6, 7], [100], [0, 1, 2, 3]]
    (tmp_path / "s.idx").write_bytes(packed(code, struct.calcsize(letter)))
    (tmp_path / "s.bin").write_bytes(struct.pack(f"<8{letter}", *np.concatenate(documents)))
    store = TokenStore(tmp_path / "s")
    assert [store.document(n).tolist() for n in range(store.documents)] == documents
    assert store.starts(np.array([2, 0])).tolist() == [4, 0]
    assert store.mask is None


def test_some_of_its_documents(tmp_path: Path) -> None:
    write(tmp_path / "s", masked=True)
    whole = TokenStore(tmp_path / "s")
    part = whole.part(1, 3)
    assert [part.document(n).tolist() for n in range(part.documents)] == DOCUMENTS[1:]
    assert part.tokens.tolist() == [65498, 0, 1, 2, 3]
    assert part.starts(np.array([0, 1])).tolist() == [0, 1]
    assert part.mask.tolist() == whole.mask[3:].tolist()
    assert whole.part(0, 2).tokens.tolist() == [5, 6, 7, 65498]
    assert part.part(1, 2).document(0).tolist() == DOCUMENTS[2]
    with pytest.raises(UserError, match=r"s\[2:4\]: the store has documents 0 to 3"):
        whole.part(2, 4)


@pytest.mark.parametrize(
    ("suffix", "change", "message"),
    [
        (".bin", lambda data: data[:-1], r"s\.bin holds 15 bytes where 16 belong"),
        (".idx", lambda data: data[:-8], r"s\.idx holds \d+ bytes where \d+ belong"),
        (".idx", lambda data: data[:20], "no token index"),
        (".idx", lambda data: b"TNTIDX\0\0" + data, "--dataset-impl mmap"),
        (".idx", lambda data: b"{}" + data, r"expected it to begin with b'MMIDIDX"),
        (".idx", lambda data: data[:9] + b"\2" + data[10:], "version 2: only version 1"),
        (".idx", lambda data: data[:17] + b"\6" + data[18:], "dtype code 6: expected"),
        (".mask.bin", lambda data: data + b"\0", r"s\.mask\.bin holds 9 bytes where 8 belong"),
        (".bin", None, r"s\.bin is missing"),
        (".idx", None, r"s\.idx is missing"),
    ],
)
def test_damage_is_named(tmp_path: Path, suffix: str, change: object, message: str) -> None:
    write(tmp_path / "s", masked=True)
    path = tmp_path / f"s{suffix}"
    data = path.read_bytes()
    path.unlink() if change is None else path.write_bytes(change(data))
    with pytest.raises(UserError, match=message):
        TokenStore(tmp_path / "s")


@pytest.mark.parametrize("suffix", [".bin", ".mask.bin"])
def test_a_folder_in_place_of_a_file(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "s", masked=True)
    path = tmp_path / f"s{suffix}"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=rf"s{suffix} cannot be read: Is a directory"):
        TokenStore(tmp_path / "s")
