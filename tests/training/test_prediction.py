"""`training/prediction.py` and `training/fit.py`: what a run is expected to take, against what it takes."""

import json
import re
import shutil

import pytest
import ranks

# A model whose state is many times the memory that Python, torch and gloo take besides, and rows of few tokens.
CONFIG = {
    "model_type": "gpt_neox",
    "vocab_size": 65536,
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": 64,
}
LAYOUTS = {
    "one process": {},
    "saved beside steps": {"checkpoint_steps": 5},
    "pipeline": {"pipeline_group_size": 2, "pp_mode": "1f1b"},
    "sharded": {"data_group_size": 2, "dp_mode": "sharded"},
}


@pytest.fixture
def large(tmp_path, tiny_tokenizer):
    """A folder of a model that starts at random."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    return folder


def shrink_vocabulary(folder):
    """Leave no gap of a matrix's size in the heap, as drawing one at random does that nothing else fits into."""
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 2048}), encoding="utf-8")


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_is_predicted_within_a_tenth(tmp_path, flags, large, layout):
    size = {"pipeline_group_size": 2, "data_group_size": 2}
    world_size = 2 if size.keys() & LAYOUTS[layout].keys() else 1
    if world_size == 1:
        shrink_vocabulary(large)
    options = {"total_steps": 20, "batch_size": 2, "micro_batch_size": 1, "seq_length": 32, "timeout": 600}
    options |= {"model_name": large, "load_pretrained_model": "false", "checkpoint_path": tmp_path / "ckpt"}
    started = ranks.start(tmp_path, {**flags, **options, **LAYOUTS[layout]}, world_size=world_size)
    ended = ranks.finish(tmp_path, started, seconds=900)
    assert ended.statuses == [0] * world_size, ended.errors
    found = re.search(
        r"after 20 steps: .* tokens/s, .*; (.*) GiB on the fullest rank, predicted (.*) \(", ended.errors[0]
    )
    measured, predicted = float(found[1]), float(found[2])
    assert predicted == pytest.approx(measured, rel=0.1)
