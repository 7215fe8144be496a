"""The quickstart's model at toy scale: its tokenizer, its weights, and that it is prepared as any other."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from openchatkit.errors import UserError
from openchatkit.formats import chat
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.tools.quickstart import base_model
from openchatkit.tools.quickstart.base_model import ModelShape

SHAPE = ModelShape(vocab_size=300, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32)
TEXTS = [f"<human>: What does box.part{n} do?\n<bot>: Return part {n} of the box.\n" for n in range(40)]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def test_the_shards_and_the_tokenizer_fit_each_other(data, tmp_path):
    folder, parameters = base_model.prepare(data, tmp_path / "out", shape=SHAPE, seed=1)
    assert folder == tmp_path / "out" / "Quickstart"
    shards = LayerShards.open(folder)
    assert (shards.config.vocab_size, shards.config.num_layers, shards.config.tie_embeddings) == (300, 2, True)
    assert sum(tensor.numel() for shard in shards.shards for tensor in shards.read(shard).values()) == parameters
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == 300
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|padding|>"]) == [0, 1]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)


def test_every_text_survives_the_tokenizer(data, tmp_path):
    folder, _ = base_model.prepare(data, tmp_path, shape=SHAPE, seed=1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in (TEXTS[0], "ÄÖ 日本 \t\n  end ", "".join(map(chr, range(1, 128)))):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    # A passage's sentence is the same tokens as the answer, or it could not be copied token by token.
    quoted = tokenizer.encode("> box.part1: Return part 1 of the box.\n\n", add_special_tokens=False)
    answer = tokenizer.encode(chat.parse(TEXTS[1])[-1].text.rstrip("\n"), add_special_tokens=False)
    assert any(quoted[start : start + len(answer)] == answer for start in range(len(quoted)))


def test_the_seed_decides_the_weights(tmp_path):
    models = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        before = torch.get_rng_state()
        base_model.write_model(tmp_path / name, TEXTS, shape=SHAPE, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        models.append(AutoModelForCausalLM.from_pretrained(tmp_path / name).get_input_embeddings().weight)
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
    assert models[0].std().item() == pytest.approx(SHAPE.init_std, rel=0.05)


def test_the_command_makes_the_sizes_asked_for(data, tmp_path, capsys):
    flags = [
        "--data",
        data,
        "--save-dir",
        tmp_path,
        "--vocab-size",
        280,
        "--hidden-size",
        16,
        "--layers",
        3,
        "--heads",
        2,
    ]
    with pytest.raises(SystemExit) as ended:
        base_model.main([str(flag) for flag in flags])
    assert ended.value.code == 0
    config = LayerShards.open(tmp_path / "Quickstart").config
    assert (config.vocab_size, config.hidden_size, config.num_layers, config.num_heads) == (280, 16, 3, 2)
    assert config.intermediate_size == 16
    assert f"the shards are in {tmp_path / 'Quickstart'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 257}, "--vocab-size 257: expected at least 258"),
        ({"vocab_size": 5000}, r"--vocab-size 5000: the data has text for \d+ tokens only"),
        ({"hidden_size": 18}, "--hidden-size 18 is not a multiple of 16 = 8 x --heads 2: change one"),
    ],
)
def test_sizes_that_do_not_fit(data, tmp_path, sizes, message):
    with pytest.raises(UserError, match=message):
        base_model.prepare(data, tmp_path, shape=ModelShape(**{**vars(SHAPE), **sizes}), seed=1)
    assert not (tmp_path / "Quickstart").exists()


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"no file .*none\.jsonl: run python data/python-docs/prepare\.py first"):
        base_model.prepare(tmp_path / "none.jsonl", tmp_path, shape=SHAPE, seed=1)
