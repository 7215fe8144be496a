"""Files from elsewhere: the Hugging Face hub, http and https, S3-compatible storage, another folder.

A file gets its name once it is whole and has the promised digest; downloads resume from partial files. Everything here
logs, shows progress bars, and raises UserError with what to do, or Interrupted (run again, nothing has to be changed)
when a server keeps failing.
"""

import os
import re
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from openchatkit.download import http, hub, local, s3
from openchatkit.download.archive import is_packed, unpack
from openchatkit.download.retry import RetryPolicy
from openchatkit.download.sidecar import Sidecar, read_sidecar, storage_path, write_sidecar
from openchatkit.download.transfer import Remote, download_file, missing_bytes
from openchatkit.errors import UserError
from openchatkit.storage import check_room, hold_lock, storage_errors

_RETRY = RetryPolicy()
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_DATASET = re.compile(r"https://(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+?)(?:\.git)?/?")
_HUB_FILE = re.compile(
    r"https://(?:huggingface\.co|hf\.co)/datasets/([\w.-]+/[\w.-]+)/(?:resolve|blob|raw)/main/([^?#]+)(?:\?.*)?"
)
_GITHUB = re.compile(r"https://github\.com/([\w.-]+/([\w.-]+?))(?:\.git)?/?")


def fetch(address: str, destination: Path, *, sha256: str | None = None, retry: RetryPolicy = _RETRY) -> Path:
    """Fetch one file into the folder `destination`, unless it is there already, and return its path.

    `address` is http(s)://..., s3://bucket/key or a path; its SHA-256 may be given, or follow it as pip writes it,
    `#sha256=HEX`. A file fetched from the same address before is taken to be the same; remove it to fetch it again.
    """
    address, sha256 = _split_digest(address, sha256)
    files = _remotes(address, sha256, retry, Path(destination))
    if len(files) != 1 or address.endswith("/"):
        raise UserError(f"{http.redact(address)} names a folder: expected one file")
    _check_room(files, Path(destination), "make room")
    return download_file(files[0], Path(destination), retry=retry)


def fetch_dataset(
    name: str,
    files: Sequence[str] | Callable[[str], bool],
    destination: Path,
    *,
    retry: RetryPolicy = _RETRY,
) -> list[Path]:
    """Fetch files of a hub data set into a folder, unless they are there already, and return their paths.

    `files` are globs or names, with or without their endings (`unified_ni` is unified_ni.jsonl.gz), where none means
    all files of records; or a predicate on the name.
    """
    chosen = hub.dataset_files(name, files, retry, Path(destination))
    _check_room(chosen, Path(destination), "make room, or name fewer files")
    return [download_file(file, Path(destination), retry=retry) for file in chosen]


def fetch_model(name: str, small: Sequence[str], *weights: Sequence[str], retry: RetryPolicy = _RETRY) -> Path:
    """Return the folder of a model: `name` itself if it is one, else fetched from the hub into its cache.

    `small` and `weights` are patterns of file names; of the sets of weights, the first that the hub has is fetched.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or name.startswith((".", "~", "/")) or name.count("/") != 1:
        raise UserError(f"{name}: no such folder; pass a folder or a hub name such as EleutherAI/pythia-1.4b")
    return hub.model_folder(name, small, weights, retry)


def fetch_source(
    source: str, destination: Path, *, keep_packed: bool = False, retry: RetryPolicy = _RETRY
) -> list[Path]:
    """Fetch all of a source into a folder, unpack `.gz`, `.zst` and tar unless `keep_packed`, and return the files.

    A source is a data set of the hub, by name or address, a repository on GitHub (its newest commit, without what git
    LFS keeps), an http(s) address, s3://bucket/key, s3://bucket/folder/, or a path of a file or a folder.
    """
    destination = Path(destination)
    repository = _GITHUB.fullmatch(source)
    folder = os.path.expanduser(source)
    if os.path.isdir(folder) and destination.resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"{destination} lies in {source}, which would be copied into itself: pass another folder")
    files = _source(source, retry, destination)
    with (
        storage_errors(destination, "it goes on from there", every=True),
        hold_lock(destination / ".lock", f"another process is fetching into {destination}: waiting for it"),
    ):
        done = {file.name: _find_unpacked(file, destination) for file in files} if not keep_packed else {}
        wanted = [file for file in files if not done.get(file.name)]
        _check_room(wanted, destination, "make room, or pass another folder")
        found = []
        for file in files:
            found += done.get(file.name) or _download_and_unpack(
                file, destination, keep_packed=keep_packed, strip=1 if repository else 0, retry=retry
            )
    return found


def _source(source: str, retry: RetryPolicy, destination: Path) -> list[Remote]:
    dataset = _HUB_DATASET.fullmatch(source)
    if dataset or (_HUB_NAME.fullmatch(source) and not os.path.exists(source)):
        return hub.dataset_files(dataset[1] if dataset else source, ["*"], retry, destination)
    if repository := _GITHUB.fullmatch(source):
        address = f"https://github.com/{repository[1]}/archive/HEAD.tar.gz"
        return [http.remote(address, name=f"{repository[2]}.tar.gz")]
    return _remotes(*_split_digest(source, None), retry, destination)


def _remotes(address: str, sha256: str | None, retry: RetryPolicy, destination: Path) -> list[Remote]:
    if file := _HUB_FILE.fullmatch(address):
        found = hub.dataset_file(file[1], urllib.parse.unquote(file[2]), retry, destination)
        # One file alone goes into the folder itself, as from any other address.
        return [replace(found, name=found.name.rsplit("/", 1)[-1])]
    if address.lower().startswith(("http://", "https://")):
        return [http.remote(address, sha256=sha256)]
    if address.startswith(s3.SCHEME):
        return s3.remotes(address, retry, sha256=sha256)
    if re.match(r"[A-Za-z][\w+.-]*://", address):
        raise UserError(f"{http.redact(address)}: expected http://, https://, s3:// or a path")
    return local.remotes(address, sha256=sha256)


def _split_digest(address: str, sha256: str | None) -> tuple[str, str | None]:
    bare, mark, written = address.partition("#sha256=")
    sha256 = (written if mark else sha256 or "").lower()
    if not sha256 and not mark:
        return address, None
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise UserError(f"{http.redact(bare)}: expected a SHA-256 of 64 hexadecimal digits, got {sha256!r}")
    return bare, sha256


def _check_room(files: Sequence[Remote], destination: Path, advice: str) -> None:
    with storage_errors(destination, every=True):
        needed = sum(missing_bytes(file, destination) for file in files)
        check_room(destination, needed, files[0].address if len(files) == 1 else f"{len(files)} files", advice)


def _find_unpacked(file: Remote, destination: Path) -> list[Path]:
    """Return the files that an earlier run unpacked a file into, if all are there unchanged; else none."""
    path = storage_path(destination, file.name)
    sidecar = read_sidecar(path)
    if path.exists() or sidecar is None or not sidecar.matches(file.address, file.version):
        return []
    found = {path.parent / name: size for name, size in sidecar.unpacked.items()}
    return list(found) if all(each.is_file() and each.stat().st_size == size for each, size in found.items()) else []


def _download_and_unpack(
    file: Remote, destination: Path, *, keep_packed: bool, strip: int, retry: RetryPolicy
) -> list[Path]:
    """Download a file, unpack it beside itself, and remove it."""
    path = download_file(file, destination, retry=retry)
    if keep_packed or not is_packed(path):
        return [path]
    sidecar, files = read_sidecar(path), unpack(path, path.parent, strip=strip)
    assert sidecar is not None, path
    sizes = {each.relative_to(path.parent).as_posix(): each.stat().st_size for each in files}
    write_sidecar(path, Sidecar(sidecar.address, sidecar.version, sidecar.size, sizes))
    path.unlink()
    return files
