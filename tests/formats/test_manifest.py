"""Manifests, by which every flipped bit, cut and missing file is found."""

import json
import re

import pytest

from openchatkit.formats import manifest
from openchatkit.formats.manifest import DamagedError, FileRecord


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.bin").write_bytes(bytes(range(64)))
    (tmp_path / "b.bin").write_bytes(b"")
    manifest.write(tmp_path, [manifest.record(tmp_path / n) for n in ("a.bin", "b.bin")], about={"step": 3})
    return tmp_path


def test_it_says_what_was_written(folder):
    read = manifest.read(folder)
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert read.files["b.bin"] == FileRecord("b.bin", 0, empty)
    assert read.files["a.bin"].size == 64
    assert read.about == {"step": 3}
    manifest.verify(folder)


def test_every_byte_of_the_manifest_itself_counts(folder):
    path = folder / manifest.MANIFEST
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (position % 8, (position * 5 + 3) % 8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(DamagedError):
                manifest.read(folder)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"null", b'{"digest": 1}', b"\xff\xfe"])
def test_anything_else_is_no_manifest(folder, content):
    (folder / manifest.MANIFEST).write_bytes(content)
    with pytest.raises(DamagedError, match=f"{re.escape(str(folder))}/manifest.json is damaged"):
        manifest.read(folder)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(DamagedError, match="is missing"):
        manifest.read(tmp_path)


@pytest.mark.parametrize("position", range(0, 64, 7))
def test_one_flipped_bit_is_found(folder, position):
    content = bytearray((folder / "a.bin").read_bytes())
    content[position] ^= 1 << position % 8
    (folder / "a.bin").write_bytes(content)
    manifest.check_sizes(folder, manifest.read(folder))
    with pytest.raises(DamagedError, match=r"a\.bin was altered: its SHA-256 is [0-9a-f]{16}\.\.\., the manifest says"):
        manifest.verify(folder)
    manifest.verify(folder, ["b.bin"])


def test_a_cut_file_is_found_by_its_size(folder):
    (folder / "a.bin").write_bytes(bytes(63))
    with pytest.raises(DamagedError, match=r"a\.bin has 63 bytes, the manifest says 64: it was cut or replaced"):
        manifest.check_sizes(folder, manifest.read(folder))


def test_a_missing_file_is_found(folder):
    (folder / "b.bin").unlink()
    with pytest.raises(DamagedError, match=r"b\.bin is missing"):
        manifest.verify(folder)


def test_a_file_that_is_not_listed_is_not_trusted(folder):
    with pytest.raises(DamagedError, match=r"c\.bin is not listed in manifest\.json"):
        manifest.verify(folder, ["c.bin"])


def test_another_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr(manifest, "_FORMAT", 2)
    with pytest.raises(DamagedError, match="damaged"):
        manifest.read(folder)


def test_advice_is_added_to_the_reason(folder):
    (folder / "a.bin").unlink()
    with pytest.raises(DamagedError, match=r"a\.bin is missing; copy it again$"), manifest.advise("copy it again"):
        manifest.verify(folder)


def test_it_is_plain_json(folder):
    body = json.loads((folder / manifest.MANIFEST).read_text())
    assert {"name", "size", "sha256"} == set(body["files"][0])
