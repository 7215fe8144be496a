"""Checkpoints of GPT-NeoX, written and read: for any number of tensor ranks, by its own rules, and back to the byte."""

import json
import re
import weakref

import numpy as np
import pytest
import tiny_shards
import torch
from safetensors.torch import load_file
from tiny_models import run
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit.convert import from_neox, to_hf, to_neox
from openchatkit.convert.from_hf import prepare
from openchatkit.errors import UserError
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.formats.neox_checkpoint import NeoXCheckpoint
from openchatkit.formats.neox_writer import describe_settings
from openchatkit.models.registry import config_from_hf

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
PLAIN = {"model_type": "gpt_neox", **SIZES, "intermediate_size": 64, "rotary_pct": 0.5, "max_position_embeddings": 32}
OWN = {"model_type": "neox", **SIZES, "intermediate_size": 20, "max_position_embeddings": 32}
MODELS = {
    "parallel": PLAIN,
    "sequential": {**PLAIN, "use_parallel_residual": False, "tie_word_embeddings": True, "hidden_act": "gelu_fast"},
    "llama": {
        **OWN,
        "norm": "rmsnorm",
        "hidden_act": "swiglu",
        "num_kv_heads": 4,
        "use_bias_in_mlp": False,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "num_attention_heads": 8,
    },
    "tied norms": {**OWN, "gpt_j_tied": True, "use_parallel_residual": True, "norm": "scalenorm", "pos_emb": "alibi"},
    "positions": {**OWN, "pos_emb": "learned", "use_qk_layernorm": True, "norm": "rmsnorm", "hidden_act": "geglu"},
    "sparse": {**OWN, "attention_config": ["local", "global"], "sparsity_config": {"block": 4, "seed": 1234}},
    "sliding": {**OWN, "pos_emb": "sinusoidal", "sliding_window_width": 5, "hidden_dropout": 0.1},
    "relative": {**OWN, "pos_emb": "rpe", "norm": "non_parametric_layernorm", "use_parallel_residual": True},
}


def write_source(folder, name):
    try:
        config_from_hf(MODELS[name])
    except UserError as error:
        pytest.skip(str(error))
    return tiny_shards.write_prepared(folder, MODELS[name])


def same_shards(folder, made):
    shards = LayerShards.open(folder)
    shards.verify()
    for shard, tensors in made.items():
        assert tiny_shards.equal(shards.read(shard), tensors), shard
    return shards


LAYOUTS = [
    pytest.param(1, True, "2021", marks=pytest.mark.long),
    (2, False, "today"),
    (4, True, "today"),
]


@pytest.mark.parametrize(("ranks", "pipeline", "names"), LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_to_the_byte(tmp_path, name, ranks, pipeline, names):
    made = write_source(tmp_path / "shards", name)
    to_neox.convert(tmp_path / "shards", tmp_path / "neox", ranks=ranks, pipeline=pipeline, names=names)
    steps = tmp_path / "neox" / "global_step0"
    assert (tmp_path / "neox" / "latest").read_text() == "global_step0"
    weights = {path.name for path in steps.glob("layer_*")}
    assert len({path.name for path in steps.glob("mp_rank_*")}) == ranks
    assert weights if pipeline else not weights
    shards = same_shards(from_neox.convert(tmp_path / "neox", tmp_path / "back"), made)
    before, after = LayerShards.open(tmp_path / "shards").config, shards.config
    initial = ("init_std", "output_init_std", "init_method", "output_init_method")
    different = {key for key, value in vars(before).items() if value != vars(after)[key]}
    assert different <= {*initial}


def merge(folder, layer, ranks):
    """A layer's tensors by the rules of GPT-NeoX's own layers, with parallel residual."""
    files = [torch.load(folder / f"layer_{layer:02}-model_{rank:02}-model_states.pt") for rank in range(ranks)]
    merged = {}
    for key in files[0]:
        parts = [file[key] for file in files]
        if re.search(r"(attention\.dense|linear2)\.weight", key):
            merged[key] = torch.cat(parts, 1)
        elif re.search(r"(attention\.dense|linear2)\.bias", key):
            merged[key] = sum(parts)
        elif "norm" in key:
            assert all(torch.equal(part, parts[0]) for part in parts)
            merged[key] = parts[0]
        else:
            merged[key] = torch.cat(parts, 0)
    return merged


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_is_written_adds_up_as_in_gpt_neox(tmp_path, ranks):
    made = tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    to_neox.convert(tmp_path / "shards", tmp_path / "neox", ranks=ranks)
    steps = tmp_path / "neox" / "global_step0"
    assert merge(steps, 0, ranks).keys() == {"word_embeddings.weight"}
    assert torch.equal(merge(steps, 0, ranks)["word_embeddings.weight"], made["embed"]["embed_in.weight"])
    assert torch.equal(merge(steps, 5, ranks)["norm.bias"], made["head"]["final_layer_norm.bias"])
    assert torch.equal(merge(steps, 6, ranks)["final_linear.weight"], made["head"]["embed_out.weight"])
    renamed = {
        name.replace("dense_h_to_4h", "linear1").replace("dense_4h_to_h", "linear2"): tensor
        for name, tensor in made["layer_00001"].items()
    }
    assert tiny_shards.equal(merge(steps, 3, ranks), renamed)
    # No file holds more than its own part, whatever memory the part was a view of.
    sizes = [path.stat().st_size for path in steps.glob("layer_00-*")]
    assert max(sizes) < 24 * 16 * 4 / ranks + 2000


def test_names_of_2021_come_with_the_frequencies_that_it_stored(tmp_path):
    tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    to_neox.convert(tmp_path / "shards", tmp_path / "neox", names="2021")
    layer = torch.load(tmp_path / "neox" / "global_step0" / "layer_02-model_00-model_states.pt")
    assert "mlp.dense_h_to_4h.weight" in layer
    expected = 1 / 10000 ** (torch.arange(0, 2, 2) / 2)
    torch.testing.assert_close(layer["attention.rotary_emb.inv_freq"], expected)


def test_other_positions_come_with_their_buffers(tmp_path):
    for name, raw in (("alibi", {**OWN, "pos_emb": "alibi"}), ("waves", {**OWN, "pos_emb": "sinusoidal"})):
        tiny_shards.write_prepared(tmp_path / name, raw)
        to_neox.convert(tmp_path / name, tmp_path / "neox" / name, ranks=2)
    steps = tmp_path / "neox" / "alibi" / "global_step0"
    slopes = [torch.load(steps / f"layer_03-model_0{rank}-model_states.pt") for rank in range(2)]
    # Of 4 heads: 2^-2, 2^-4, 2^-6, 2^-8.
    assert torch.cat([layer["attention.alibi_embed.slopes"] for layer in slopes]).tolist() == [
        2**-2,
        2**-4,
        2**-6,
        2**-8,
    ]
    embedding = torch.load(tmp_path / "neox" / "waves" / "global_step0" / "layer_00-model_01-model_states.pt")
    assert embedding["position_embeddings.inv_freq"].shape == (8,)


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_tokenizer):
    """A model of transformers with its tokenizer, and what is prepared of it."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = GPTNeoXConfig(**{**PLAIN, "vocab_size": 400}, bos_token_id=0, eos_token_id=0)
    model = GPTNeoXForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "hf")
    for file in tiny_tokenizer.iterdir():
        (folder / "hf" / file.name).write_bytes(file.read_bytes())
    return model, prepare(str(folder / "hf"), folder)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@torch.no_grad()
def test_shards_to_gpt_neox_to_shards_to_hugging_face(tmp_path, base, ranks):
    model, shards = base
    assert run(to_neox.main, shards, "--save-dir", tmp_path / "neox", "--tensor-ranks", ranks) == 0
    assert run(from_neox.main, tmp_path / "neox", "--save-dir", tmp_path / "back") == 0
    to_hf.convert(tmp_path / "back", tmp_path / "hf")
    ids = torch.arange(9).unsqueeze(0)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.equal(again(ids).logits, model(ids).logits)
    to_hf.convert(shards, tmp_path / "straight")
    converted, straight = (load_file(tmp_path / name / "model.safetensors") for name in ("hf", "straight"))
    assert tiny_shards.equal(converted, straight)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_settings_that_gpt_neox_reads(tmp_path, base):
    to_neox.convert(base[1], tmp_path / "neox", ranks=2, dtype="bfloat16")
    said = json.loads((tmp_path / "neox" / "global_step0" / "configs" / "model.yml").read_text())
    assert said["vocab_file"] == str(tmp_path / "neox" / "tokenizer.json")
    assert (said["tokenizer_type"], said["model_parallel_size"], said["pipe_parallel_size"]) == ("HFTokenizer", 2, 1)
    # 384 ids of the tokenizer, padded as GPT-NeoX pads them, are the rows of the embedding.
    unit = said["make_vocab_size_divisible_by"] * 2
    assert -(-384 // unit) * unit == 400
    assert {tensor.dtype for tensor in NeoXCheckpoint(tmp_path / "neox" / "global_step0").read("embed").values()} == {
        torch.bfloat16
    }


def test_the_settings_of_widths(tmp_path):
    config = config_from_hf({**PLAIN, "rotary_pct": 0.3, "num_attention_heads": 1, "hidden_size": 60})
    share = describe_settings(config, ranks=1, pipeline=True)["rotary_pct"]
    assert int(60 * share) == config.rotary_dim == 18
    gated = describe_settings(config_from_hf({**OWN, "hidden_act": "swiglu"}), ranks=1, pipeline=False)
    assert (gated["intermediate_size"], gated["pipe_parallel_size"]) == (60, 0)  # 2/3 of it are the rows of both halves


def test_a_file_of_all_layers_may_hold_anything_else(tmp_path):
    made = tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    to_neox.convert(tmp_path / "shards", tmp_path / "neox", pipeline=False)
    path = tmp_path / "neox" / "global_step0" / "mp_rank_00_model_states.pt"
    module = {key: torch.nn.Parameter(tensor) for key, tensor in torch.load(path)["module"].items()}
    others = {"np_rng_state": np.random.get_state(), "args": re.compile("x"), "optimizer": [Hostile()]}
    torch.save({"module": module, **others}, path)
    same_shards(from_neox.convert(tmp_path / "neox", tmp_path / "back"), made)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


def test_a_conversion_resumes(tmp_path, monkeypatch):
    made = tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    to_neox.convert(tmp_path / "shards", tmp_path / "neox")
    read, asked = NeoXCheckpoint.read, []

    def stop_at_the_second(self, shard):
        asked.append(shard)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return read(self, shard)

    monkeypatch.setattr(NeoXCheckpoint, "read", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        from_neox.convert(tmp_path / "neox", tmp_path / "back")
    same_shards(from_neox.convert(tmp_path / "neox", tmp_path / "back"), made)
    assert asked == ["embed", "layer_00000", "layer_00000", "layer_00001", "head"]
    from_neox.convert(tmp_path / "neox", tmp_path / "back")
    assert len(asked) == 5


def test_one_layer_is_in_memory(tmp_path, monkeypatch):
    tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    to_neox.convert(tmp_path / "shards", tmp_path / "two", ranks=2)
    held, most = [], []
    read = NeoXCheckpoint.read

    def count_and_read(self, shard):
        most.append(sum(tensor() is not None for tensor in held))
        tensors = read(self, shard)
        held.extend(map(weakref.ref, tensors.values()))
        return tensors

    monkeypatch.setattr(NeoXCheckpoint, "read", count_and_read)
    from_neox.convert(tmp_path / "two", tmp_path / "back", dtype="bfloat16")
    to_neox.convert(tmp_path / "two", tmp_path / "one", dtype="float16")
    to_neox.convert(tmp_path / "two", tmp_path / "whole", pipeline=False)
    assert most == [0] * 12


def test_numbers_that_are_not_finite_or_too_large(tmp_path):
    made = tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    to_neox.convert(tmp_path / "shards", tmp_path / "neox")
    path = tmp_path / "neox" / "global_step0" / "layer_03-model_00-model_states.pt"
    layer = torch.load(path)
    layer["mlp.linear1.bias"][2] = 1e6
    torch.save(layer, path)
    message = r"^mlp\.dense_h_to_4h\.bias of layer_00001 holds values up to 1e\+06, more than float16 can"
    refused(lambda: from_neox.convert(tmp_path / "neox", tmp_path / "half", dtype="float16"), message)
    refused(lambda: to_neox.convert(tmp_path / "neox", tmp_path / "again", dtype="float16"), message)
    assert not (tmp_path / "again").exists()
    layer["mlp.linear1.bias"][2] = float("nan")
    torch.save(layer, path)
    refused(
        lambda: from_neox.convert(tmp_path / "neox", tmp_path / "back"), "layer_00001 holds NaN or infinite numbers"
    )
    from_neox.convert(tmp_path / "neox", tmp_path / "back", finite=False)
    kept = LayerShards.open(tmp_path / "back").read("layer_00001")["mlp.dense_h_to_4h.bias"]
    assert kept.isnan().sum() == 1
    assert torch.equal(kept[3:], made["layer_00001"]["mlp.dense_h_to_4h.bias"][3:])


@pytest.mark.parametrize("pipeline", [True, False])
def test_a_file_that_was_cut(tmp_path, pipeline):
    tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    to_neox.convert(tmp_path / "shards", tmp_path / "neox", ranks=2, pipeline=pipeline)
    name = "layer_03-model_01-model_states.pt" if pipeline else "mp_rank_01_model_states.pt"
    path = tmp_path / "neox" / "global_step0" / name
    path.write_bytes(path.read_bytes()[:-500])
    refused(
        lambda: from_neox.convert(tmp_path / "neox", tmp_path / "back"), f"{name} is not a whole file of torch.save"
    )
    assert not (tmp_path / "back").exists()


def test_a_training_checkpoint_keeps_its_step(tmp_path):
    tiny_shards.write_checkpoint(tmp_path / "run", 7)
    to_neox.convert(tmp_path / "run", tmp_path / "neox")
    assert (tmp_path / "neox" / "latest").read_text() == "global_step7"
    assert torch.load(tmp_path / "neox" / "global_step7" / "mp_rank_00_model_states.pt")["iteration"] == 7
    # Also as a start for other tensor ranks.
    to_neox.convert(tmp_path / "neox", tmp_path / "two", ranks=2)
    assert (tmp_path / "two" / "latest").read_text() == "global_step7"


def test_other_commands_take_or_name_it(tmp_path):
    made = tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    to_neox.convert(tmp_path / "shards", tmp_path / "neox", ranks=2)
    same_shards(prepare(str(tmp_path / "neox"), tmp_path / "prepared"), made)
    for path in (tmp_path / "neox", tmp_path / "neox" / "global_step0"):
        advice = (
            rf"{path} is a checkpoint of GPT-NeoX: run `python tools/convert_from_neox\.py {path} --save-dir MODEL`"
        )
        refused(lambda path=path: LayerShards.open(path), advice)
        refused(lambda path=path: to_hf.convert(path, tmp_path / "hf"), advice)


def refused(call, message):
    with pytest.raises(UserError) as caught:
        call()
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_what_cannot_be_written(tmp_path):
    tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    tiny_shards.write_prepared(tmp_path / "gptj", tiny_shards.GPTJ)
    save = tmp_path / "neox"
    refused(lambda: to_neox.convert(tmp_path / "no", save), "holds no model")
    refused(lambda: to_neox.convert(tmp_path / "gptj", save), "a gptj model is none that GPT-NeoX has")
    refused(lambda: to_neox.convert(tmp_path / "shards", save, ranks=3), r"^--tensor-ranks 3: .*give 1 or 2 or 4$")
    assert not save.exists()
    save.mkdir()
    (save / "mine").write_text("")
    refused(lambda: to_neox.convert(tmp_path / "shards", save), "there already and not empty")


def test_what_cannot_be_read(tmp_path):
    tiny_shards.write_prepared(tmp_path / "shards", PLAIN)
    neox, back = tmp_path / "neox", tmp_path / "back"
    refused(
        lambda: from_neox.convert(tmp_path, back), "holds no checkpoint of GPT-NeoX: expected files such as layer_00"
    )
    to_neox.convert(tmp_path / "shards", neox, ranks=2, pipeline=False)
    steps = neox / "global_step0"
    refused(lambda: from_neox.convert(neox, neox), "holds something else than layer shards")
    (steps / "mp_rank_00_model_states.pt").rename(tmp_path / "kept")
    refused(lambda: from_neox.convert(neox, back), r"mp_rank_00_model_states\.pt is missing; 1 is there$")
    (tmp_path / "kept").rename(steps / "mp_rank_00_model_states.pt")
    whole = torch.load(tmp_path / "neox" / "global_step0" / "mp_rank_00_model_states.pt")
    fewer = {key: tensor for key, tensor in whole["module"].items() if not key.startswith("sequential.3.")}
    for rank in range(2):
        (steps / f"mp_rank_0{rank}_model_states.pt").rename(tmp_path / f"rank_{rank}")
        torch.save({"module": fewer}, steps / f"mp_rank_0{rank}_model_states.pt")
    refused(
        lambda: from_neox.convert(neox, back), r"mp_rank_00_model_states.pt: sequential\.3\.\* is missing; .* 2 layers"
    )
    for rank in range(2):
        (tmp_path / f"rank_{rank}").rename(steps / f"mp_rank_0{rank}_model_states.pt")
    (steps / "mp_rank_01_model_states.pt").unlink()
    refused(lambda: from_neox.convert(neox, back), "holds 1 shards a layer, its tensors were cut into 2;")
    torch.save({"module": {}, "iteration": 3}, steps / "mp_rank_00_model_states.pt")
    refused(lambda: from_neox.convert(neox, back), "holds the state of ranks and no weights")
    (neox / "latest").write_text("global_step9")
    refused(lambda: from_neox.convert(neox, back), r"latest says global_step9, which is not there \(global_step0 is\)")
    (neox / "latest").unlink()
    (neox / "global_step5").mkdir()
    (neox / "global_step5" / "mp_rank_00_model_states.pt").write_bytes(b"")
    refused(lambda: from_neox.convert(neox, back), "holds global_step0, global_step5, and no latest names one")
    assert not back.exists()
