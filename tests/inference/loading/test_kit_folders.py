"""Chats with what is in no Hugging Face folder: training checkpoints, layer shards, GPT-NeoX's files."""

import io
import shutil
import sys
from pathlib import Path

import pytest
import tiny_shards
import tokenizers
import torch
from random_models import write_run
from test_loader import refused
from test_minimal20b import neox, write_neox

from openchatkit.convert.from_hf import prepare
from openchatkit.convert.to_hf import convert
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, layer_shards
from openchatkit.inference import bot
from openchatkit.inference.engine.engine import Engine
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.loading import loader
from openchatkit.libraries import hf_transformers
from openchatkit.loading import hardware
from openchatkit.models.registry import config_from_hf
from openchatkit.models.stage import Stage

PROMPT, GREEDY = [5, 17, 3, 60], Sampling(max_tokens=20, sample=False)


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@torch.inference_mode()
def greedy(loaded: loader.LoadedModel) -> list[int]:
    running = Engine(loaded.model, eos_ids=[], device=loaded.device, cache_dtype=loaded.cache_dtype)
    return list(running.generate(PROMPT, GREEDY))


@pytest.mark.parametrize("name", ["neox", "gptj"])
def test_a_checkpoint_is_the_model_that_a_conversion_of_it_gives(random_models, tmp_path, name):
    run = write_run(tmp_path / "run", random_models[name], 3, 20)
    said: list[str] = []
    converted = loader.load(str(convert(run, tmp_path / "converted")), announce=said.append)
    for given in (run, run / "checkpoint_20", run / "checkpoint_3", run / "20"):
        loaded = loader.load(str(given), announce=said.append)
        assert greedy(loaded) == greedy(converted)
        assert (loaded.eos_ids, loaded.dtype) == (converted.eos_ids, converted.dtype)
        assert type(loaded.model) is type(converted.model)
        assert loaded.tokenizer.digest == converted.tokenizer.digest
        assert loaded.tokenizer.chat_template == converted.tokenizer.chat_template
    assert loaded.folder == run / "checkpoint_20"
    assert said[1] == said[0].replace(str(tmp_path / "converted"), str(run))
    assert greedy(loader.load(str(run), dtype="int8")) == greedy(loader.load(str(converted.folder), dtype="int8"))


def test_a_checkpoint_is_mapped(random_models, tmp_path, monkeypatch):
    run = write_run(tmp_path, random_models["neox"], 20)
    monkeypatch.setattr(hardware, "available_memory", lambda: 0)  # no room for faster copies
    model = loader.load(str(run)).model
    address, file = model.gpt_neox.embed_in.weight.data_ptr(), layer_shards.shard_file("embed")
    held = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if file in line]
    assert any(int(start, 16) <= address < int(end, 16) for start, end in held)


def test_layer_shards_and_the_folders_of_gpt_neox(tmp_path, tiny_tokenizer):
    reference = neox()
    reference.save_pretrained(tmp_path / "hf")
    shutil.copytree(tiny_tokenizer, tmp_path / "hf", dirs_exist_ok=True)
    (tmp_path / "hf" / "tokenizer.json").unlink()
    folder = write_neox(tmp_path / "neox", reference)
    refused(tmp_path / "neox", f"{folder} holds no tokenizer: put tokenizer.json, as its training used it, there")
    letters = {"<|endoftext|>": 0, "<|padding|>": 1, **{chr(97 + number): 2 + number for number in range(26)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(letters, []))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|padding|>"])
    tokenizer.save(str(tmp_path / "neox" / "20B_tokenizer.json"))
    expected = list(Engine(reference, eos_ids=[], device=torch.device("cpu")).generate(PROMPT, GREEDY))
    for given in (tmp_path / "neox", folder):
        loaded = loader.load(str(given))
        assert greedy(loaded) == expected
        assert (loaded.eos_ids, loaded.tokenizer.end_of_text, loaded.tokenizer.padding) == ({0}, 0, 1)
    tokenizer.save(str(tmp_path / "hf" / "tokenizer.json"))
    prepared = prepare(str(tmp_path / "hf"), tmp_path / "prepared")
    assert greedy(loader.load(str(prepared))) == expected


def test_a_family_that_transformers_does_not_have_is_decoded_by_the_kit(random_models, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", random_models["neox"], 20)
    expected = greedy(loader.load(str(run)))
    monkeypatch.setattr(hf_transformers, "has_causal_lm", lambda model_type: False)
    loaded = loader.load(str(run))
    assert isinstance(loaded.model, Stage)
    assert greedy(loaded) == expected
    assert loaded.eos_ids == {0}
    with pytest.raises(UserError, match="checkpoint_20 is of the family gpt_neox, which runs whole, on one device"):
        loader.load(str(run), dtype="int8")


OPTIONS = {
    "learned": {"pos_emb": "learned", "norm": "rmsnorm", "hidden_act": "swiglu"},
    "sinusoidal": {"pos_emb": "sinusoidal", "hidden_dropout": 0.5, "attention_dropout": 0.5},
    "rpe": {"pos_emb": "rpe", "use_parallel_residual": False, "tie_word_embeddings": True},
    "alibi": {"pos_emb": "alibi", "num_kv_heads": 2, "norm": "scalenorm"},
    "none": {"pos_emb": "none", "use_qk_layernorm": True},
    "window": {"sliding_window_width": 5},
    "sparse": {"attention_config": ["global", "local"], "sparsity_config": {"block": 16, "num_local_blocks": 2}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_models_with_options_of_gpt_neox_are_decoded_from_their_checkpoints(random_models, tmp_path, name):
    """As the whole forward pass of each text says; nothing is dropped out."""
    sizes = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 64}
    raw = {
        "model_type": "neox",
        **sizes,
        "eos_token_id": 0,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
    }
    raw |= OPTIONS[name]
    stage = Stage(config_from_hf({**raw, "initializer_range": 0.3}))
    stage.init_weights(1)
    made = {shard: dict(module.state_dict()) for shard, module in stage.named_shards()}
    if stage.config.tie_embeddings:
        made["head"].pop("embed_out.weight")
    tiny_shards.write_prepared(tmp_path / "shards", raw, made=made)
    shutil.copy(random_models["neox"] / "tokenizer.json", tmp_path / "shards")
    shutil.copy(random_models["neox"] / "tokenizer_config.json", tmp_path / "shards")
    loaded = loader.load(str(write_run(tmp_path / "run", tmp_path / "shards", 3)))
    text, stage = [*PROMPT], stage.eval()
    with torch.inference_mode():
        for _ in range(GREEDY.max_tokens):
            text.append(int(stage.logits(stage(torch.tensor([text])))[0, -1].argmax()))
    assert len(set(text)) > 5, "a model that repeats itself proves little"
    assert greedy(loaded) == text[len(PROMPT) :]


def test_the_command_chats_with_a_checkpoint(trained_model, tmp_path, capsys, monkeypatch):
    said = []
    for model in (trained_model, write_run(tmp_path, trained_model, 5)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        with pytest.raises(SystemExit) as ended:
            bot.main(["--model", str(model), "--prompt", "lines", "--no-date", "--no-sample"])
        assert ended.value.code == 0
        said.append(capsys.readouterr().out)
    assert said == ["two\nlines\n"] * 2


def test_a_run_that_goes_on_while_its_checkpoint_is_read(random_models, tmp_path, monkeypatch):
    """The oldest is deleted, as a run does that keeps one, when the first of its shards was read."""
    run = write_run(tmp_path / "run", random_models["neox"], 3)
    read, seen = checkpoint.read_weights, []

    def read_slowly(path: Path, shard: str) -> dict[str, torch.Tensor]:
        if not seen:
            write_run(run, random_models["neox"], 20)
            checkpoint.prune(run, 1)
        seen.append(path.name)
        return read(path, shard)

    monkeypatch.setattr(checkpoint, "read_weights", read_slowly)
    loaded = loader.load(str(run))
    assert (seen[0], seen[-1]) == ("checkpoint_3", "checkpoint_20")
    assert loaded.folder == run / "checkpoint_20"
    assert greedy(loaded) == greedy(loader.load(str(random_models["neox"])))


def test_checkpoints_that_cannot_be_chatted_with(random_models, tmp_path):
    run = write_run(tmp_path / "run", random_models["neox"], 20, tokenizer=False)
    refused(run, f"{run}/checkpoint_20 holds no tokenizer: put tokenizer.json, as its training used it, there")
    whole = str(write_run(tmp_path / "whole", random_models["neox"], 20))
    with pytest.raises(UserError, match=r"-r leaves weights in a Hugging Face model's own files, and .* is a training"):
        loader.load(whole, cpu_gib=1)
    refused(run / "checkpoint_21", f"{run}/checkpoint_21 holds no checkpoint: found no such folder")
    shard = run / "checkpoint_20" / layer_shards.shard_file("layer_00001")
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    refused(run, r"layer_00001.safetensors .* no other checkpoint in .* is whole")
