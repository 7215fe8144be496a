"""The hub's client with the HTTP library that it uses now, and with its former one."""

import importlib

import httpx2
import huggingface_hub.utils
import pytest

from openchatkit.libraries import hf_hub

ADDRESS = "https://hub.invalid/api/models/a/b"


def test_the_library_is_the_one_whose_errors_the_client_raises():
    library = hf_hub.http_library()
    assert library.__name__ in ("httpx", "httpx2")
    assert issubclass(huggingface_hub.utils.HfHubHTTPError, library.HTTPError)


@pytest.mark.parametrize("name", ["httpx", "httpx2"])
def test_a_response_becomes_one_of_the_clients_own_library(monkeypatch, name):
    library, given = importlib.import_module(name), []
    monkeypatch.setattr(hf_hub, "http_library", lambda: library)
    monkeypatch.setattr(huggingface_hub.utils, "hf_raise_for_status", given.append)
    headers = [("X-Error-Code", "GatedRepo"), ("Set-Cookie", "a=1"), ("Set-Cookie", "b=2")]
    request = httpx2.Request("GET", ADDRESS)
    hf_hub.raise_for_status(httpx2.Response(403, headers=headers, content=b"asks for its licence", request=request))
    [answer] = given
    assert isinstance(answer, library.Response)
    assert (answer.status_code, answer.content, str(answer.request.url)) == (403, b"asks for its licence", ADDRESS)
    assert answer.headers["X-Error-Code"] == "GatedRepo"
    assert answer.headers.get_list("Set-Cookie") == ["a=1", "b=2"]


def test_the_name_of_a_folder_in_the_cache_with_the_clients_function_and_without(monkeypatch):
    from huggingface_hub import file_download

    assert hf_hub.cache_folder_name("org/name", "model") == "models--org--name"
    monkeypatch.delattr(file_download, "repo_folder_name")
    assert hf_hub.cache_folder_name("org/name", "model") == "models--org--name"


def test_a_client_of_an_unknown_library_is_taken_for_the_newer():
    class Foreign(Exception):
        pass

    errors = importlib.import_module("huggingface_hub.errors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(errors, "HfHubHTTPError", Foreign)
        assert hf_hub.http_library() is httpx2
