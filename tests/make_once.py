"""Folders that are made once for all workers of a test session, such as trained models."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def session_folder(paths: pytest.TempPathFactory) -> Path:
    """Return the temporary folder of the session, in which each worker of pytest-xdist has one of its own."""
    base = paths.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


class MakeOnce:
    """Called with a name and a function: the folder of that name in `root`, which `write(folder)` has filled once."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __call__(self, name: str, write: Callable[[Path], object]) -> Path:
        folder, unfinished = self._root / f"{name}0", self._root / f"{name}.unfinished"
        with open(self._root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished.mkdir()
                write(unfinished)
                unfinished.rename(folder)
        return folder
