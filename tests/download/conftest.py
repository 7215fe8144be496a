"""Servers that misbehave as asked, and waits that take no time."""

from collections.abc import Iterator

import pytest
from hub_server import Server, serving

from openchatkit.download import Patience


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server) as served:
        yield served


@pytest.fixture
def waits() -> list[float]:
    """The seconds that a download would have waited."""
    return []


@pytest.fixture
def patience(waits: list[float]) -> Patience:
    return Patience(sleep=waits.append)
