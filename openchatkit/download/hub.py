"""Models and data sets of the Hugging Face hub. No code is fetched, and no pickle if avoidable.

The hub's own client lists files, logs in (with HF_TOKEN, or what `hf auth login` left) and keeps the cache of models.
The bytes come by the loop in `transfer`: the client starts a file over when it was killed, and takes a file of the
right size for the right file. Every file is compared with the digest that the hub lists, SHA-256 or git's, before it
gets its name; in the cache of models, a file's name is that digest.
"""

import contextlib
import fnmatch
import functools
import glob
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from loguru import logger
from tqdm import tqdm

from openchatkit.download import http
from openchatkit.download.digests import GIT, SHA256, Digest
from openchatkit.download.retry import RetryPolicy, TransientError
from openchatkit.download.sidecar import sidecars
from openchatkit.download.transfer import Answer, Remote, download_file, missing_bytes
from openchatkit.errors import UserError
from openchatkit.libraries import hf_hub
from openchatkit.storage import check_room

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import RepoFile
    from huggingface_hub.errors import HfHubHTTPError

_T = TypeVar("_T")
_KINDS = {"dataset": "data set", "model": "model"}


def dataset_files(
    name: str, wanted: Sequence[str] | Callable[[str], bool], retry: RetryPolicy, folder: Path
) -> list[Remote]:
    """Return the files of a data set that `wanted` names: globs or names, with or without endings; none: all records.

    Or `wanted` is a predicate. When the hub does not answer, files of these names in `folder` are used.
    UserError when the hub cannot be reached, knows no such data set, or has no file for one of the names.
    """
    try:
        offered = _listing(name, "dataset", retry)[1]
    except UserError as error:
        if here := [] if callable(wanted) else _find_fetched(name, wanted, folder, error):
            return here
        raise
    if callable(wanted):
        if not (chosen := [file for file in offered if wanted(file.name)]):
            raise _no_such_file(name, "of the kind that is wanted", offered)
        return chosen
    wanted = wanted or ["*.jsonl*"]
    for pattern in wanted:
        if not any(_is_meant(file.name, pattern) for file in offered):
            raise _no_such_file(name, pattern, offered)
    chosen = [file for file in offered if any(_is_meant(file.name, pattern) for pattern in wanted)]
    # .gitattributes and the like are the repository's, not the data's.
    return [file for file in chosen if not any(re.match(r"\.[^.]", part) for part in file.name.split("/"))]


def dataset_file(name: str, path: str, retry: RetryPolicy, folder: Path) -> Remote:
    """Return one file of a data set, by its whole path; the one in `folder` is used when the hub does not answer."""
    try:
        offered = _listing(name, "dataset", retry)[1]
    except UserError as error:
        if here := _find_fetched(name, [path], folder, error):
            return here[0]
        raise
    if found := [file for file in offered if file.name == path]:
        return found[0]
    raise _no_such_file(name, path, offered)


def _find_fetched(name: str, wanted: Sequence[str], folder: Path, error: UserError) -> list[Remote]:
    """Return the files that an earlier run fetched into `folder` for these names; none unless each name has one.

    Only the hub knows which files a glob stands for. Opening a file that is gone by now raises the hub's `error`.
    """

    def gone(_: int, __: str | None) -> AbstractContextManager[Answer]:
        raise error

    start = f"{name}/"
    fetched = {
        sidecar.address.removeprefix(start): Remote(name, sidecar.address, gone, sidecar.size, sidecar.version)
        for name, sidecar in sidecars(folder)
        if sidecar.address.startswith(start)
    }
    found: dict[str, Remote] = {}
    for pattern in wanted:
        meant = {file: remote for file, remote in fetched.items() if _is_meant(file, pattern)}
        if glob.has_magic(pattern) or not meant:
            return []
        found |= meant
    if found:
        logger.info("{} (using what is in {})", error, folder)
    return list(found.values())


def model_folder(name: str, small: Sequence[str], weights: Sequence[Sequence[str]], retry: RetryPolicy) -> Path:
    """Return the folder in the hub's cache that holds files of a model, after fetching those that are missing.

    `small` and `weights` are patterns of file names; of the sets of weights, the first that the hub has is fetched.
    The cache is used as it is when the hub does not answer.
    """
    from huggingface_hub import snapshot_download

    while True:
        try:
            commit, offered = _listing(name, "model", RetryPolicy(tries=1) if _find_cached(name, small, ()) else retry)
        except UserError as error:
            if folder := _find_cached(name, small, weights):
                logger.info("{} (using what is in the cache)", error)
                return folder
            raise
        chosen = _matching(offered, small)
        chosen += next((files for patterns in weights if (files := _matching(offered, patterns))), [])
        _download_to_cache(name, commit, chosen, retry)
        # Without a revision, so that the client notes which commit is the newest, for runs without the hub.
        patterns = [glob.escape(file.name) for file in chosen]
        fill = functools.partial(snapshot_download, name, allow_patterns=patterns, tqdm_class=_NoBar)
        folder = Path(_call_hub(fill, name, "model", retry))
        if folder.name == commit:
            return folder
        logger.info("{} has a new version since it was listed: looking again", name)


class _NoBar(tqdm):  # type: ignore[type-arg]
    """No bar: the client would show the linking of files that have been fetched."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[call-overload]


def _find_cached(name: str, small: Sequence[str], weights: Sequence[Sequence[str]]) -> Path | None:
    """Return the model's folder in the cache, if all is there, without asking the hub."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=list(small), local_files_only=True))
        for patterns in weights:
            snapshot_download(name, allow_patterns=list(patterns), local_files_only=True)
            if any(match for pattern in patterns for match in folder.glob(pattern)):
                return folder
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return None if weights else folder


def _download_to_cache(name: str, commit: str, files: Sequence[Remote], retry: RetryPolicy) -> None:
    """Download files to the hub's cache, which keeps them in `blobs` by digest; the client makes the rest."""
    from huggingface_hub import constants, try_to_load_from_cache

    blobs = Path(constants.HF_HUB_CACHE, hf_hub.cache_folder_name(name, "model"), "blobs")
    absent = [
        replace(file, name=file.digests[0].value)
        for file in files
        if not isinstance(try_to_load_from_cache(name, file.name, revision=commit), str)
        and not (blobs / file.digests[0].value).exists()
    ]
    check_room(
        blobs, sum(missing_bytes(file, blobs) for file in absent), name, "make room, or set HF_HOME to another disk"
    )
    for file in absent:
        download_file(file, blobs, retry=retry, sidecar=False)


def _matching(files: Sequence[Remote], patterns: Sequence[str]) -> list[Remote]:
    return [file for file in files if any(fnmatch.fnmatchcase(file.name, pattern) for pattern in patterns)]


def _no_such_file(name: str, wanted: str, offered: Sequence[Remote]) -> UserError:
    there = ", ".join(sorted(file.name for file in offered)[:50])
    return UserError(f"{name} holds no file {wanted}: expected one of {there}")


def _is_meant(file: str, pattern: str) -> bool:
    return fnmatch.fnmatchcase(file, pattern) or file.startswith(f"{pattern}.")


def _listing(name: str, kind: str, retry: RetryPolicy) -> tuple[str, list[Remote]]:
    """Return the newest commit of a model or data set, and its files."""
    from huggingface_hub import HfApi, RepoFile

    api = HfApi()
    http.connection().close()  # so that wrong settings get our messages

    def ask() -> tuple[str, list[RepoFile]]:
        commit = api.repo_info(name, repo_type=kind).sha
        assert commit is not None, name
        entries = api.list_repo_tree(name, repo_type=kind, revision=commit, recursive=True)
        return commit, [entry for entry in entries if isinstance(entry, RepoFile)]

    commit, files = _call_hub(ask, name, kind, retry)
    return commit, [_remote(name, kind, commit, file) for file in files]


def _remote(name: str, kind: str, commit: str, file: "RepoFile") -> Remote:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    digest = Digest(SHA256, file.lfs.sha256) if file.lfs else Digest(GIT, file.blob_id)
    address = hf_hub_url(name, file.path, repo_type=kind, revision=commit)

    def refused(response: "httpx2.Response") -> None:
        with _errors(name, kind):
            hf_hub.raise_for_status(response)

    @contextlib.contextmanager
    def open_at(start: int, _: str | None) -> Iterator[Answer]:
        # The digest says whether the rest is of the same file; entity tags differ between the hosts that keep it.
        with http.open_url(address, start, None, headers=build_hf_headers(), on_refusal=refused) as answer:
            yield answer

    return Remote(file.path, f"{name}/{file.path}", open_at, file.size, str(digest), (digest,))


def _call_hub(ask: Callable[[], _T], name: str, kind: str, retry: RetryPolicy) -> _T:
    """Return the hub's answer, and ask again while it is only busy; UserError about `name` when it refuses."""

    def once() -> _T:
        with _errors(name, kind):
            return ask()

    return retry.call(once, name)


@contextlib.contextmanager
def _errors(name: str, kind: str) -> Iterator[None]:
    """Turn errors of the hub's client about the model or data set `name` into UserError or TransientError."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    )

    library = hf_hub.http_library()
    unreachable = "the hub cannot be reached" + (" and it is not in the cache" if kind == "model" else "")
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"cannot fetch {name}: not a hub name; expected ORG/NAME or a folder") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, library.ConnectError, library.ProxyError) as error:
        again = "connect and run again" + ("" if kind == "model" else ", what is there already is kept")
        raise UserError(f"cannot fetch {name}: {unreachable}; {again}") from error
    except HfHubHTTPError as error:
        _raise(error, name, kind)
    except (ValueError, TypeError, KeyError) as error:
        says = "what answers is not the hub; check HF_ENDPOINT and the proxy, or log in to this network"
        raise UserError(f"cannot fetch {name}: {says}") from error
    except library.TransportError as error:
        raise TransientError(f"the connection to the hub broke ({type(error).__name__})") from error


def _raise(error: "HfHubHTTPError", name: str, kind: str) -> NoReturn:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    status = error.response.status_code
    if status in (408, 429) or status >= 500:
        raise TransientError(f"the hub answers {status}", wait=http.retry_after(error.response.headers)) from error
    if isinstance(error, GatedRepoError):
        says = "the hub asks for its licence to be accepted; accept it there and set HF_TOKEN"
    elif isinstance(error, RepositoryNotFoundError):
        says = f"the hub knows no such {_KINDS[kind]}; check the spelling, or set HF_TOKEN if it is private"
    elif status in (401, 403):
        says = f"the hub refuses ({status}); check HF_TOKEN and what it may read"
    else:
        says = f"the hub answers {status}; check the name and run again"
    raise UserError(f"cannot fetch {name}: {says}") from error
