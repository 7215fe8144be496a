"""uvicorn's protocol, and what is served with where it is not the one that the kit extends."""

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
def test_a_uvicorn_of_another_make_serves_as_it_does(monkeypatch, gone):
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
