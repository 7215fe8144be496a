"""Changes between releases of huggingface_hub: its HTTP library, and the responses that it raises errors from.

Before 2.0 the client uses httpx, since then httpx2, which has exception and response classes of its own.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import httpx2


def http_library() -> ModuleType:
    """Return the HTTP library whose exceptions the hub's client raises."""
    from huggingface_hub.errors import HfHubHTTPError

    # The client's own error is a subclass of its library's.
    for base in HfHubHTTPError.__mro__:
        name = base.__module__.split(".")[0]
        if name in ("httpx", "httpx2"):
            return importlib.import_module(name)
    return importlib.import_module("httpx2")


def raise_for_status(response: "httpx2.Response") -> None:
    """Raise the hub's own error (gated, unknown, private ...) for a response to the kit's own client."""
    from huggingface_hub.utils import hf_raise_for_status

    library = http_library()
    if not isinstance(response, library.Response):
        request = library.Request(response.request.method, str(response.request.url))
        response = library.Response(
            response.status_code, headers=list(response.headers.multi_items()), content=response.read(), request=request
        )
    hf_raise_for_status(response)


def cache_folder_name(repo_id: str, repo_type: str) -> str:
    """Return the name of a repository's folder in the hub's cache, such as `models--ORG--NAME`.

    The hub's guide to its cache states this layout; the function that makes the name is not exported.
    """
    try:
        from huggingface_hub.file_download import repo_folder_name
    except ImportError:
        return "--".join([f"{repo_type}s", *repo_id.split("/")])
    return repo_folder_name(repo_id=repo_id, repo_type=repo_type)
