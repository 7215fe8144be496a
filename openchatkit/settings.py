"""Settings of a command as frozen dataclasses: its flags, its `--config` file and their documentation come from these.

    @dataclass(frozen=True, kw_only=True)
    class BatchSettings:
        title: ClassVar[str] = "batch"
        micro_batch_size: int = setting(8, check=positive_int, help="rows of one micro-batch")

The field is the flag `--micro-batch-size` and the key `micro_batch_size` of a YAML file. A class that inherits from
several such groups has the settings of all of them. Owns no setting of any command.
"""

import argparse
import dataclasses
import difflib
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from openchatkit.cli import Parser, truth
from openchatkit.errors import UserError
from openchatkit.paths import ROOT
from openchatkit.texts import reason_of

_OVERRIDES = "--overrides"

_UNSET = object()
_NULL = "tag:yaml.org,2002:null"


def setting(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    check: Callable[[str], Any] | None = None,
    choices: Collection[str] = (),
    required: bool = False,
    alone: Any = None,
) -> Any:
    """Declare a dataclass field that is a flag.

    `help` says in Markdown what it means. `check` makes the value of its text and raises ArgumentTypeError; by default
    it is that of the field's type. Without a default, the user (`required`) or the command itself has to give a value.
    `alone` is the value of the flag where none follows it, if one may be left out.
    """
    metadata = {"help": help, "check": check, "choices": tuple(choices), "required": required, "alone": alone}
    return dataclasses.field(default=default, metadata=metadata)


def fields(cls: type) -> list[dataclasses.Field[Any]]:
    """Return the fields of `cls` that are settings."""
    return [field for field in dataclasses.fields(cls) if "help" in field.metadata]


def _group_fields(cls: type) -> dict[str, list[dataclasses.Field[Any]]]:
    """Return {title: fields} of the groups that `cls` inherits from, in the order of its bases.

    A base that is no group itself has those of its own bases. A field that `cls` declares again is the one it declares.
    """
    own = {field.name: field for field in fields(cls)}
    found: dict[str, list[dataclasses.Field[Any]]] = {}
    for base in cls.__bases__:
        title = vars(base).get("title")
        groups = _group_fields(base) if title is None else {title: fields(base)}
        for name, settings in groups.items():
            found.setdefault(name, []).extend(own[field.name] for field in settings)
    return found


def flag(name: str) -> str:
    """Return `--batch-size` for the field `batch_size`."""
    return f"--{name.replace('_', '-')}"


def add_flags(parser: argparse._ActionsContainer, settings: Collection[dataclasses.Field[Any]]) -> None:
    """Add the flags of some settings; one without a default is not in the parser's result unless it is given."""
    for field in settings:
        default = argparse.SUPPRESS if field.default is dataclasses.MISSING else field.default
        text = field.metadata["help"] + (
            f" (default: {_format_default(field.default)})" if _format_default(field.default) else ""
        )
        options: dict[str, Any] = {}
        if field.type is bool:
            options = {"nargs": "?", "const": True, "metavar": "true|false"}
        elif field.metadata["alone"] is not None:
            options = {"nargs": "?", "const": field.metadata["alone"]}
        parser.add_argument(
            flag(field.name),
            type=_find_check(field),
            choices=field.metadata["choices"] or None,
            default=default,
            help=text.replace("`", "").replace("%", "%%"),
            **options,
        )


def to_json(settings: Any) -> dict[str, object]:
    """Return {name: value} of an object's settings, sorted by name; a path becomes its text."""
    values = {field.name: getattr(settings, field.name) for field in fields(type(settings))}
    return {name: str(value) if isinstance(value, Path) else value for name, value in sorted(values.items())}


@dataclasses.dataclass(frozen=True)
class Given:
    """The settings that a user gave, by name. `last`: those of the command line itself, not of a file or a recipe."""

    values: Mapping[str, Any]
    last: Collection[str]


class SettingsParser(Parser):
    """Parser of the flags of a class of settings, of `--config FILE` and of `--overrides`.

    The command line wins over the file. Flags before `--overrides`, such as a recipe's, lose to both. `unlisted` flags
    are accepted and not shown; `refused` ones are errors wherever they stand, with the reason that is given for each.
    `alternatives` are sets of settings that say the same thing in several ways: the last place that gives any of a set
    replaces all that earlier places gave of it.
    """

    def __init__(
        self,
        cls: type,
        *,
        alternatives: Sequence[Collection[str]] = (),
        unlisted: Collection[str] = (),
        refused: Mapping[str, str] = types.MappingProxyType({}),
        **options: Any,
    ) -> None:
        self._settings = {field.name: field for group in _group_fields(cls).values() for field in group}
        self._required = [name for name, field in self._settings.items() if field.metadata["required"]]
        self._refused = refused
        self._known = {*self._settings, *unlisted, *refused}
        self._alternatives = alternatives
        needed = "".join(f" {flag(name)} {name.upper()}" for name in self._required)
        super().__init__(
            usage=f"%(prog)s [--config FILE]{needed} [--FLAG VALUE ...]",
            formatter_class=argparse.HelpFormatter,
            **options,
        )
        self.add_argument(
            "--config",
            type=Path,
            metavar="FILE",
            action="append",
            default=argparse.SUPPRESS,
            help="YAML file of settings, with lines such as lr: 2e-5; the command line wins over it",
        )
        self.add_argument(
            _OVERRIDES,
            action="store_true",
            default=argparse.SUPPRESS,
            help="flags before this one are a recipe's: --config and the flags after it win over them",
        )
        for title, settings in _group_fields(cls).items():
            add_flags(self.add_argument_group(title), settings)
        for name in sorted({*unlisted, *refused}):
            self.add_argument(flag(name), nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def read(self, argv: Sequence[str] | None = None) -> Given:
        """Read the settings that are given; UserError for one that is wrong, unknown, or required and missing."""
        arguments = list(sys.argv[1:] if argv is None else argv)
        here = arguments.index(_OVERRIDES) if _OVERRIDES in arguments else 0
        layers = [*self._read_layers(arguments[:here]), *self._read_layers(arguments[here:])]
        values: dict[str, Any] = {}
        for layer in layers:
            for names in self._alternatives:
                if not layer.keys().isdisjoint(names):
                    values = {name: value for name, value in values.items() if name not in names}
            values |= layer
        missing = [flag(name) for name in self._required if name not in values]
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return Given(values, layers[-1].keys())

    def _read_layers(self, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield the settings of each file that these arguments name, then those of the arguments themselves."""
        layer = self._read_flags(arguments)
        layer.pop(_OVERRIDES.strip("-"), None)
        for path in layer.pop("config", ()):
            yield self._read_file(path)
        yield layer

    def _read_flags(self, arguments: Sequence[str]) -> dict[str, Any]:
        unset = argparse.Namespace(**dict.fromkeys(self._settings, _UNSET))
        found = {name: value for name, value in vars(self.parse_args(arguments, unset)).items() if value is not _UNSET}
        for name, reason in self._refused.items():
            if name in found:
                raise UserError(f"{flag(name)}: {reason}")
        return found

    def _read_file(self, path: Path) -> dict[str, Any]:
        layer: dict[str, Any] = {}
        seen: set[str] = set()
        for line, key, text in _read_entries(path):
            name = key.replace("-", "_")
            if name not in self._known:
                nearest = difflib.get_close_matches(name, self._settings, n=1, cutoff=0)[0]
                raise UserError(f"{path}:{line}: there is no setting {key!r}: the nearest is {nearest!r}")
            if name in seen:
                raise UserError(f"{path}:{line}: {key!r} is there twice: leave one out")
            seen.add(name)
            if text is None:
                continue
            try:
                layer |= self._read_flags([f"{flag(name)}={text}"])
            except UserError as error:
                raise UserError(f"{path}:{line}: {error}") from error
        return layer


def _make_table(cls: type) -> str:
    """Return the settings of `cls` as Markdown: a table a group, with each flag's default and meaning."""
    lines = []
    for title, settings in _group_fields(cls).items():
        lines += ["", f"### {title.capitalize()}", "", "| flag | default | meaning |", "|-|-|-|"]
        for field in settings:
            *first, last = [f"`{choice}`" for choice in field.metadata["choices"]] or [""]
            choices = f"{', '.join(first)} or {last}: " if first else ""
            meaning = (choices + field.metadata["help"]).strip()
            lines.append(" ".join(f"| `{flag(field.name)}` | {_format_default(field.default)} | {meaning} |".split()))
    return "\n".join(lines).strip() + "\n"


def update_table(text: str, cls: type) -> str:
    """Return a README's text with the table of `cls` between `<!-- flags ... -->` and `<!-- end of flags -->`."""
    start = text.index("-->\n", text.index("<!-- flags")) + len("-->\n")
    end = text.index("<!-- end of flags -->")
    return f"{text[:start]}\n{_make_table(cls)}\n{text[end:]}"


def _format_default(default: object) -> str:
    """Return a default as the table shows it; nothing for no default, and for a flag that is off."""
    if default is dataclasses.MISSING or default is None or default is False:
        return ""
    if isinstance(default, Path):
        default = default.relative_to(ROOT)
    return f"`{'true' if default is True else default}`"


def _find_check(field: dataclasses.Field[Any]) -> Callable[[str], Any]:
    by_type: dict[Any, Callable[[str], Any]] = {bool: truth, Path: Path}
    check: Callable[[str], Any] = field.metadata["check"] or by_type.get(field.type, str)
    return check


def _read_entries(path: Path) -> Iterator[tuple[int, str, str | None]]:
    """Yield line, key and text of each entry of a YAML file; a list is joined by commas, null is None.

    The text is as it was written, so that a flag's own check reads `1e-5` or `007`, and not YAML's idea of them.
    """
    import yaml

    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}: expected a YAML file of settings") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        reason = reason_of(error)
        if isinstance(error, yaml.MarkedYAMLError) and error.problem and error.problem_mark:
            # The whole error quotes the file, which may hold a secret that does not belong there.
            reason = f"{error.problem} in line {error.problem_mark.line + 1}"
        raise UserError(f"--config {path} is not YAML: {reason}; expected lines such as `lr: 2e-5`") from error
    if root is None or root.tag == _NULL:
        return
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config {path}: expected lines such as `lr: 2e-5`, found something else than settings")
    for key, value in root.value:
        line = key.start_mark.line + 1
        texts = value.value if isinstance(value, yaml.SequenceNode) else [value]
        if not all(isinstance(node, yaml.ScalarNode) for node in (key, *texts)):
            raise UserError(f"{path}:{line}: expected a name and one value, or a list of values: `lr: 2e-5`")
        yield line, key.value, None if value.tag == _NULL else ",".join(node.value for node in texts)
