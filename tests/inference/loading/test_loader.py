"""`loader`, `model_folders` and `placement`: finding a model, explaining other folders, and loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit.errors import UserError
from openchatkit.formats import hf_model, layer_shards, legacy
from openchatkit.inference.engine import linear
from openchatkit.inference.engine.engine import Engine
from openchatkit.inference.engine.linear import Int8Linear
from openchatkit.inference.engine.sampling import Sampling
from openchatkit.inference.loading import loader, model_folders, placement
from openchatkit.libraries import pytorch
from openchatkit.loading import hardware
from openchatkit.paths import ROOT

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)


@pytest.fixture
def copy(random_models, tmp_path):
    """A copy of the small GPT-NeoX's folder, to be damaged."""
    return shutil.copytree(random_models["neox"], tmp_path / "model")


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def refused(name, message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader.load(str(name))


# -- what there is


@pytest.mark.parametrize("name", ["neox", "gptj"])
def test_a_model_is_loaded_with_its_tokenizer_and_its_end(random_models, no_gpu, name):
    said = []
    loaded = loader.load(str(random_models[name]), announce=said.append)
    count = loader._count_parameters(AutoConfig.from_pretrained(random_models[name]))
    assert said == [f"loading {random_models[name]}, {count:,} parameters, on {loaded.device} in float32"]
    assert (loaded.dtype, loaded.model.dtype, loaded.eos_ids) == (torch.float32, torch.float32, {0})
    assert not loaded.model.training
    assert loaded.tokenizer.encode(["a"])[0]


def test_eos_ids_are_those_of_the_generation_config(copy):
    config = copy / hf_model.GENERATION_CONFIG
    for given, expected in ((7, {7}), ([7, 9], {7, 9}), (None, {0})):
        config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": given}))
        assert loader.load(str(copy)).eos_ids == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_precision_that_is_named_is_used(random_models, dtype):
    assert loader.load(str(random_models["neox"]), dtype=dtype).model.dtype == getattr(torch, dtype)


def test_the_precision_follows_device_and_size(monkeypatch):
    def chosen(device, parameters=0, name="auto"):
        return placement.choose_dtype(name, torch.device(device), parameters)

    for native, most in ((True, 10**8), (False, 10**9)):
        monkeypatch.setattr(placement.hardware, "slowdown", lambda dtype, native=native: 0.4 if native else 9)
        assert chosen("cpu", most) == torch.float32
        assert chosen("cpu", most + 1) == torch.bfloat16
    assert chosen("cpu", name="int8") == torch.bfloat16
    assert chosen("mps") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert chosen("cuda") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert chosen("cuda") == torch.bfloat16


def test_the_size_of_a_model_is_known_before_it_is_loaded(random_models):
    model = AutoModelForCausalLM.from_pretrained(random_models["gptj"])
    assert loader._count_parameters(AutoConfig.from_pretrained(random_models["gptj"])) == model.num_parameters()


@pytest.mark.parametrize(
    ("number", "said"), [(999_999, "999,999"), (123_456_789, "123.5 million"), (20_554_567_680, "20.6 billion")]
)
def test_the_number_of_parameters_is_rounded(number, said):
    assert loader._round(number) == said


def test_a_model_that_does_not_fit_into_memory_is_read_from_disk_as_it_is_needed(random_models):
    name = str(random_models["neox"])
    whole, spread = loader.load(name), loader.load(name, cpu_gib=80_000 / placement.GIB)
    assert "disk" in spread.model.hf_device_map.values()
    tokens = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(whole.model(tokens).logits, spread.model(tokens).logits)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_packed_where_memory_allows_and_else_stay_in_the_mapped_file(random_models, monkeypatch, dtype):
    packed = loader.load(str(random_models["neox"]), dtype=dtype).model
    monkeypatch.setattr(hardware, "available_memory", lambda: 0)
    mapped = loader.load(str(random_models["neox"]), dtype=dtype).model
    kinds = {type(module) for module in mapped.modules()}
    assert kinds & {nn.Linear, linear.NarrowLinear}
    assert linear.PackedLinear not in kinds
    kind = getattr(torch, dtype)
    fast = pytorch.can_pack(kind) and hardware.computes_in(CPU, kind)
    assert fast == isinstance(packed.lm_head, linear.PackedLinear)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if hf_model.WEIGHTS in line]
    addresses = [range(*(int(end, 16) for end in line[0].split("-"))) for line in maps]
    assert any(mapped.lm_head.weight.data_ptr() in held for held in addresses) == (dtype == "float32")
    tokens = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        torch.testing.assert_close(packed(tokens).logits, mapped(tokens).logits)


@pytest.mark.parametrize("name", ["neox", "gptj"])
def test_int8_is_near_the_model_and_leaves_the_embedding(random_models, no_gpu, name):
    said = []
    loaded = loader.load(str(random_models[name]), dtype="int8", announce=said.append)
    count = loader._count_parameters(AutoConfig.from_pretrained(random_models[name]))
    assert said == [f"loading {random_models[name]}, {count:,} parameters, on cpu in int8"]
    assert loaded.dtype == loaded.model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert not [module for module in loaded.model.modules() if isinstance(module, nn.Linear)]
    whole = AutoModelForCausalLM.from_pretrained(random_models[name])
    tokens = torch.arange(2, 40)[None]
    with torch.inference_mode():
        expected, got = whole(tokens).logits, loaded.model(tokens).logits.float()
    assert (got - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_a_model_whose_layers_read_the_weights_of_others_answers(tmp_path, tiny_tokenizer, no_gpu, dtype):
    from transformers import JambaConfig, JambaForCausalLM

    config = JambaConfig(
        **{"vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1},
        **{"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, "initializer_range": 0.3},
    )
    torch.manual_seed(0)
    JambaForCausalLM(config).save_pretrained(tmp_path)
    shutil.copytree(tiny_tokenizer, tmp_path, dirs_exist_ok=True)
    loaded = loader.load(str(tmp_path), dtype=dtype)
    engine = Engine(loaded.model, eos_ids=(), device=CPU, cache_dtype=loaded.cache_dtype)
    said = list(engine.generate([40, 50, 60], Sampling(max_tokens=5, sample=False)))
    assert len(said) == 5
    # A turn later, from what was kept of the first.
    said += list(engine.generate([40, 50, 60, *said, 70, 80], Sampling(max_tokens=5, sample=False)))
    if dtype == "float32":
        model = JambaForCausalLM.from_pretrained(tmp_path).eval()
        prompt = torch.tensor([[40, 50, 60, *said[:5], 70, 80]])
        assert model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=[])[0, 10:].tolist() == said[5:]


def test_int8_costs_a_trained_model_less_than_a_percent_of_perplexity(trained_model):
    texts = ["<human>: first\n<bot>: first\n<human>: then\n<bot>: again\n", "<human>: lines\n<bot>: two\nlines\n"]
    losses = {}
    for dtype in ("bfloat16", "int8"):
        loaded = loader.load(str(trained_model), dtype=dtype)
        with torch.inference_mode():
            rows = [torch.tensor([ids]) for ids in loaded.tokenizer.encode(texts)]
            losses[dtype] = sum(loaded.model(row, labels=row).loss.item() for row in rows) / len(rows)
    assert abs(losses["int8"] - losses["bfloat16"]) < 0.01


def test_an_output_layer_that_shares_the_embedding_is_quantised_and_the_embedding_is_not(tmp_path, tiny_tokenizer):
    config = GPTNeoXConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        vocab_size=384,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    GPTNeoXForCausalLM(config).to(torch.float16).save_pretrained(tmp_path)
    for file in tiny_tokenizer.iterdir():
        shutil.copy(file, tmp_path)
    model = loader.load(str(tmp_path), dtype="int8").model
    assert isinstance(model.lm_head, Int8Linear)
    assert model.gpt_neox.embed_in.weight.dtype == torch.bfloat16
    stored = load_file(tmp_path / hf_model.WEIGHTS)["gpt_neox.embed_in.weight"]
    assert torch.equal(model.gpt_neox.embed_in.weight, stored.to(torch.bfloat16))
    packed = loader.load(str(tmp_path), dtype="bfloat16").model
    assert torch.equal(packed.gpt_neox.embed_in.weight, stored.to(torch.bfloat16))


@pytest.mark.parametrize(("name", "bits"), [("neox", 8), ("gptj", 8), ("trained", 8), ("trained", 4)])
def test_bitsandbytes_quantises(random_models, trained_model, no_gpu, name, bits):
    pytest.importorskip("bitsandbytes")
    folder = {**random_models, "trained": trained_model}[name]
    loaded = loader.load(str(folder), bits=bits)
    assert (loaded.device, loaded.model.is_quantized) == (CPU, True)
    whole = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(2, 12)[None]
    with torch.inference_mode():
        expected, got = whole(tokens).logits, loaded.model(tokens).logits.float()
    assert 0 < (got - expected).norm() < {8: 0.1, 4: 0.3}[bits] * expected.norm()


def test_four_bits_of_layers_that_bitsandbytes_cannot_pack(random_models, no_gpu):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(
        UserError, match="multiples of 64 inputs and 32 outputs on the CPU, this model has one of 32 and 96"
    ):
        loader.load(str(random_models["neox"]), bits=4)


def test_the_cache_is_kept_in_the_precision_that_attention_is_fast_in(random_models, two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    loaded = loader.load(str(random_models["gptj"]), dtype="bfloat16")
    assert (loaded.cache_dtype, loaded.folder) == (torch.float32, random_models["gptj"])


def test_weights_fill_the_devices_that_are_named(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 200))
    assert placement.placement(GPU, {0: 1.5, 1: 2}, 3)["max_memory"] == {0: 3 << 29, 1: 2 << 30, "cpu": 3 << 30}
    assert placement.placement(GPU, None, 3)["max_memory"] == {0: 90, "cpu": 3 << 30}
    assert placement.placement(CPU, None, 3)["max_memory"] == {"cpu": 3 << 30}
    assert placement.placement(GPU, {0: 1}, None)["max_memory"]["cpu"] > 1 << 20
    assert placement.placement(GPU, None, None) == {"device_map": {"": GPU}}
    assert placement.placement(CPU, None, None) == {}


def test_the_device_is_the_gpu_that_is_named_else_the_cpu(two_gpus, monkeypatch):
    assert placement.choose_device(1, None) == torch.device("cuda", 1)
    assert placement.choose_device(1, {0: 1, 1: 1}) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert placement.choose_device(1, None) == CPU


# -- what there is not


def test_gpus_that_are_not_there(two_gpus, monkeypatch):
    for gpu_id, shares in ((2, None), (0, {0: 1, 2: 1})):
        with pytest.raises(UserError, match="there is no GPU 2: torch finds 2, numbered from 0"):
            placement.choose_device(gpu_id, shares)
    with pytest.raises(UserError, match="-g must give --gpu-id 0 its share, it names 1"):
        placement.choose_device(0, {1: 10})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="-g names GPUs, and torch finds none here: leave it out, -r limits"):
        placement.choose_device(0, {0: 10})


def test_shares_without_accelerate(monkeypatch):
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="-g and -r need accelerate, which is not installed: pip install accelerate"):
        placement.placement(CPU, None, 3)
    assert placement.placement(GPU, None, None) == {}


def test_ways_to_quantise_and_to_spread_that_do_not_go_together(random_models):
    def check(message, **options):
        with pytest.raises(UserError, match=message):
            loader.load(str(random_models["neox"]), **options)

    check("--dtype int8 and --load-8bit both quantise: give one of them", dtype="int8", bits=8)
    check("--dtype int8 keeps the model on one device: leave out -g and -r", dtype="int8", cpu_gib=1.0)
    check("--load-4bit keeps weights where they are computed with: leave out -r", bits=4, cpu_gib=1.0)


def test_quantising_without_bitsandbytes(random_models, monkeypatch):
    monkeypatch.setattr(placement.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--load-8bit needs bitsandbytes, which is not installed: pip install bitsand"):
        placement.quantisation_options(8, torch.float32, CPU, None)


def test_quantised_models_are_spread_over_the_gpus_alone():
    options = placement.quantisation_options(4, torch.float16, GPU, {0: 1.0, 1: 2.0})
    assert options["max_memory"] == {0: 1 << 30, 1: 2 << 30}
    assert options["quantization_config"].bnb_4bit_compute_dtype == torch.float16
    assert placement.quantisation_options(8, torch.float16, GPU, None)["device_map"] == {"": GPU}


def test_no_such_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in (tmp_path / "none", "./none", "huggingface_models/none", "none"):
        refused(name, f"--model {name}: no such folder; huggingface_models/ holds .*; give a training")


def test_a_hub_name_that_cannot_be_reached(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refused("nobody/nothing", "cannot fetch nobody/nothing: the hub cannot be reached")


def test_a_file(random_models):
    file = random_models["neox"] / hf_model.WEIGHTS
    refused(file, f"--model {file} is a file: expected a model's folder, or a hub name")


def test_an_empty_folder_and_one_that_lacks_its_weights(tmp_path, copy):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(
        empty, f"--model {empty} is not a Hugging Face model: config.json is missing, found nothing; pass a training"
    )
    (copy / hf_model.WEIGHTS).unlink()
    refused(
        copy, "is not a Hugging Face model: model.safetensors is missing, found config.json, generation_config.json"
    )


def test_a_checkpoint_of_the_original_kit(tmp_path):
    (tmp_path / legacy.stage_file(0)).touch()
    refused(tmp_path, "is a checkpoint of the original kit, which does not say what model it is: convert it with tools")


def test_a_folder_that_must_not_be_read(copy, monkeypatch):
    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    (copy / layer_shards.CONFIG).unlink()
    monkeypatch.setattr(model_folders, "_identify", forbidden)
    refused(copy, f"--model {copy} cannot be read: Permission denied")
    refused("x" * 5000, "cannot be read: File name too long")


# -- what is there but broken


def test_a_folder_without_a_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    refused(copy, "holds no tokenizer")


def test_a_tokenizer_of_another_model(copy):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    size = len(tokenizer["model"]["vocab"])
    one = {**tokenizer["added_tokens"][0], "special": False}
    tokenizer["added_tokens"] += [{**one, "id": size + n, "content": f"<|{n}|>"} for n in range(400 - size)]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(copy, r"has 400 tokens, the model 384: they do not belong together, copy the tokenizer that")


@pytest.mark.parametrize("template", ["", "{{ messages[0].content }}", "{{ '[PAD]' + messages[0].content }}"])
def test_a_token_beyond_the_embedding_is_no_fault_where_nothing_writes_it(copy, template):
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    one, size = tokenizer["added_tokens"][0], len(tokenizer["model"]["vocab"])
    words = [{**one, "id": id, "content": f"word{id}", "special": False} for id in range(size, 384)]
    tokenizer["added_tokens"] += [*words, {**one, "id": 384, "content": "[PAD]"}]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "[PAD]", "chat_template": template}))
    if "[PAD]" in template:
        refused(copy, "has 385 tokens, the model 384: they do not belong together")
        return
    loaded = loader.load(str(copy))
    assert (loaded.tokenizer.vocab_size, loaded.tokenizer.used_size) == (385, 384)
    assert 384 not in loaded.tokenizer.encode(["what of [PAD]?"])[0]


def test_a_tensor_that_is_missing_is_not_filled_with_random_numbers(copy):
    weights = load_file(copy / hf_model.WEIGHTS)
    weights.pop(min(weights))
    save_file(weights, copy / hf_model.WEIGHTS, metadata={"format": "pt"})
    refused(copy, r"lacks 1 of the model's tensors, .*weight first: fetch or copy it again")


def test_a_tensor_of_another_shape(copy):
    weights = load_file(copy / hf_model.WEIGHTS)
    key = min(weights)
    save_file({**weights, key: torch.zeros(3, 3)}, copy / hf_model.WEIGHTS, metadata={"format": "pt"})
    refused(
        copy, rf"{copy} does not fit its config.json: .*weight is of shape \[3, 3\], expected \[.*\]; copy both from"
    )


def test_a_file_that_was_cut(copy):
    with open(copy / hf_model.WEIGHTS, "r+b") as file:
        file.truncate(1000)
    refused(copy, f"the model in {copy} cannot be loaded: ")


def test_a_shard_that_is_missing(copy):
    weights = load_file(copy / hf_model.WEIGHTS)
    (copy / hf_model.WEIGHTS).unlink()
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (copy / hf_model.WEIGHTS_INDEX).write_text(json.dumps(index))
    refused(copy, f"the model in {copy} cannot be loaded: .*model-00001-of-00001.safetensors")


def test_a_damaged_config_is_not_reported_as_the_tokenizers(copy):
    (copy / layer_shards.CONFIG).write_text("{")
    refused(copy, f"the model in {copy} cannot be loaded: ")
    config = {"model_type": "gpt_neox", "hidden_size": 32, "num_attention_heads": 5}
    (copy / layer_shards.CONFIG).write_text(json.dumps(config))
    refused(copy, f"the model in {copy} cannot be loaded: .*divisible")


def test_a_config_without_a_vocabulary(copy):
    (copy / layer_shards.CONFIG).write_text(json.dumps({"model_type": "vit"}))
    refused(copy, f"the model in {copy} cannot be loaded: Unrecognized configuration class .*ViTConfig")


@pytest.mark.parametrize("ids", ["x", [[1]], [1, None], 1.5, True])
def test_eos_ids_that_are_not_ids(copy, ids):
    config = copy / hf_model.GENERATION_CONFIG
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": ids}))
    refused(copy, f"eos_token_id of the model in {copy} is .*: expected a token id or a list of them")


def test_notes_of_bitsandbytes_stay_off_the_terminal(random_models, no_gpu, caplog):
    loader.silence_libraries()  # before the import, which has notes of its own
    pytest.importorskip("bitsandbytes")
    model = loader.load(str(random_models["neox"]), bits=8).model
    with torch.inference_mode():
        model(torch.tensor([[5, 6]]))
    assert not caplog.records


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({}, "Unrecognized configuration class .*T5Config"),
        ({"auto_map": {"AutoModelForCausalLM": "code.M"}}, ".* contains custom code"),
    ],
)
def test_a_model_that_is_no_causal_language_model(copy, own, message):
    config = {"model_type": "t5", "vocab_size": 384, "d_model": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, **own}
    (copy / layer_shards.CONFIG).write_text(json.dumps(config))
    refused(copy, f"the model in {copy} cannot be loaded: {message}")


def test_a_model_that_keeps_no_keys_and_values(copy):
    config = {"model_type": "mamba", "vocab_size": 384, "hidden_size": 16, "num_hidden_layers": 1}
    (copy / layer_shards.CONFIG).write_text(json.dumps(config))
    refused(copy, f"the model in {copy} cannot be loaded: it is a mamba, which keeps no keys and values of what it has")


def test_a_model_that_brings_its_own_code_is_refused(copy):
    config = json.loads((copy / layer_shards.CONFIG).read_text())
    config |= {"model_type": "homemade", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (copy / layer_shards.CONFIG).write_text(json.dumps(config))
    (copy / "code.py").write_text("raise SystemExit('the code ran')")
    refused(copy, "cannot be loaded: ")


def test_a_model_too_large_for_memory(copy, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(loader.AutoModelForCausalLM, "from_pretrained", full)
    refused(copy, r"does not fit into memory: spread it with -g ID:GiB \.\.\. and -r GiB, or try --dtype bfloat16")
