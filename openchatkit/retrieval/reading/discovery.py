"""The files under the paths that a user names, in a fixed order and without links."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.formats.retrieval_index import Skipped
from openchatkit.retrieval.reading.ignored import Rules, read_rules, rules_above


def find(
    paths: Sequence[Path], *, exclude: Sequence[Path] = (), include_ignored: bool = False
) -> tuple[list[Path], list[Skipped]]:
    """Return all files under `paths`, absolute and sorted, and what was skipped.

    Skipped are hidden names, links, everything that is not a file and, unless `include_ignored`, what a project itself
    excludes (`ignored`). A path that is named itself is read whatever its name, links included; `exclude` are folders
    of the index. UserError: a path does not exist, or has a name that no index can store.
    """
    files: set[Path] = set()
    skipped: list[Skipped] = []
    excluded = {real_path(path) for path in exclude}
    for path in paths:
        real = real_path(path)
        if os.fsencode(real) != str(real).encode("utf-8", "replace"):
            raise UserError(f"{path}: its name is not in UTF-8: rename it")
        if real.is_dir():
            rules = None if include_ignored else Rules(real, above=rules_above(real))
            for found in _list_folder(real, real, excluded, rules):
                files.add(found) if isinstance(found, Path) else skipped.append(found)
        elif real.is_file():
            files.add(real)
        else:
            raise UserError(f"{path}: no such file or folder; pass what the index is to be made from")
    return sorted(files), sorted(set(skipped), key=lambda each: each.source)


def real_path(path: Path) -> Path:
    """Return an absolute path without links and `~`; circular links are followed as far as possible."""
    return Path(os.path.realpath(Path(path).expanduser()))


def _list_folder(folder: Path, root: Path, excluded: set[Path], rules: Rules | None) -> Iterator[Path | Skipped]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield Skipped(str(folder), f"cannot be read: {error.strerror}")
        return
    if rules is not None:
        rules, problems = read_rules(folder, rules)
        yield from problems
    for entry in entries:
        path = folder / entry.name
        if path in excluded:
            continue
        reason = _reason_to_skip(entry, path, root) or ("" if rules is None else rules.reason(entry))
        if reason:
            yield Skipped(str(path), reason)
        elif entry.is_dir(follow_symlinks=False):
            yield from _list_folder(path, root, excluded, rules)
        else:
            yield path


def _reason_to_skip(entry: os.DirEntry[str], path: Path, root: Path) -> str:
    """Return why an entry of a folder is skipped; empty if it is not."""
    if entry.name.startswith("."):
        return "hidden"
    if not entry.name.isprintable():
        return "its name cannot be shown"
    if entry.is_symlink():
        inside = real_path(path).is_relative_to(root)
        return "a link to what is met there itself" if inside else "a link out of the folder"
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
    except OSError as error:  # it may be gone by now
        return f"cannot be read: {error.strerror}"
    return "" if stat.S_ISDIR(mode) or stat.S_ISREG(mode) else "no ordinary file"
