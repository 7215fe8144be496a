"""`formats/neox_checkpoint.py`: what no reader of GPT-NeoX's folders can know of a model."""

from pathlib import Path

import pytest
import tiny_shards

from openchatkit.convert import to_neox
from openchatkit.errors import UserError
from openchatkit.formats.neox_checkpoint import NeoXCheckpoint

RAW = {
    "model_type": "neox",
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 20,
    "max_position_embeddings": 32,
}


@pytest.mark.parametrize(("kind", "count"), [("bigbird", None), ("sparse_variable", 2)])
def test_random_blocks_that_are_stored_nowhere_are_refused(tmp_path: Path, kind: str, count: int | None) -> None:
    for number in (0, count):
        sparsity = {} if number is None else {"num_random_blocks": number}
        raw = {**RAW, "attention_config": [kind, "global"], "sparsity_config": {"block": 4, **sparsity}}
        tiny_shards.write_prepared(tmp_path / f"shards_{number}", raw)
        to_neox.convert(tmp_path / f"shards_{number}", tmp_path / f"neox_{number}")
    assert NeoXCheckpoint(tmp_path / "neox_0" / "global_step0").config.options.attention_config == (kind, "global")
    with pytest.raises(UserError, match=rf"attention_config .*: GPT-NeoX draws the random blocks of {kind} again"):
        NeoXCheckpoint(tmp_path / f"neox_{count}" / "global_step0")
