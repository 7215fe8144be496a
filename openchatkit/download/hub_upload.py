"""Folders to the Hugging Face hub, by its own client: one commit, so that a branch has all of a model or nothing of it.

The client sends large files first, and those alone that the hub does not have: an upload that was stopped goes on with
the files that are missing. The token is HF_TOKEN, or what `hf auth login` left.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from loguru import logger

from openchatkit.download import http
from openchatkit.download.retry import RetryPolicy, TransientError
from openchatkit.errors import UserError
from openchatkit.libraries import hf_hub
from openchatkit.texts import reason_of

_T = TypeVar("_T")
# Leftovers of writers, locks and notes of downloads, in this folder and below.
_HIDDEN = [".*", "*/.*", "*.tmp"]


def upload_folder(
    folder: Path, name: str, *, branch: str | None = None, private: bool = False, retry: RetryPolicy | None = None
) -> str:
    """Upload the files of a folder to the model repository `name`, made if it is missing; return the commit's address.

    `branch` is made of the main one if it is missing. A repository that is made is public unless `private`. UserError
    without a token or files, where the hub refuses, or the repository is there and public with `private`; Interrupted
    where it keeps failing.
    """
    from huggingface_hub import HfApi, get_token

    if not folder.is_dir() or not any(path.is_file() for path in folder.glob("[!.]*")):
        raise UserError(f"{folder} is no folder with files: expected one such as tools/convert_to_hf_gptneox.py makes")
    if get_token() is None:
        raise UserError("uploads need a token that may write: set HF_TOKEN (https://huggingface.co/settings/tokens)")
    http.connection().close()  # so that wrong settings get our messages
    api, retry = HfApi(), retry or RetryPolicy()

    def call(ask: Callable[[], _T]) -> _T:
        def once() -> _T:
            with _errors(name):
                return ask()

        return retry.call(once, name)

    call(lambda: api.create_repo(name, private=private or None, exist_ok=True))
    if private and not call(lambda: api.repo_info(name)).private:
        raise UserError(f"--private: {name} is there already and everyone can read it: change that there first")
    if branch is not None:
        call(lambda: api.create_branch(name, branch=branch, exist_ok=True))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    logger.info("uploading {:,} bytes of {} to {}", size, folder, name)
    message = f"Upload {folder.resolve().name}"
    committed = call(
        lambda: api.upload_folder(
            repo_id=name, folder_path=folder, revision=branch, commit_message=message, ignore_patterns=_HIDDEN
        )
    )
    return str(committed.commit_url)


@contextlib.contextmanager
def _errors(name: str) -> Iterator[None]:
    """Turn errors of the hub's client about the repository `name` into UserError or TransientError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    library = hf_hub.http_library()
    try:
        yield
    except HFValidationError as error:
        raise UserError(f"cannot upload to {name}: not a hub name; expected ORG/NAME") from error
    except Exception as error:  # the client wraps errors of its threads, and hf_xet has its own
        for cause in _list_causes(error):
            if isinstance(cause, (OfflineModeIsEnabled, library.ConnectError, library.ProxyError)):
                raise UserError(f"cannot upload to {name}: the hub cannot be reached; connect and run again") from error
            if isinstance(cause, HfHubHTTPError):
                raise _explain(cause, name) from error
            if isinstance(cause, library.TransportError):
                raise TransientError(f"the connection to the hub broke ({type(cause).__name__})") from error
        if isinstance(error, (OSError, RuntimeError, ValueError, TypeError, KeyError)):
            raise UserError(f"cannot upload to {name}: {reason_of(error)}; run again, what is there is kept") from error
        raise


def _list_causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _explain(error: Exception, name: str) -> UserError | TransientError:
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    assert isinstance(error, HfHubHTTPError), error
    status = error.response.status_code
    if status in (408, 429) or status >= 500:
        return TransientError(f"the hub answers {status}", wait=http.retry_after(error.response.headers))
    if status == 401:
        says = "the hub does not know the token: set HF_TOKEN to one that may write there"
    elif status == 403:
        says = "the token may not write there: set HF_TOKEN to one that may, or name another repository"
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        says = "there is no such repository or organisation: check the spelling, and what HF_TOKEN may see"
    else:
        says = f"the hub answers {status} ({reason_of(error)})"
    return UserError(f"cannot upload to {name}: {says}")
