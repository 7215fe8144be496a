"""A small index with an encoder that needs no network, and the warnings that are logged."""

import pytest
from index_maker import WordEncoder, make
from loguru import logger


@pytest.fixture
def encoder():
    return WordEncoder()


@pytest.fixture
def folder(tmp_path, encoder):
    """Five passages, see `index_maker`."""
    make(tmp_path / "index", encoder=encoder)
    return tmp_path / "index"


@pytest.fixture
def warnings():
    """The warnings that are logged while a test runs."""
    messages = []
    sink = logger.add(lambda message: messages.append(message.strip()), format="{message}", level="WARNING")
    yield messages
    logger.remove(sink)
