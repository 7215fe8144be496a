"""The writing of `.bin/.idx` stores: bytes against those packed by hand, whole files or none, and continued ones."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from small_stores import DOCUMENTS, packed, write

from openchatkit.errors import UserError
from openchatkit.formats import store_writer, token_store
from openchatkit.formats.store_writer import StoreProgress, TokenStoreWriter
from openchatkit.formats.token_store import TokenStore


@pytest.mark.parametrize(("vocab_size", "code", "letter", "size"), [(65499, 8, "H", 2), (65500, 4, "i", 4)])
def test_bytes(tmp_path: Path, vocab_size: int, code: int, letter: str, size: int) -> None:
    writer = write(tmp_path / "s", vocab_size=vocab_size)
    assert (tmp_path / "s.idx").read_bytes() == packed(code, size)
    assert (tmp_path / "s.bin").read_bytes() == struct.pack(f"<8{letter}", *np.concatenate(DOCUMENTS))
    assert not (tmp_path / "s.mask.bin").exists()
    assert (writer.documents, writer.tokens) == (3, 8)


def test_mask_beside_it(tmp_path: Path) -> None:
    writer = write(tmp_path / "s", masked=True)
    assert (tmp_path / "s.mask.bin").read_bytes() == bytes([0, 1, 0, 1, 1, 0, 1, 0])
    store = TokenStore(tmp_path / "s")
    assert store.mask.tolist() == [0, 1, 0, 1, 1, 0, 1, 0]
    assert writer.trained_tokens == 4


def test_index_of_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "whole")
    monkeypatch.setattr(store_writer, "_PIECE", 2)
    write(tmp_path / "pieces")
    assert (tmp_path / "pieces.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


def test_empty_documents_and_stores(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "none", vocab_size=10, masked=True):
        pass
    assert TokenStore(tmp_path / "none").documents == 0
    with TokenStoreWriter(tmp_path / "gap", vocab_size=10, masked=False) as writer:
        writer.add(np.array([1, 2]), np.array([0, 2, 0]))
    assert [TokenStore(tmp_path / "gap").document(n).tolist() for n in range(3)] == [[], [1, 2], []]


def test_unfinished_store_cannot_be_opened(tmp_path: Path) -> None:
    def die(writer: TokenStoreWriter) -> None:
        with writer:
            writer.add(np.array([1]), np.array([1]))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        die(TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=False))
    with pytest.raises(UserError, match="no token index"):
        TokenStore(tmp_path / "s")


def test_token_outside_the_vocabulary(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=False) as writer, pytest.raises(AssertionError):
        writer.add(np.array([10]), np.array([1]))


def test_a_mask_that_trains_on_nothing_is_removed(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=True) as writer:
        writer.add(np.array([1, 2]), np.array([2]), np.array([False, False]))
    assert not (tmp_path / "s.mask.bin").exists()
    assert TokenStore(tmp_path / "s").mask is None


def test_a_store_takes_the_place_of_another(tmp_path: Path) -> None:
    """Nothing of the other is left beside it, neither its mask nor its tokenizer."""
    write(tmp_path / "new", masked=True)
    token_store.write_maker(tmp_path / "new", {"tokenizer_type": "HFTokenizer"})
    write(tmp_path / "old")
    before = [(tmp_path / f"old{suffix}").read_bytes() for suffix in (".idx", ".bin")]
    store_writer.rename_store(tmp_path / "old", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new.bin", "new.idx"]
    assert [(tmp_path / f"new{suffix}").read_bytes() for suffix in (".idx", ".bin")] == before


def test_tokens_beyond_their_type(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "s", dtype=np.dtype("<u2"), masked=False) as writer:
        for token in (-1, 1 << 16):
            with pytest.raises(AssertionError):
                writer.add(np.array([token]), np.array([1]))


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("done", [0, 1, 3])
def test_resumed_files_are_the_same(tmp_path: Path, done: int, closed: bool) -> None:
    """Whatever was appended behind the place that was saved, pointers and header included."""
    write(tmp_path / "whole", masked=True)
    prefix = tmp_path / "s"
    if closed:
        write(prefix, masked=True)
    else:
        writer = TokenStoreWriter(prefix, vocab_size=65499, masked=True)
        more = np.concatenate([*DOCUMENTS, [7, 8]])
        writer.add(more, np.array([3, 1, 4, 2]), more % 2 == 0)
        writer.sync()
    tokens = [sum(map(len, DOCUMENTS[:n])) for n in range(4)]
    trained = [0, 1, 2, 4][done]
    resume = StoreProgress(documents=done, tokens=tokens[done], trained_tokens=trained)
    with TokenStoreWriter(prefix, vocab_size=65499, masked=True, resume=resume) as writer:
        for document in map(np.array, DOCUMENTS[done:]):
            writer.add(document, np.array([len(document)]), document % 2 == 0)
    for suffix in (".bin", ".idx", ".mask.bin"):
        assert (tmp_path / f"s{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes(), suffix
    assert (writer.documents, writer.tokens, writer.trained_tokens) == (3, 8, 4)


def test_a_removed_mask_is_made_again(tmp_path: Path) -> None:
    """It is removed before the store gets its name, and the build may be killed in between."""
    with TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=True) as writer:
        writer.add(np.array([1, 2]), np.array([2]), np.array([False, False]))
    resume = StoreProgress(documents=1, tokens=2)
    with TokenStoreWriter(tmp_path / "s", vocab_size=10, masked=True, resume=resume) as writer:
        writer.add(np.array([3]), np.array([1]), np.array([True]))
    assert TokenStore(tmp_path / "s").mask.tolist() == [0, 0, 1]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".mask.bin"])
def test_files_too_short_to_go_on_with(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "s", masked=True)
    os.truncate(tmp_path / f"s{suffix}", 1)
    with pytest.raises(ValueError, match=rf"s{suffix} holds less than"):
        TokenStoreWriter(
            tmp_path / "s",
            vocab_size=65499,
            masked=True,
            resume=StoreProgress(documents=3, tokens=8, trained_tokens=4),
        )
