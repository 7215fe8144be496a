"""Configuration files of GPT-NeoX -> settings with the place where each was given.

A file is YAML (`.yml`, which a name may leave out) or JSON (`.json`). Several are merged: none may repeat what another
says. `-` and `_` are one in names. `--key value` of the command line wins over all files.
"""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openchatkit.errors import UserError
from openchatkit.neox import keys
from openchatkit.texts import reason_of

_ENDINGS = (".yml", ".yaml", ".json")


@dataclass(frozen=True)
class GivenValue:
    """A value as the user gave it, in its key's kind, and where: `configs/small.yml:12`, or `--seed`."""

    value: Any
    where: str


def read_settings(names: Sequence[str], folder: Path | None, overrides: Mapping[str, str]) -> dict[str, GivenValue]:
    """Read and merge files and the command line's `overrides` (texts by key): {key: value and place}.

    UserError: a file that is missing or not YAML, two of one base name, a key in two places or unknown, a value of
    another kind.
    """
    found: dict[str, GivenValue] = {}
    for path in find_files(names, folder):
        for name, value, where in _read_file(path):
            _add(found, name, value, where)
    last: dict[str, GivenValue] = {}
    for name, text in overrides.items():
        _add(last, name, _parse_override(name, text), f"--{name.replace('-', '_')}")
    return found | last


def find_files(names: Sequence[str], folder: Path | None) -> list[Path]:
    """Return the files of some names, `folder` before each; UserError for one that is missing or of a base name twice.

    Files are kept with the checkpoints under their base names.
    """
    paths: list[Path] = []
    for name in names:
        path = Path(name) if folder is None else folder / name
        if not path.name.endswith(_ENDINGS):
            path = path.with_name(f"{path.name}.yml")
        if not path.is_file():
            raise UserError(f"{path}: there is no such configuration file{_suggest(path)}")
        if same := next((other for other in paths if other.name == path.name), None):
            raise UserError(f"{path} and {same} have one name, under which both would be kept: rename one of them")
        paths.append(path)
    return paths


def _suggest(path: Path) -> str:
    there = [found.name for found in path.parent.glob("*") if found.name.endswith(_ENDINGS)]
    near = difflib.get_close_matches(path.name, there, n=3, cutoff=0.3)
    if near:
        return f": {path.parent} has {', '.join(near)}"
    return f" ({path.parent} is no folder)" if not path.parent.is_dir() else ""


def _add(found: dict[str, GivenValue], name: str, value: Any, where: str) -> None:
    """Take one setting, under the name that is used today."""
    name = name.lstrip("-").replace("-", "_")
    name = keys.ALIASES.get(name, name)
    key = keys.find_key(name, where)
    if name in found:
        raise UserError(f"{where}: {name} is also in {found[name].where}: leave one out")
    value = keys.read_value(name, key, value, where)
    if name in keys.BLOCKS and value is not None:
        value = _read_block(name, value, where)
    found[name] = GivenValue(value, where)


def _read_block(name: str, block: Mapping[str, Any], where: str) -> dict[str, Any]:
    known, read = keys.BLOCKS[name], {}
    for inner, value in block.items():
        key = keys.find_key(inner, f"{where}: {name}", known)
        read[inner] = keys.read_value(f"{name}.{inner}", key, value, where)
        if f"{name}.{inner}" in keys.BLOCKS and value is not None:
            read[inner] = _read_block(f"{name}.{inner}", read[inner], where)
    return read


def _parse_override(name: str, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"--{name} {text!r} is not YAML: {reason_of(error)}") from error


def _read_file(path: Path) -> Iterator[tuple[str, Any, str]]:
    """Yield name, value and place of each setting of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is not UTF-8: expected YAML such as {{'num_layers': 12}}") from error
    yield from _read_json(path, text) if path.suffix == ".json" else _read_yaml(path, text)


def _read_json(path: Path, text: str) -> Iterator[tuple[str, Any, str]]:
    def take_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"{path}:{_find_line(text, twice, last=True)}: {twice!r} is there twice: leave one out")
        return dict(pairs)

    try:
        settings = json.loads(text, object_pairs_hook=take_pairs)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno} is not JSON: {error.msg}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path}: expected settings such as {{'num_layers': 12}}, found something else")
    for name, value in settings.items():
        yield name, value, f"{path}:{_find_line(text, name)}"


def _find_line(text: str, name: str, *, last: bool = False) -> int:
    quoted = json.dumps(name)
    return text.count("\n", 0, max(0, text.rfind(quoted) if last else text.find(quoted))) + 1


def _read_yaml(path: Path, text: str) -> Iterator[tuple[str, Any, str]]:
    import yaml

    loader = yaml.SafeLoader(text)  # libyaml's, which is faster, takes tabs in some places
    try:
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: expected settings such as {{'num_layers': 12}}, found something else")
        _refuse_duplicates(root, path)
        for key, value in root.value:
            where = f"{path}:{key.start_mark.line + 1}"
            yield str(_to_value(loader, key, path)), _to_value(loader, value, path), where
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        if any("\t" in each for each in text.splitlines()[line - 1 : line]):
            raise UserError(f"{path}:{line}: there is a tab: YAML takes spaces alone, replace it") from error
        raise UserError(f"{path}:{line} is not YAML: {error.problem or reason_of(error)}") from error
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} is not YAML: {reason_of(error)}") from error
    finally:
        loader.dispose()


def _to_value(loader: Any, node: Any, path: Path) -> Any:
    """Return a node's value; UserError for a key that is there twice, at any depth."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        _refuse_duplicates(node, path)
        return {str(_to_value(loader, key, path)): _to_value(loader, value, path) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_to_value(loader, item, path) for item in node.value]
    return loader.construct_object(node)


def _refuse_duplicates(node: Any, path: Path) -> None:
    seen: dict[str, int] = {}
    for key, _ in node.value:
        name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
        if name in seen:
            raise UserError(f"{path}:{line}: {key.value!r} is also in line {seen[name]}: leave one out")
        seen[name] = line
