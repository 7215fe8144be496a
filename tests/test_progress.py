"""openchatkit/progress.py: what a person at a terminal sees, and a log does not."""

import io
import os
import pty
import sys

from openchatkit import progress


def test_an_announcement_is_for_a_terminal_alone(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    progress.announce("loading a model")
    assert log.getvalue() == ""
    shown, written = pty.openpty()
    with open(shown, "rb", buffering=0) as screen, open(written, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        progress.announce("loading a model")
        assert os.read(screen.fileno(), 100) == b"loading a model\r\n"
