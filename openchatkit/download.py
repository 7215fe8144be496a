"""Models and data sets from the Hugging Face hub, or from a folder. No code is fetched, and no pickle if avoidable."""

import contextlib
import fnmatch
import glob
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from openchatkit.errors import UserError


def fetch_model(name: str, small: Sequence[str], *weights: Sequence[str]) -> Path:
    """The folder of a model: `name` itself if it is one, else fetched from the hub into its cache (resumable).

    `small` and `weights` are patterns of file names; of the sets of weights, the first that the hub has is fetched.
    UserError, with what to do, when the hub cannot be reached or knows no such model.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if local.exists() or name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise UserError(f"{name}: no such folder; pass a folder or a hub name such as EleutherAI/pythia-1.4b")
    folder = _fetch(name, small)
    for patterns in weights:
        folder = _fetch(name, patterns)
        if any(match for pattern in patterns for match in folder.glob(pattern)):
            break
    return folder


def fetch_dataset(name: str, files: Sequence[str], destination: Path) -> list[Path]:
    """Fetch files of a hub data set into a folder, and say where they are; what is there already is not fetched again.

    `files` are globs or names, with or without their endings (`unified_ni` is unified_ni.jsonl.gz); none means all
    files of records. UserError, with what to do, when the hub cannot be reached, has no such file, or the disk is too
    small.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(name, "data set"):
        offered = snapshot_download(name, repo_type="dataset", local_dir=destination, dry_run=True)
    wanted = files or ["*.jsonl*"]
    for pattern in wanted:
        if not any(_is_meant(file.filename, pattern) for file in offered):
            there = ", ".join(sorted(file.filename for file in offered)[:50])
            raise UserError(f"{name} holds no file {pattern}: expected one of {there}")
    chosen = [file for file in offered if any(_is_meant(file.filename, pattern) for pattern in wanted)]
    destination.mkdir(parents=True, exist_ok=True)
    missing, free = sum(file.file_size for file in chosen if file.will_download), shutil.disk_usage(destination).free
    if missing > free:
        raise UserError(
            f"{name}: {missing / 1e9:.1f} GB are to be fetched and {destination} has room for {free / 1e9:.1f} GB: "
            "make room, or name fewer files"
        )
    with _hub_errors(name, "data set"):
        snapshot_download(
            name,
            repo_type="dataset",
            revision=chosen[0].commit_hash,
            local_dir=destination,
            allow_patterns=[glob.escape(file.filename) for file in chosen],
        )
    return [destination / file.filename for file in chosen]


def _is_meant(file: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(file, pattern) or file.startswith(f"{pattern}.")


def _fetch(name: str, patterns: Sequence[str]) -> Path:
    # The hub's client is only needed, and only imported, when something is to be fetched.
    from huggingface_hub import snapshot_download

    with _hub_errors(name, "model"):
        return Path(snapshot_download(name, allow_patterns=list(patterns)))


@contextlib.contextmanager
def _hub_errors(name: str, kind: str) -> Iterator[None]:
    """Turn what the hub's client raises into a UserError about the model or data set `name`."""
    from huggingface_hub.errors import (
        DryRunError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        yield
    except (HFValidationError, DryRunError, LocalEntryNotFoundError, HfHubHTTPError) as error:
        # A dry run hides why it failed behind an error of its own.
        reason = error.__cause__ if isinstance(error, DryRunError) else error
        if isinstance(reason, GatedRepoError):
            says = "the hub asks for its licence to be accepted; accept it there and set HF_TOKEN"
        elif isinstance(reason, RepositoryNotFoundError):
            says = f"the hub knows no such {kind}; check the spelling, or set HF_TOKEN if it is private"
        elif isinstance(reason, HFValidationError):
            says = "no hub name; expected ORG/NAME or a folder"
        elif kind == "model":
            says = (
                "the hub cannot be reached and it is not in the cache; connect and run again, or pass a folder that "
                "holds the model"
            )
        else:
            says = "the hub cannot be reached; connect and run again, what is there already is kept"
        raise UserError(f"cannot fetch {name}: {says}") from error
