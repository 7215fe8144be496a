"""Hugging Face models and tokenizers (loading/pretrained.py): loaded whole, or refused in one line."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_minimal20b import neox

from openchatkit.errors import UserError
from openchatkit.loading import pretrained

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    neox().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_whole_model_is_loaded_for_inference(folder):
    model = pretrained.load_model(folder, torch.bfloat16, CPU)
    assert (model.dtype, model.training) == (torch.bfloat16, False)
    assert pretrained.count_parameters(folder) == model.num_parameters()


def test_missing_tensors_are_not_filled_with_random_numbers(folder):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    del tensors["gpt_neox.layers.1.mlp.dense_h_to_4h.bias"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"lacks 1 of the model's tensors, gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.bias"
    ):
        pretrained.load_model(folder, torch.float32, CPU)


def test_a_damaged_model_is_one_line(folder):
    (folder / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"^[^\n]*model cannot be loaded: [^\n]+$"):
        pretrained.load_model(folder, torch.float32, CPU)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^[^\n]*model cannot be loaded: [^\n]+$"):
        pretrained.count_parameters(folder)


def test_tokenizers(folder, tiny_tokenizer, tmp_path):
    with pytest.raises(UserError, match="model holds no tokenizer: pass --tokenizer with a folder that holds"):
        pretrained.load_tokenizer(folder)
    tokenizer = pretrained.load_tokenizer(tiny_tokenizer)
    pretrained.check_tokenizer(tiny_tokenizer, tokenizer, len(tokenizer))
    with pytest.raises(UserError, match=f"has {len(tokenizer)} tokens, the model {len(tokenizer) - 1}: they do not"):
        pretrained.check_tokenizer(tiny_tokenizer, tokenizer, len(tokenizer) - 1)
    endless = shutil.copytree(tiny_tokenizer, tmp_path / "endless")
    (endless / "special_tokens_map.json").unlink(missing_ok=True)
    config = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": None}))
    with pytest.raises(UserError, match="endless has no end-of-text token: set eos_token in its configuration"):
        pretrained.load_tokenizer(endless)
