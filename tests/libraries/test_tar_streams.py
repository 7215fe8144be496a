"""Tars as streams, with the recent feature of tarfile and without it; `tests/download/test_archive.py` has the rest."""

import io
import tarfile

import pytest

from openchatkit.libraries import tar_streams


class OldTarFile(tarfile.TarFile):
    """Knows nothing of streams, as before Python 3.13."""

    def __init__(self, name=None, mode="r", fileobj=None, **options):
        super().__init__(name, mode, fileobj, **options)


@pytest.fixture(params=[tarfile.TarFile, OldTarFile], ids=["present", "old"])
def kind(request, monkeypatch):
    monkeypatch.setattr(tarfile, "TarFile", request.param)
    monkeypatch.setattr(tarfile, "open", request.param.open)


def test_members_come_with_their_contents(kind):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name, contents in (("a", b"one"), ("folder", None), ("b", b"two" * 999)):
            member = tarfile.TarInfo(name)
            member.type, member.size = (tarfile.DIRTYPE, 0) if contents is None else (tarfile.REGTYPE, len(contents))
            archive.addfile(member, io.BytesIO(contents or b""))
    made.seek(0)
    found = [(member.name, file and file.read()) for member, file in tar_streams.read_members(made)]
    assert found == [("a", b"one"), ("folder", None), ("b", b"two" * 999)]
