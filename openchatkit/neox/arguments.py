"""Command lines of GPT-NeoX's scripts: names of configuration files, flags, and `--key value` for any setting."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.neox.config import NeoxConfig

# Short spellings of settings, as GPT-NeoX's own command line has them.
_SHORT = {
    "-H": "--hostfile",
    "-i": "--sample_input_file",
    "-o": "--sample_output_file",
    "--conf-dir": "--conf_dir",
}


@dataclass(frozen=True)
class CommandLine:
    """`known` are the values of a parser's own flags, `overrides` the settings given, as texts by key."""

    known: Any
    overrides: dict[str, str]

    def read_config(self) -> NeoxConfig:
        """Read and merge the configuration that the command line names."""
        return NeoxConfig.read(self.known.conf_file, folder=self.known.conf_dir, overrides=self.overrides)

    @property
    def passed_on(self) -> list[str]:
        """The arguments that give another process the same configuration."""
        folder = [] if self.known.conf_dir is None else ["--conf_dir", str(self.known.conf_dir)]
        return [*self.known.conf_file, *folder, *(f"--{name}={text}" for name, text in self.overrides.items())]


class ConfigurationParser(cli.Parser):
    """A parser that knows its own flags, `flags`, from settings. Groups of flags it would not know."""

    def __init__(self, **options: Any) -> None:
        self.flags: set[str] = set()
        super().__init__(**options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        action = super().add_argument(*names, **options)
        self.flags.update(action.option_strings)
        return action

    def add_files(self) -> None:
        """Add the names of configuration files, and their folder."""
        self.add_argument("conf_file", nargs="+", metavar="CONF", help="configuration files; .yml may be left out")
        self.add_argument(
            "-d", "--conf_dir", type=Path, metavar="DIR", help="folder of the files, put before each name"
        )


def parse(parser: ConfigurationParser, argv: Sequence[str] | None) -> CommandLine:
    """Read a command line: the parser's own flags, and settings, which may stand anywhere between.

    UserError for a setting without a value, or that is there twice.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    rest: list[str] = []
    overrides: dict[str, str] = {}
    while words:
        word = words.pop(0)
        flag, equals, text = word.partition("=")
        flag = _SHORT.get(flag, flag)
        if not flag.startswith("--") or flag in parser.flags:
            rest.append(f"{flag}{equals}{text}")
            continue
        name = flag[2:].replace("-", "_")
        if not equals:
            values = _take_values(words, several=name == "eval_tasks")
            if not values:
                raise UserError(f"{word} is there without a value: settings are given as {word} VALUE")
            text = values[0] if len(values) == 1 else f"[{', '.join(values)}]"
        if name in overrides:
            raise UserError(f"{word} is there twice: leave one out")
        overrides[name] = text
    return CommandLine(parser.parse_intermixed_args(rest), overrides)


def _take_values(words: list[str], *, several: bool) -> list[str]:
    values: list[str] = []
    while words and (several or not values) and not re.match(r"--?[A-Za-z]", words[0]):
        values.append(words.pop(0))
    return values
