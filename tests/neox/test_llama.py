"""A configuration with many of GPT-NeoX's options, all the way: trained, resumed in another layout, and asked."""

import json

import pytest
from neox_cases import SHIPPED
from test_deepy import SHRUNKEN, deepy, prepare, read_state

from openchatkit.formats import config_file

FILES = ["-d", "configs", "small", "local_setup"]


@pytest.mark.long
def test_a_llama_trains_in_stages_then_in_parts_and_writes_text(tmp_path):
    published = {key: value for key, value in SHIPPED["configs/llama2/70B.yml"].items() if key not in SHRUNKEN}
    small = {"num_kv_heads": 2, "intermediate_size": 96, "mlp_multiple_of": 8, "use_bias_in_mlp": False}
    prepare(tmp_path, **published | small)
    first = deepy(tmp_path, "train.py", *FILES, "--train_iters", "2")
    assert first.returncode == 0, first.stderr
    raw = config_file.read_raw(tmp_path / "checkpoints" / "model")
    expected = {"model_type": "neox", "norm": "rmsnorm", "hidden_act": "swiglu", "num_kv_heads": 2}
    assert expected.items() <= raw.items()
    then = deepy(tmp_path, "train.py", *FILES, "--pipe-parallel-size", "1", "--model-parallel-size", "2")
    assert then.returncode == 0, then.stderr
    assert (read_state(tmp_path)["step"], read_state(tmp_path)["layout"]["tensor"]) == (3, 2)
    (tmp_path / "prompts").write_text("the mail\n")
    asked = deepy(tmp_path, "generate.py", *FILES, "-i", "prompts", "-o", "out", "--maximum_tokens", "8")
    assert asked.returncode == 0, asked.stderr
    assert [json.loads(line)["length"] for line in (tmp_path / "out").read_text().splitlines()] == [8]
