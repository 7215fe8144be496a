"""How a command ends: errors on one line, and Ctrl-C at any moment without a traceback."""

import subprocess
import sys

import pytest

from openchatkit import cli

START = """
import os, signal, sys
from openchatkit import cli
from openchatkit.errors import Interrupted, UserError

def press():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):  # Python raises between two steps of its own
        pass

@cli.command
def main(argv=None):
"""


def run(code: str) -> tuple[str, int]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == ""
    return done.stderr, done.returncode


@pytest.mark.parametrize(
    ("then", "said", "status"),
    [
        ("raise", "interrupted\n", 130),
        # As libraries do while they are imported.
        ("raise ImportError('half of it')", "interrupted\n", 130),
        ("raise Interrupted('run again')", "error: run again\n", 75),
        ("return 3", "", 3),
    ],
)
def test_ctrl_c_ends_a_command_in_one_line(then, said, status):
    body = f"    try:\n        press()\n    except BaseException:\n        {then}\n"
    assert run(f"{START}{body}main()\n") == (said, status)


def test_ctrl_c_before_the_command_begins_is_no_traceback():
    assert run(f"{START}    pass\npress()\n") == ("interrupted\n", -2)


def test_a_defect_keeps_its_traceback():
    said, status = run(f"{START}    raise ValueError('a defect')\nmain()\n")
    assert said.startswith("Traceback")
    assert said.endswith("ValueError: a defect\n")
    assert status == 1


def test_an_interrupt_that_is_ignored_stays_ignored():
    ignored = START.replace("from openchatkit", "signal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom openchatkit", 1)
    assert run(f"{ignored}    press()\n    return 4\nmain()\n") == ("", 4)


def test_what_an_error_echoes_is_shown_and_not_obeyed():
    assert (
        cli.one_line("two\n lines \x1b[31m\x9b \u202e 日本 😀 \udcff")
        == "two lines \\x1b[31m\\x9b \\u202e 日本 😀 \\udcff"
    )
