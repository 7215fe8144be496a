"""uvicorn's extended protocol, and its own where the kit cannot extend it."""

import sys

import pytest
import uvicorn

from openchatkit.libraries import uvicorn_http


async def application(scope, receive, send):
    pass


def test_the_protocol_is_uvicorns_own_extended():
    from uvicorn.protocols.http.h11_impl import H11Protocol

    assert issubclass(uvicorn_http.protocol(), H11Protocol)


@pytest.mark.parametrize("gone", ["the module", "a method"])
def test_a_uvicorn_without_the_extended_methods_uses_its_own_protocol(monkeypatch, gone):
    if gone == "the module":
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.h11_impl", None)
    else:
        from uvicorn.protocols.http.h11_impl import H11Protocol

        monkeypatch.delattr(H11Protocol, "on_response_complete")
    assert uvicorn_http.protocol() == "auto"
    monkeypatch.undo()
    config = uvicorn.Config(application, http="auto", log_config=None)
    config.load()
    assert isinstance(config.http_protocol_class, type)
