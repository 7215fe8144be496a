"""The checkpoints of a folder: their names, which one is the latest, which can be trusted, which may be deleted."""

import os
import re
import shutil
from pathlib import Path

from openchatkit.errors import UserError
from openchatkit.formats import legacy, manifest
from openchatkit.formats.manifest import DamagedError
from openchatkit.storage import replace_folder, write_text

STATE = "state.json"
LATEST = "latest"
_STEP = re.compile(r"(?:checkpoint_)?(\d+)")


def checkpoint_path(root: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return root / f"checkpoint_{step}"


def parse_step(name: str) -> int | None:
    """Return the step in a folder's name, `checkpoint_<step>` or the older `<step>`; None for other names."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def temporary_path(root: Path, step: int) -> Path:
    """Return the folder that a step's checkpoint is written to until it is whole."""
    return root / f".checkpoint_{step}.tmp"


def list_steps(root: Path) -> list[int]:
    """Return the steps of the checkpoint folders in `root`, whole or not, from the oldest to the newest."""
    entries = list(root.iterdir()) if root.is_dir() else []
    return sorted({step for e in entries if e.is_dir() and (step := parse_step(e.name)) is not None})


def find(root: Path, step: int) -> Path | None:
    """Return the folder of a step under either of its names; None where there is none."""
    candidates = (checkpoint_path(root, step), root / str(step))
    return next((path for path in candidates if path.is_dir()), None)


def is_legacy(path: Path) -> bool:
    """Return whether a folder is a checkpoint of the original kit."""
    return not (path / manifest.MANIFEST).exists() and path.is_dir() and bool(legacy.stage_files(path))


def latest(root: Path) -> Path | None:
    """Return the checkpoint to resume from: the one that `latest` names, else the newest whole one, else None.

    A `latest` that names no folder is ignored. UserError when there are checkpoints and none of them is whole:
    starting from scratch would be a silent loss.
    """
    if (step := _read_latest(root)) is not None and (path := find(root, step)):
        return path
    steps = list_steps(root)
    for step in reversed(steps):
        path = find(root, step)
        if path and (is_legacy(path) or _is_whole(path)):
            return path
    if steps:
        raise UserError(
            f"{root} holds the checkpoints {', '.join(map(str, steps))} but none is whole: copy a whole one here, "
            "or move them elsewhere to start from scratch"
        )
    return None


def locate(path: Path) -> Path:
    """Return the checkpoint that a user means: `path` itself, or the latest one in it; UserError where none is."""
    path = Path(path)
    if not path.exists() and (step := parse_step(path.name)) is not None:
        path = find(path.parent, step) or path
    if (path / STATE).exists() or (path / manifest.MANIFEST).exists() or is_legacy(path):
        return path
    if found := latest(path):
        return found
    what = "no such folder" if not path.is_dir() else ", ".join(sorted(e.name for e in path.iterdir())[:6]) or "nothing"
    raise UserError(f"{path} holds no checkpoint: found {what}; expected checkpoint_<step> or a folder that holds some")


def newest_verified(root: Path, *, but: Path | None = None) -> Path | None:
    """Return the newest checkpoint, other than `but`, whose every byte is as it was written; its files are read."""
    for step in reversed(list_steps(root)):
        path = find(root, step)
        if path is None or path == but or is_legacy(path):
            continue
        try:
            manifest.verify(path)
        except DamagedError:
            continue
        return path
    return None


def point_to(root: Path, step: int) -> None:
    """Make `latest` name the checkpoint of a step."""
    write_text(root / LATEST, f"{step}\n")


def prune(root: Path, keep: int, *, verified: Path | None = None, protected: int | None = None) -> list[Path]:
    """Delete all but the newest `keep` checkpoints, and leftovers of killed saves; return the deleted checkpoints.

    That of the step `protected` stays. Nothing is deleted unless a newer checkpoint is verified: `verified` if the
    caller has done that, else this reads the newest. Newer, damaged ones are not counted and stay; those of the
    original kit always stay.
    """
    assert keep >= 1, keep
    remove_leftovers(root)
    ours = {step: path for step in list_steps(root) if (path := find(root, step)) and (path / STATE).exists()}
    if len(ours) <= keep:
        return []
    trusted = verified or newest_verified(root)
    step = parse_step(trusted.name) if trusted else None
    if step is None:
        return []
    kept = [number for number in ours if number <= step][-keep:]
    doomed = {number: path for number, path in ours.items() if number < kept[0] and number != protected}
    for number, path in doomed.items():
        # Renamed first, so that a kill leaves a leftover and not half a checkpoint.
        os.rename(path, temporary_path(root, number))
        shutil.rmtree(temporary_path(root, number))
    return list(doomed.values())


def publish(temporary: Path, root: Path, step: int) -> Path:
    """Give a whole checkpoint its name, in place of an older one of that step, and point `latest` to it."""
    path = checkpoint_path(root, step)
    replace_folder(temporary, path)
    point_to(root, step)
    return path


def remove_leftovers(root: Path) -> None:
    """Remove temporary folders of killed saves; a checkpoint whose successor never got its name gets it back."""
    for old in root.glob(".checkpoint_*.old"):
        path = root / old.name.removeprefix(".").removesuffix(".old")
        if path.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, path)
    for temporary in root.glob(".checkpoint_*.tmp"):
        shutil.rmtree(temporary)


def _read_latest(root: Path) -> int | None:
    try:
        return parse_step((root / LATEST).read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None


def _is_whole(path: Path) -> bool:
    try:
        manifest.check_sizes(path, manifest.read(path))
    except DamagedError:
        return False
    return True
