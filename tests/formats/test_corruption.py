"""No file of a checkpoint that is not as it was written is loaded: flipped bits, cuts, and files of another step."""

import json
import random
import shutil
from pathlib import Path

import pytest
from tiny_shards import NEOX, equal, flip, write_checkpoint

from openchatkit.formats import checkpoint
from openchatkit.formats.manifest import DamagedError
from openchatkit.models.shards import shard_names

SHARDS = shard_names(NEOX["num_hidden_layers"])
FLIPS = 1000


@pytest.fixture
def path(tmp_path, tiny_tokenizer) -> Path:
    """The checkpoint of step 10, alone in its folder."""
    write_checkpoint(tmp_path / "run", 10, tokenizer=tiny_tokenizer)
    return tmp_path / "run" / "checkpoint_10"


def load(path: Path) -> tuple[dict, dict]:
    """Read what a run that goes on reads, in its order: state and, once verified, all weights and optimizer state."""
    state = checkpoint.read_state(path)
    checkpoint.verify(path, SHARDS)
    tensors = {}
    for shard in SHARDS:
        tensors |= {f"{shard}/{name}": tensor.clone() for name, tensor in checkpoint.read_weights(path, shard).items()}
        for name, entry in checkpoint.read_optimizer(path, shard).items():
            tensors |= {f"{shard}/{name}/{key}": v.clone() for key, v in entry.items() if hasattr(v, "clone")}
            state |= {f"{shard}/{name}/{key}": v for key, v in entry.items() if not hasattr(v, "clone")}
    return state, tensors


def list_files(path: Path) -> list[Path]:
    return sorted(each for each in path.iterdir() if each.is_file())


@pytest.mark.long
def test_of_a_thousand_flipped_bits_each_is_refused_or_changes_nothing(path):
    """Only a bit in the spaces of the manifest, which is JSON, may change nothing."""
    state, tensors = load(path)
    files, chance, harmless = list_files(path), random.Random(5), 0
    assert len(files) >= 14, files
    for number in range(FLIPS):
        file = files[number % len(files)]  # every file, however small, as often as the others
        position, bit = chance.randrange(file.stat().st_size), chance.randrange(8)
        flip(file, position, bit)
        try:
            found, refusal = load(path), ""
        except DamagedError as error:
            found, refusal = ({}, {}), str(error)
        if refusal:
            assert file.name in refusal, (file, position, bit)
        else:
            assert file.name == "manifest.json", (file, position, bit)
            assert found[0] == state
            assert equal(found[1], tensors)
            harmless += 1
        flip(file, position, bit)
    assert harmless < FLIPS / len(files) / 2
    assert equal(load(path)[1], tensors)


@pytest.mark.long
def test_a_file_that_was_cut_anywhere_is_refused(path):
    for file in list_files(path):
        content = file.read_bytes()
        for size in {0, 1, len(content) - 1, *range(0, len(content), 509)}:
            file.write_bytes(content[:size])
            if file.name == "manifest.json" and content[size:].isspace():
                load(path)  # the end of the last line alone
                continue
            with pytest.raises(DamagedError, match=file.name):
                load(path)
        file.write_bytes(content)
    load(path)


def test_a_file_of_another_step_in_its_place_is_refused(path):
    """Even of the same size, and with a manifest of its own that fits it."""
    write_checkpoint(path.parent, 11, tokenizer=None)
    other = path.parent / "checkpoint_11"
    for file in list_files(other):
        kept = (path / file.name).read_bytes()
        if kept == file.read_bytes():
            continue
        shutil.copyfile(file, path / file.name)
        with pytest.raises(DamagedError, match=f"{file.name}|holds the checkpoint of step 11"):
            load(path)
        (path / file.name).write_bytes(kept)
    load(path)
    for file in list_files(other):
        shutil.copyfile(file, path / file.name)
    with pytest.raises(DamagedError, match="holds the checkpoint of step 11: it was renamed or replaced"):
        load(path)
    assert json.loads((path / "state.json").read_text())["step"] == 11
