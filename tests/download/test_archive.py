"""Unpacking untrusted files (`archive`, `zstandard_stream`): whole or not at all, and never outside the folder."""

import gzip
import io
import tarfile
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from openchatkit.download import archive
from openchatkit.errors import UserError

LINES = b"one line and another\n" * 5000


def tar_of(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for member, body in members:
            member.size = len(body)
            archive.addfile(member, io.BytesIO(body))
    return made.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


TAR = tar_of((member("folder", tarfile.DIRTYPE), b""), (member("folder/a.jsonl"), LINES), (member("./b.jsonl"), b"b"))


def left(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0), {"a.jsonl": LINES}),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0) + gzip.compress(b"more", mtime=0), {"a.jsonl": LINES + b"more"}),
        ("a.jsonl.zst", zstandard.compress(LINES), {"a.jsonl": LINES}),
        ("a.jsonl.zst", zstandard.compress(LINES) + zstandard.compress(b"more"), {"a.jsonl": LINES + b"more"}),
        ("a.tar", TAR, {"folder/a.jsonl": LINES, "b.jsonl": b"b"}),
        ("a.tar.gz", gzip.compress(TAR, mtime=0), {"folder/a.jsonl": LINES, "b.jsonl": b"b"}),
        ("a.TGZ", gzip.compress(TAR, mtime=0), {"folder/a.jsonl": LINES, "b.jsonl": b"b"}),
        ("a.tar.zst", zstandard.compress(TAR), {"folder/a.jsonl": LINES, "b.jsonl": b"b"}),
        ("empty.gz", gzip.compress(b"", mtime=0), {"empty": b""}),
    ],
)
def test_unpacks(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    found = archive.unpack(tmp_path / name, tmp_path / "out")
    assert {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in found} == expected
    assert left(tmp_path / "out") == set(expected)


def test_leading_folders_can_be_dropped(tmp_path):
    (tmp_path / "a.tar").write_bytes(TAR)
    assert archive.unpack(tmp_path / "a.tar", tmp_path / "out", strip=1) == [tmp_path / "out" / "a.jsonl"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("a.tar", TAR),
        ("a.tar.gz", gzip.compress(TAR, mtime=0)),
        ("a.tar.zst", zstandard.compress(TAR)),
    ],
)
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_a_cut_stream_leaves_nothing(tmp_path, name, data, share):
    # A tar ends in zeros, some of which nobody misses.
    keep = int(share * (len(data) if not name.endswith(".tar") else len(data.rstrip(b"\0"))))
    (tmp_path / name).write_bytes(data[:keep])
    with pytest.raises(UserError, match=rf"{name} is damaged or cut short \(.*\): remove it and fetch it again"):
        archive.unpack(tmp_path / name, tmp_path / "out")
    assert left(tmp_path / "out") == set()


def test_a_tar_cut_between_two_files_is_cut(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of((member("a"), b"a" * 512))[:1024])
    with pytest.raises(UserError, match=r"cut short \(a tar without its end\)"):
        archive.unpack(tmp_path / "a.tar", tmp_path / "out")
    assert left(tmp_path / "out") == set()


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.tar", "a.tar.gz", "a.tar.zst"])
@pytest.mark.parametrize("data", [b"", b"these are no packed bytes at all" * 99])
def test_what_is_not_packed(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match="is damaged or cut short"):
        archive.unpack(tmp_path / name, tmp_path / "out")
    assert left(tmp_path / "out") == set()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "a\\..\\evil", ".."])
def test_names_that_lead_outside(tmp_path, name):
    (tmp_path / "a.tar").write_bytes(tar_of((member("good"), b"good"), (member(name), b"evil")))
    with pytest.raises(UserError, match=r"leads outside the folder it is meant for: do not trust where it comes from"):
        archive.unpack(tmp_path / "a.tar", tmp_path / "out")
    assert left(tmp_path) == {"a.tar"}


def test_links_and_devices_are_left_out(tmp_path, capsys):
    (tmp_path / "secret").write_text("secret")
    kinds = {
        "soft": (tarfile.SYMTYPE, "../secret"),
        "hard": (tarfile.LNKTYPE, "../secret"),
        "pipe": (tarfile.FIFOTYPE, ""),
        "device": (tarfile.CHRTYPE, ""),
    }
    links = [(member(name, kind, link), b"") for name, (kind, link) in kinds.items()]
    through = [(member("folder", tarfile.SYMTYPE, ".."), b""), (member("folder/evil"), b"evil")]
    (tmp_path / "a.tar").write_bytes(tar_of(*links, *through, (member("good"), b"good")))
    found = archive.unpack(tmp_path / "a.tar", tmp_path / "out")
    assert left(tmp_path) == {"a.tar", "secret", "out/good", "out/folder/evil"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    assert len(found) == 2
    said = capsys.readouterr().err
    assert all(f"a.tar: '{name}' is no plain file (a link or a device) and is left out" in said for name in kinds)


def test_a_bomb_stops_at_the_room_there_is(tmp_path, monkeypatch):

    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(50_000_000)))
    (tmp_path / "bomb.zst").write_bytes(zstandard.compress(bytes(50_000_000)))
    room = archive._SPARE_BYTES + 10_000_000
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": room}))
    for name in ("bomb.gz", "bomb.zst"):
        with pytest.raises(UserError, match=rf"{name} holds more than the 10\.0 MB there is room for"):
            archive.unpack(tmp_path / name, tmp_path / "out")
    assert left(tmp_path / "out") == set()


def test_a_header_is_not_read_into_memory_whole(tmp_path):
    header = member("header", tarfile.XHDTYPE)
    header.size = 1 << 30
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(header.tobuf(tarfile.USTAR_FORMAT) + bytes(30_000_000)))
    tracemalloc.start()
    with pytest.raises(UserError, match=r"a\.tar\.gz is damaged or cut short \(a header of more than 4\.2 MB\)"):
        archive.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15_000_000


def test_memory_does_not_grow_with_the_files_of_a_tar(tmp_path):
    """Headers may lie anywhere in a large file: each is allowed for by itself, and none is kept."""
    large = (member("large"), bytes(9_000_000))
    (tmp_path / "a.tar.gz").write_bytes(
        gzip.compress(tar_of(large, *[(member(f"d{n}", tarfile.DIRTYPE), b"") for n in range(5000)], large))
    )
    tracemalloc.start()
    assert archive.unpack(tmp_path / "a.tar.gz", tmp_path / "out") == [tmp_path / "out" / "large"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5_000_000


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\x1b[2J.jsonl", r"'a\\x1b\[2J\.jsonl' is not a valid file name: it has control characters, or is not UTF-8"),
        ("caf\udce9.jsonl", r"'caf\\udce9\.jsonl' is not a valid file name"),
        ("folder/.a.jsonl.fetched.json", "is a name that downloads reserve for their sidecars"),
        (".a.jsonl.part", "is a name that downloads reserve for their sidecars"),
        (".a.jsonl.part.json", "is a name that downloads reserve for their sidecars"),
    ],
)
def test_names_that_nothing_may_have(tmp_path, name, message):
    (tmp_path / "a.tar").write_bytes(tar_of((member("good"), b"good"), (member(name), b"evil")))
    with pytest.raises(UserError, match=message):
        archive.unpack(tmp_path / "a.tar", tmp_path / "out")
    assert left(tmp_path) == {"a.tar"}


def test_a_name_that_is_not_known(tmp_path):
    with pytest.raises(UserError, match=r"a\.zip cannot be unpacked: expected a name in \.gz, \.tgz, \.zst, \.tar"):
        archive.unpack(tmp_path / "a.zip", tmp_path)
