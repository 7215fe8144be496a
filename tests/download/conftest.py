"""Servers that misbehave as asked, and waits that take no time."""

from collections.abc import Iterator

import pytest
from hub_server import Server, serving

from openchatkit.download.retry import RetryPolicy


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server) as served:
        yield served


@pytest.fixture
def waits() -> list[float]:
    """The seconds that a download would have waited."""
    return []


@pytest.fixture
def retry(waits: list[float]) -> RetryPolicy:
    return RetryPolicy(sleep=waits.append)
