"""Locks: one holder at a time, whoever waits is told, nothing stays behind."""

import threading
import time
from pathlib import Path

import pytest
from loguru import logger

from openchatkit.storage import hold_lock, lock_path, try_lock


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    lock = lock_path(tmp_path / "file")
    holders, most, said = 0, 0, []
    logger.add(said.append)

    def work() -> None:
        nonlocal holders, most
        for _ in range(20):
            with hold_lock(lock, "waiting"):
                holders += 1
                most = max(most, holders)
                time.sleep(0.001)
                holders -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert most == 1
    assert any("waiting" in text for text in said)
    assert list(tmp_path.iterdir()) == []


def fail_holding(lock: Path) -> None:
    with hold_lock(lock, "waiting"):
        assert try_lock(lock) is None
        raise ZeroDivisionError


def test_a_failure_frees_it(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail_holding(tmp_path / "deep" / ".lock")
    assert list((tmp_path / "deep").iterdir()) == []
