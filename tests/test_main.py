"""The command `openchatkit`: every program by its name, and what it says of itself."""

import pytest

from openchatkit import __version__
from openchatkit.__main__ import COMMANDS, find, main
from openchatkit.paths import ROOT


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(argv)
    return end.value.code


@pytest.mark.parametrize("name", COMMANDS)
def test_every_program_is_its_script_s(name: str, capsys: pytest.CaptureFixture) -> None:
    assert list(ROOT.glob(COMMANDS[name][1])), "the script that it names"
    assert callable(find(name))
    with pytest.raises(SystemExit) as end:
        find(name)(["--help"])
    assert end.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_what_it_says_of_itself(capsys: pytest.CaptureFixture) -> None:
    assert run("--help") == 0
    printed = capsys.readouterr().out
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert run() == 0
    assert capsys.readouterr().out == printed
    assert run("--version") == 0
    assert capsys.readouterr().out == f"openchatkit {__version__}\n"


def test_a_command_that_there_is_not(capsys: pytest.CaptureFixture) -> None:
    assert run("convrt") == 2
    assert "error: there is no command 'convrt': expected one of prepare, fetch" in capsys.readouterr().err
