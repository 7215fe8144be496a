"""Names in `--task-name` -> files of records, or token stores; remote ones are fetched first.

In this order: a path or a glob; the prefix of a token store, `PREFIX[0:900]` for its documents 0 to 899, or
`PREFIX[labels=OTHER]` for a store and its label store; the bare name of a file that a `prepare.py` has fetched
(`unified_ni` for data/OIG/files/unified_ni.jsonl.gz, and the original kit's `cot`); an address (`https://`, `s3://`,
`hf://datasets/ORG/NAME/GLOB`); a data set of the Hugging Face hub (`ORG/NAME`). Fetched files stay in the cache, and a
later run takes them from there without a connection.
"""

import glob
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from openchatkit import paths, storage
from openchatkit.data.records import reader, tables
from openchatkit.download.sources import fetch, fetch_dataset
from openchatkit.errors import Interrupted, UserError
from openchatkit.formats import token_store

_PACKED = ("", ".gz", ".zst", ".bz2", ".xz")
# The files looked for in a data set of the hub; JSON there is as often a description of the data.
_HUB_SUFFIXES = tuple(suffix for suffix in reader.RECORD_SUFFIXES if suffix.split(".")[1] != "json")
_DOCUMENTS = re.compile(r"(?P<prefix>.+)\[(?P<first>\d+):(?P<last>\d+)\]")
_LABELLED = re.compile(r"(?P<prefix>.+)\[labels=(?P<labels>.+)\]")
_ADDRESS = re.compile(r"(https?|s3)://")
_HUB = re.compile(r"(?:hf://datasets/)?(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<glob>.+))?")
# A name that the original's documentation uses and that no file has.
_ALIASES = {"cot": "unified_mathqa_flanv2_kojma_cot"}
# Splits of a hub's data set that are not for training, by the names that are usual there.
_HELD_OUT = re.compile(r"(^|[\W_])(test|testing|eval|evaluation|valid|validation|val|dev)([\W_]|$)")


@dataclass(frozen=True)
class DataFiles:
    """Files of records, or prefixes of token stores; one of the two is empty.

    `documents` are the first one and the end of those to take of a single store, where not all are meant; `labels` is
    the prefix of a single store's label store.
    """

    files: tuple[Path, ...] = ()
    stores: tuple[Path, ...] = ()
    documents: tuple[int, int] | None = None
    labels: Path | None = None


def is_address(name: str) -> bool:
    """Return whether a name is an address."""
    return bool(_ADDRESS.match(name)) or name.startswith("hf://")


def is_path(name: str) -> bool:
    """Return whether there is a file or folder of exactly this name on this machine."""
    return bool(name) and not is_address(name) and os.path.lexists(os.path.expanduser(name))


def find_local(name: str) -> DataFiles | None:
    """Return the data of this name on this machine, or None."""
    if not name or is_address(name):
        return None
    name = os.path.expanduser(name)
    for candidate in (Path(name + packed) for packed in _PACKED):
        if candidate.is_file() and reader.is_readable(candidate.name):
            return DataFiles(files=(candidate,))
    if prefix := token_store.find_prefix(Path(name)):
        return DataFiles(stores=(prefix,))
    if (some := _DOCUMENTS.fullmatch(name)) and (prefix := token_store.find_prefix(Path(some["prefix"]))):
        return DataFiles(stores=(prefix,), documents=(int(some["first"]), int(some["last"])))
    if some := _LABELLED.fullmatch(name):
        prefix, labels = (_find_store(some[part]) for part in ("prefix", "labels"))
        return DataFiles(stores=(prefix,), labels=labels)
    if tables.is_saved_dataset(Path(name)):
        return DataFiles(files=(Path(name),))
    if Path(name).is_file():
        return DataFiles(files=(Path(name),))  # `reader` names the endings it reads in its error
    if glob.has_magic(name):
        return _match(name)
    return _find_prepared(name)


def fetch_remote(name: str, cache_dir: Path) -> DataFiles | None:
    """Fetch the data of an address or of a hub's data set into the cache; None if the name has neither form.

    UserError when it cannot be fetched. Any number of processes may call this at once.
    """
    if _ADDRESS.match(name):
        place = Path(cache_dir) / "downloads" / hashlib.sha256(name.encode()).hexdigest()[:16]
        return DataFiles(files=(fetch(name, place),))
    match = _HUB.fullmatch(name)
    if not match or (not name.startswith("hf://") and not _is_hub_name(name)):
        return None
    try:
        return DataFiles(files=_fetch_from_hub(match["name"], match["glob"], Path(cache_dir) / "downloads" / "hub"))
    except UserError as error:
        if isinstance(error, Interrupted) or name.startswith("hf://"):
            raise
        # A mistyped local path has the same form.
        raise UserError(f"{name} is no file or folder here; as a data set of the hub: {error}") from error


def explain_missing(name: str) -> str:
    """Return the message for a name without data: what is there instead, and the command that fetches it."""
    if name.removesuffix(".jsonl") in _ALIASES or ("/" not in name and name.startswith("unified_")):
        stem = _ALIASES.get(name.removesuffix(".jsonl"), name)
        return f"{name} is not here yet: run `python data/OIG/prepare.py --files {stem}` first"
    path = Path(name)
    if path.is_dir():
        return f"{name} is a folder: pass its files, for example {path / '*.jsonl'}"
    folder = path.parent
    if folder.is_dir():
        names = sorted(entry.name for entry in folder.iterdir() if reader.is_readable(entry.name))
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        found = f"{folder} holds {', '.join(names[:5]) or 'no file of records'}{more}"
    else:
        found = f"there is no folder {folder}"
    return f"no file {name} ({found}){_fetch_command(folder)}"


def _find_store(name: str) -> Path:
    """Return the prefix of a store that must be there."""
    if prefix := token_store.find_prefix(Path(os.path.expanduser(name))):
        return prefix
    raise UserError(f"there is no token store {name}: expected {token_store.idx_path(Path(name))} and its .bin")


def _match(pattern: str) -> DataFiles | None:
    """Return the matches of a glob, sorted: files of records and saved data sets, or token stores (several files each).

    UserError where it matches anything else besides: nobody would notice that it is left out.
    """
    matches = list(map(Path, sorted(glob.glob(_escape_folders(pattern), recursive=True))))
    saved = [path for path in matches if tables.is_saved_dataset(path)]
    matches = [path for path in matches if path.is_file() and not set(saved).intersection(path.parents)]
    parts = {path: prefix for path in matches if (prefix := token_store.find_prefix(path))}
    stores = tuple(dict.fromkeys(parts.values()))
    rest = [path for path in matches if path not in parts]
    files = tuple(sorted([*saved, *(path for path in rest if reader.is_readable(path.name))]))
    unknown = [path for path in rest if not reader.is_readable(path.name)]
    if files and stores:
        raise UserError(f"{pattern} matches files of records and token stores: expected one kind, name them apart")
    if not files and not stores:
        return DataFiles(files=tuple(unknown)) if unknown else None
    if unknown:
        names = ", ".join(str(path) for path in unknown[:5]) + (f" and {len(unknown) - 5} more" if unknown[5:] else "")
        raise UserError(
            f"{pattern} also matches what cannot be read, {names}: name the files, or give a pattern that matches "
            f"nothing but {reader.ENDINGS}"
        )
    return DataFiles(files, stores)


def _escape_folders(pattern: str) -> str:
    """Escape the names of existing folders in a glob: `[v2]`, say, then matches the folder `[v2]`."""
    place, parts = Path(), []
    for part in Path(pattern).parts:
        place = place / part
        parts.append(glob.escape(part) if place.is_dir() else part)
    return os.path.join(*parts)


def _find_prepared(name: str) -> DataFiles | None:
    """Return the file of a bare name that some data/*/prepare.py has fetched."""
    stem = name.removesuffix(".jsonl")
    stem = _ALIASES.get(stem, stem)
    if not re.fullmatch(r"[\w-][\w.-]*", stem):
        return None
    for suffix in reader.RECORD_SUFFIXES:
        for found in sorted((paths.ROOT / "data").glob(f"*/files/{stem}{suffix}")):
            return DataFiles(files=(found,))
    return None


def _is_hub_name(name: str) -> bool:
    """Return whether a name is ORG/NAME and not more likely a mistyped path."""
    folder, _, rest = name.partition("/")
    return "/" not in rest and not reader.is_readable(rest) and not Path(folder).is_dir()


def _fetch_from_hub(name: str, pattern: str | None, downloads: Path) -> tuple[Path, ...]:
    """Fetch the files of a hub's data set that `pattern` matches or, without one, those for training."""
    folder = downloads / name.replace("/", "--")
    listing = folder / f"files-{hashlib.sha256((pattern or '').encode()).hexdigest()[:16]}.txt"
    if not listing.is_file():
        with storage.hold_lock(storage.lock_path(folder), f"{name} is fetched by another process: waiting for it"):
            if not listing.is_file():
                found = fetch_dataset(name, [pattern] if pattern else _is_for_training, folder / "files")
                storage.write_text(listing, "".join(f"{path.relative_to(folder)}\n" for path in found))
    return tuple(folder / line for line in listing.read_text(encoding="utf-8").splitlines())


def _is_for_training(file: str) -> bool:
    return file.lower().endswith(_HUB_SUFFIXES) and not _HELD_OUT.search(file)


def _fetch_command(folder: Path) -> str:
    """Return a hint at the command that fills a folder such as `data/OIG/files`, if it is one of ours."""
    script = Path("data") / folder.parent.name / "prepare.py"
    if folder.name != "files" or not (paths.ROOT / script).is_file():
        return ""
    return f": run `python {script}` first"
