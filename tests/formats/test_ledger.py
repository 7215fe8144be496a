"""The ledger: rows that survive a kill, are cut where a run goes on, and are chained so that none can be exchanged."""

import dataclasses
from pathlib import Path

import pytest

from openchatkit.errors import UserError
from openchatkit.formats import ledger

ENTRIES = [
    ledger.LedgerRow(
        step, 8 * (step - 1), 8, f"{step:016x}", True, "1 stage x 1 replica, batch 8 x 1", "2024-01-01T00:00:00+00:00"
    )
    for step in range(1, 6)
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a ledger of five steps."""
    writer = ledger.LedgerFile(tmp_path, 0)
    for entry in ENTRIES:
        writer.append(entry)
    writer.close()
    return tmp_path


def test_rows_come_back_and_the_writer_knows_their_chain(tmp_path):
    writer = ledger.LedgerFile(tmp_path, 0)
    assert ledger.read(tmp_path) == []
    assert writer.chain == ledger.EMPTY
    for number, entry in enumerate(ENTRIES, 1):
        writer.append(entry)
        assert ledger.read(tmp_path) == ENTRIES[:number], "a row is in the file before the next step"
        assert writer.chain == ledger.chain(ENTRIES[:number])
    writer.sync()
    writer.close()


def test_no_file_is_no_rows(tmp_path):
    assert ledger.read(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_writes_behind_its_checkpoint(folder):
    writer = ledger.LedgerFile(folder, 3)
    assert writer.chain == ledger.chain(ENTRIES[:3])
    other = dataclasses.replace(ENTRIES[3], layout="2 stages x 1 replica, batch 8 x 1")
    writer.append(other)
    writer.close()
    assert ledger.read(folder) == [*ENTRIES[:3], other]


def test_a_line_cut_by_a_kill_is_dropped(folder):
    path = folder / ledger.LEDGER
    path.write_bytes(path.read_bytes()[:-20])
    assert ledger.read(folder) == ENTRIES[:4]
    writer = ledger.LedgerFile(folder, 4)
    writer.append(ENTRIES[4])
    writer.close()
    assert ledger.read(folder) == ENTRIES


def test_a_full_disk_is_an_error_once_and_not_again_on_closing(tmp_path, monkeypatch):
    writer = ledger.LedgerFile(tmp_path, 0)
    monkeypatch.setattr(writer, "_file", open("/dev/full", "a", buffering=1))  # noqa: SIM115 - closed by `close`
    with pytest.raises(OSError, match="No space left"):
        writer.append(ENTRIES[0])
    writer.close()


def test_a_damaged_older_row_is_an_error(folder):
    path = folder / ledger.LEDGER
    path.write_bytes(path.read_bytes().replace(b'"step": 2,', b"\0\0\0\0\0\0\0\0\0\0"))
    with pytest.raises(UserError, match=r"ledger\.jsonl:2 is damaged"):
        ledger.read(folder)
    assert ledger.cut(folder, 4) != ledger.chain(ENTRIES[:4])
    assert [entry.step for entry in ledger.read(folder)] == [1, 3, 4]


def test_the_chain_tells_every_change_apart():
    changes = [
        ENTRIES[:-1],
        ENTRIES[1:],
        [*ENTRIES[1::-1], *ENTRIES[2:]],
        [*ENTRIES[:-1], dataclasses.replace(ENTRIES[-1], digest="0" * 16)],
    ]
    chains = {ledger.chain(entries) for entries in (ENTRIES, *changes)}
    assert len(chains) == 5
    assert ledger.chain(ENTRIES[2:], ledger.chain(ENTRIES[:2])) == ledger.chain(ENTRIES)
