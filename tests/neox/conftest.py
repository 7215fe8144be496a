"""Configuration files of GPT-NeoX, made for a test."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from neox_cases import SMALLEST, in_yaml

from openchatkit.neox.config import NeoxConfig


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration file, of settings or of a text; JSON is read much faster than YAML."""

    def write(name: str, content: dict[str, Any] | str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, str):
            content = json.dumps(content) if path.suffix == ".json" else in_yaml(content)
        path.write_text(content, encoding="utf-8")
        return path

    return write


@pytest.fixture
def configure(write: Callable[..., Path]) -> Callable[..., NeoxConfig]:
    """The configuration of SMALLEST with other settings; None leaves one out."""

    def configure(**settings: Any) -> NeoxConfig:
        chosen = {name: value for name, value in (SMALLEST | settings).items() if value is not None}
        return NeoxConfig.read([str(write("c.yml", chosen))])

    return configure
