"""Quantised weights on disk, so that a model is quantised once: their path, and their source.

    ~/.openchatkit/cache/<folder>-<key>.safetensors     (or below what OPENCHATKIT_HOME names)

`folder` stands for the model's folder, `key` for its files: each one's name, stamp (`storage.stamp`) and pieces of its
content, and the version of this layout. Tensors are named `<layer>.weight` and `<layer>.scale`, with the layer's
name in the model. A file that is missing, damaged or of another key is ignored, and is never an error.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from loguru import logger
from torch import Tensor

from openchatkit import storage
from openchatkit.errors import UserError
from openchatkit.formats import chat_file, hf_model, layer_shards
from openchatkit.formats.tensor_file import TensorFile, write_tensors

# Raise it when the numbers or the layout change.
VERSION = 1
_PIECES, _PIECE = 16, 4096  # of a file's content, spread evenly


def cache_path(folder: Path, kind: str) -> Path:
    """Return the path of the weights made from a model's folder; `kind` distinguishes forms of them.

    OSError when a file cannot be read, UserError when the user has no home folder.
    """
    digest = hashlib.sha256(f"{VERSION} {kind}".encode())
    patterns = (layer_shards.CONFIG, *hf_model.SAFE_FILES, *hf_model.PICKLED_FILES)
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        size, *_ = stamp = storage.stamp(path)
        digest.update(f"\0{path.name}\0{stamp}\0".encode())
        with open(path, "rb") as file:
            for number in range(_PIECES):
                file.seek(max(0, size - _PIECE) * number // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    place = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return chat_file.home() / "cache" / f"{place}-{digest.hexdigest()[:32]}.safetensors"


def read(path: Path) -> dict[str, Tensor] | None:
    """Read the tensors of a cache, memory-mapped; None where none can be used."""
    try:
        file = TensorFile(path)
        return file.read(file.specs)
    except Exception as error:  # whatever is wrong with it, it is made again
        if path.exists():
            logger.debug(f"{path} is not used: {error}")
        return None


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors in place of older ones of the folder, if the disk has room for twice their size."""
    size = sum(tensor.nbytes for tensor in tensors.values())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if storage.free_bytes(path.parent) < 2 * size:
            logger.debug(f"{path} was not written: the disk has little room")
            return
        write_tensors(path, tensors)
        for other in path.parent.glob(f"{path.name.split('-')[0]}-*"):
            if other != path:
                other.unlink(missing_ok=True)
    except (OSError, UserError) as error:
        logger.debug(f"{path} was not written: {error}")
