"""Servers that misbehave as asked, and waits that take no time."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, Server, serving

from openchatkit.download import Patience


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server) as served:
        yield served


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the real client asks, with a token, and with a cache of its own."""
    import huggingface_hub.constants

    with serving(Hub) as served:
        template = served.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.address)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def waits() -> list[float]:
    """The seconds that a download would have waited."""
    return []


@pytest.fixture
def patience(waits: list[float]) -> Patience:
    return Patience(sleep=waits.append)
