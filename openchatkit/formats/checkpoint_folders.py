"""The checkpoints of a folder: their names, which one is the latest, which can be trusted, which may be deleted."""

import json
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import IO

from openchatkit.errors import UserError
from openchatkit.formats import legacy, manifest
from openchatkit.formats.manifest import DamagedError, FileRecord, Manifest
from openchatkit.storage import replace_folder, sha256, storage_errors, try_lock, write_text

STATE = "state.json"
LATEST = "latest"
UPLOADED = "uploaded.json"  # beside a checkpoint's files, and not in its manifest: what was uploaded, and where to
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
    """Return the checkpoint to resume from, which `latest` names; None where there are no checkpoints.

    UserError when there are some and `latest` names none of them: another one in its place, or a start from scratch,
    would be a silent loss. It names the newest one whose every byte is as it was written, which means to read them.
    """
    steps = list_steps(root)
    if not steps:
        return None
    named, problem = _find_latest(root)
    if named is not None:
        return named
    if trusted := newest_verified(root):
        raise UserError(
            f"{root / LATEST} {problem}: the newest verified checkpoint is {trusted}; "
            f"`python tools/verify_checkpoint.py {root} --repair latest` makes it the one to go on from"
        )
    old = [path for step in steps if (path := find(root, step)) and is_legacy(path)]
    if old:
        raise UserError(f"{root / LATEST} {problem}: give the checkpoint itself, such as {old[-1]}")
    raise UserError(
        f"{root} holds the checkpoints {', '.join(map(str, steps))} but none is whole: copy a whole one here, "
        "or move them elsewhere to start from scratch"
    )


def read_latest(root: Path) -> Path | None:
    """Return the checkpoint that `latest` names, whatever state it is in; None where it names none."""
    return _find_latest(root)[0]


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder is a checkpoint, whole or not, of this kit or of the original one."""
    return (path / STATE).exists() or (path / manifest.MANIFEST).exists() or is_legacy(path)


def lock_run(root: Path) -> IO[str]:
    """Lock a run's folder until the returned file is closed, or its holder ends; UserError while another has it."""
    with storage_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = try_lock(root / ".lock")
    if lock is None:
        raise UserError(f"{root} is in use by another run: wait for it, or give another folder")
    return lock


def locate(path: Path) -> Path:
    """Return the checkpoint that a user means: `path` itself, or the latest one in it; UserError where none is."""
    path = Path(path)
    if not path.exists() and (step := parse_step(path.name)) is not None:
        path = find(path.parent, step) or path
    if is_checkpoint(path):
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
            manifest.verify(path, manifest=read_manifest(path))
        except DamagedError:
            continue
        return path
    return None


def read_manifest(path: Path) -> Manifest:
    """Read a checkpoint's manifest; DamagedError where it is of another step than the folder's name says."""
    listed = manifest.read(path)
    step = parse_step(path.name)
    if step is not None and listed.about.get("step", step) != step:
        raise DamagedError(f"{path} holds the checkpoint of step {listed.about['step']}: it was renamed or replaced")
    return listed


def point_to(root: Path, step: int) -> None:
    """Make `latest` name the checkpoint of a step."""
    write_text(root / LATEST, f"{step}\n")


def prune(
    root: Path,
    keep: int,
    *,
    verified: Path | None = None,
    protected: Collection[int] = (),
    uploads_to: str | None = None,
) -> list[Path]:
    """Delete all but the newest `keep` checkpoints; return the deleted ones.

    Those of the steps `protected` stay, and with `uploads_to` those that are not uploaded to that storage. Nothing is
    deleted unless a newer checkpoint is verified: `verified` if the caller has done that, else this reads the newest.
    Newer, damaged ones are not counted and stay; those of the original kit always stay.
    """
    assert keep >= 1, keep
    ours = {step: path for step in list_steps(root) if (path := find(root, step)) and (path / STATE).exists()}
    if len(ours) <= keep:
        return []
    trusted = verified or newest_verified(root)
    step = parse_step(trusted.name) if trusted else None
    if step is None:
        return []
    kept = [number for number in ours if number <= step][-keep:]
    doomed = {
        number: path
        for number, path in ours.items()
        if number < kept[0] and number not in protected and (uploads_to is None or is_uploaded(path, uploads_to))
    }
    for number, path in doomed.items():
        # Renamed first, so that a kill leaves a leftover and not half a checkpoint.
        os.rename(path, temporary_path(root, number))
        shutil.rmtree(temporary_path(root, number))
    return list(doomed.values())


def mark_uploaded(path: Path, storage: str, uploaded: FileRecord) -> None:
    """Note that the checkpoint with the manifest `uploaded` is whole in `storage`, as `S3Folder.storage` names it.

    That is not the one in `path` if the step was saved again beside the upload: then the note counts for nothing.
    """
    write_text(path / UPLOADED, json.dumps({"storage": storage, "manifest": uploaded.sha256}) + "\n")


def is_uploaded(path: Path, storage: str) -> bool:
    """Return whether a checkpoint, as it is here, is noted to be whole in `storage`."""
    try:
        noted = json.loads((path / UPLOADED).read_text(encoding="utf-8"))
        return bool(noted["storage"] == storage and noted["manifest"] == sha256(path / manifest.MANIFEST))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def list_to_upload(root: Path, storage: str) -> list[Path]:
    """Return the checkpoints of this kit that are not noted to be in `storage`, the oldest first."""
    found = [path for step in list_steps(root) if (path := find(root, step))]
    return [path for path in found if (path / manifest.MANIFEST).exists() and not is_uploaded(path, storage)]


def publish(temporary: Path, root: Path, step: int) -> Path:
    """Give a whole checkpoint its name, in place of an older one of that step, and point `latest` to it."""
    path = checkpoint_path(root, step)
    if not (root / LATEST).exists():
        # Named before it is there: a kill in between must not leave a checkpoint that `latest` does not name.
        point_to(root, step)
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


def count_leftover_bytes(root: Path) -> int:
    """Return the bytes that `remove_leftovers` would free."""
    files = [path for temporary in root.glob(".checkpoint_*.tmp") for path in temporary.rglob("*")]
    return sum(path.stat().st_size for path in files if path.is_file())


def _find_latest(root: Path) -> tuple[Path | None, str]:
    """Return the folder that `latest` names, or None and what is wrong with it."""
    try:
        text = (root / LATEST).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None, "is missing"
    except (OSError, ValueError):
        return None, "cannot be read"
    step = parse_step(text)
    return None if step is None else find(root, step), f"says {text[:40]!r}, and there is no such checkpoint"
