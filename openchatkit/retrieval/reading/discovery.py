"""Which files lie under the paths that a user names: in a fixed order, and none that is not really there."""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.formats.retrieval_index import Skipped
from openchatkit.retrieval.reading.ignored import Rules, rules_above, rules_in


def find(
    paths: Sequence[Path], *, exclude: Sequence[Path] = (), include_ignored: bool = False
) -> tuple[list[Path], list[Skipped]]:
    """All files under `paths`, absolute and sorted, and what was left out: hidden names, links, what is no file, and,
    unless `include_ignored`, what a project keeps out of its files (`ignored`).

    A path that is named itself is taken whatever it is called, links included; `exclude` are folders that belong to
    the index. UserError: a path that is not there, or whose name no index can hold.
    """
    files: set[Path] = set()
    skipped: list[Skipped] = []
    barred = {real_path(path) for path in exclude}
    for path in paths:
        real = real_path(path)
        if os.fsencode(real) != str(real).encode("utf-8", "replace"):
            raise UserError(f"{path}: its name is not in UTF-8: rename it")
        if real.is_dir():
            rules = None if include_ignored else Rules(real, above=rules_above(real))
            for found in _list_folder(real, real, barred, rules):
                files.add(found) if isinstance(found, Path) else skipped.append(found)
        elif real.is_file():
            files.add(real)
        else:
            raise UserError(f"{path}: no such file or folder; pass what the index is to be made from")
    return sorted(files), sorted(set(skipped), key=lambda each: each.source)


def real_path(path: Path) -> Path:
    """A path without links and `~`, absolute; where links lead in a circle, as far as they lead anywhere."""
    return Path(os.path.realpath(Path(path).expanduser()))


def _list_folder(folder: Path, root: Path, barred: set[Path], rules: Rules | None) -> Iterator[Path | Skipped]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield Skipped(str(folder), f"cannot be read: {error.strerror}")
        return
    if rules is not None:
        *told, rules = rules_in(folder, rules)
        yield from told
    for entry in entries:
        path = folder / entry.name
        if path in barred:
            continue
        reason = _reason_to_skip(entry, path, root) or ("" if rules is None else rules.reason(entry))
        if reason:
            yield Skipped(str(path), reason)
        elif entry.is_dir(follow_symlinks=False):
            yield from _list_folder(path, root, barred, rules)
        else:
            yield path


def _reason_to_skip(entry: os.DirEntry[str], path: Path, root: Path) -> str:
    """Why an entry of a folder is left out; empty where it is not."""
    if entry.name.startswith("."):
        return "hidden"
    if not entry.name.isprintable():
        return "its name cannot be shown"
    if entry.is_symlink():
        inside = real_path(path).is_relative_to(root)
        return "a link to what is met there itself" if inside else "a link out of the folder"
    try:
        mode = entry.stat(follow_symlinks=False).st_mode
    except OSError as error:  # it may have gone since
        return f"cannot be read: {error.strerror}"
    return "" if stat.S_ISDIR(mode) or stat.S_ISREG(mode) else "no ordinary file"
