"""Converting checkpoints: the same bytes all the way round, ready for transformers; nothing half made or guessed."""

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import tiny_models
import tiny_shards
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import checkpoint_of, run
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from openchatkit.convert import to_hf
from openchatkit.convert.from_hf import prepare
from openchatkit.convert.to_hf import convert
from openchatkit.errors import UserError
from openchatkit.formats import chat, hf_writer, legacy, manifest
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.models.shards import layer_number


@pytest.fixture
def made(tmp_path, tiny_tokenizer):
    """A GPT-NeoX model, its prepared folder and a checkpoint of it, all in `tmp_path`."""
    return make(tmp_path, "neox", tiny_tokenizer)


def make(tmp_path, variant, tokenizer, **options):
    model = tiny_models.save(tmp_path / "base", variant, tokenizer=tokenizer, **options)
    checkpoint_of(prepare(str(tmp_path / "base"), tmp_path / "prepared"), tmp_path / "ckpts")
    return model


def tensors(folder):
    """Every tensor of a model's folder, by key."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in list(file.keys())}
    return found


def same_bytes(a, b):
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def logits(model, length=9):
    with torch.no_grad():
        return model(torch.arange(length).unsqueeze(0)).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
def test_round_trip(tmp_path, variant, tiny_tokenizer, dtype):
    make(tmp_path, variant, tiny_tokenizer, dtype=dtype)
    folder = convert(tmp_path / "ckpts", tmp_path / "hf")
    assert same_bytes(tensors(folder), tensors(tmp_path / "base"))
    loaded, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values()), notes
    assert loaded.dtype == dtype
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(loaded.eval()), logits(base.eval()))
    again = prepare(str(folder), tmp_path / "again")
    for shard in LayerShards.open(again).shards:
        name = f"{shard}.safetensors"
        assert (again / name).read_bytes() == (tmp_path / "prepared" / "base" / name).read_bytes()


def test_the_head_s_key_and_the_files(made, tmp_path):
    folder = convert(tmp_path / "ckpts", tmp_path / "hf")
    assert "embed_out.weight" in tensors(folder)
    names = {path.name for path in folder.iterdir()}
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == small | {"model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"base", "prepared", "ckpts", "hf"}


def test_large_models_are_written_in_numbered_files_with_an_index(made, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writer.write_weights, "__kwdefaults__", {"max_shard_bytes": 20_000})
    folder = convert(tmp_path / "ckpts", tmp_path / "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    count = len(files)
    assert count > 3
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    found = tensors(folder)
    assert index["weight_map"].keys() == found.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    assert same_bytes(found, tensors(tmp_path / "base"))
    loaded, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(notes.values())
    assert torch.equal(logits(loaded.eval()), logits(made))


@pytest.mark.parametrize(("flag", "dtype"), [("--fp16", torch.float16), ("--bf16", torch.bfloat16)])
def test_half_precision(made, tmp_path, flag, dtype, capsys):
    assert neox("--ckpt-path", tmp_path / "ckpts", "--save-path", tmp_path / "hf", flag) == 0
    assert f"the model is in {tmp_path}/hf" in capsys.readouterr().err
    expected = {key: tensor.to(dtype) for key, tensor in tensors(tmp_path / "base").items()}
    assert same_bytes(tensors(tmp_path / "hf"), expected)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == dtype


def test_fp16_that_would_overflow(tmp_path, tiny_tokenizer):
    model = tiny_models.build("neox")
    with torch.no_grad():
        model.lm_head.weight[1, 1] = -1e5
    model.save_pretrained(tmp_path / "base")
    tiny_models.copy_tokenizer(tiny_tokenizer, tmp_path / "base")
    checkpoint_of(prepare(str(tmp_path / "base"), tmp_path / "prepared"), tmp_path / "ckpts")
    with pytest.raises(UserError, match=r"embed_out\.weight holds values up to 100000, more than float16 can"):
        convert(tmp_path / "ckpts", tmp_path / "hf", dtype="float16")
    assert not (tmp_path / "hf").exists()
    assert not (tmp_path / ".hf.tmp").exists()


@pytest.mark.parametrize("variant", ["neox", "neox_sequential"])
def test_rotary_settings_in_both_spellings(tmp_path, variant, tiny_tokenizer):
    model = make(tmp_path, variant, tiny_tokenizer)
    folder = convert(tmp_path / "ckpts", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    rope = model.config.rope_parameters
    assert config["rotary_pct"] == config["rope_parameters"]["partial_rotary_factor"] == rope["partial_rotary_factor"]
    assert config["rotary_emb_base"] == config["rope_parameters"]["rope_theta"] == rope["rope_theta"]
    assert AutoConfig.from_pretrained(folder).rope_parameters == rope
    # Each spelling alone gives the same model, which is what an old and a new release would read.
    for drop in (("rotary_pct", "rotary_emb_base"), ("rope_parameters",)):
        shutil.copytree(folder, tmp_path / drop[0])
        kept = {key: value for key, value in config.items() if key not in drop}
        (tmp_path / drop[0] / "config.json").write_text(json.dumps(kept))
        assert AutoConfig.from_pretrained(tmp_path / drop[0]).rope_parameters == rope


def test_the_old_spelling_alone_is_kept_and_added_to(tmp_path, tiny_tokenizer):
    tiny_models.save(tmp_path / "base", "neox", tokenizer=tiny_tokenizer)
    path = tmp_path / "base" / "config.json"
    raw = json.loads(path.read_text())
    del raw["rope_parameters"], raw["architectures"], raw["dtype"]
    path.write_text(json.dumps({**raw, "rotary_pct": 0.5, "rotary_emb_base": 2000, "torch_dtype": "float16"}))
    checkpoint_of(prepare(str(tmp_path / "base"), tmp_path / "prepared"), tmp_path / "ckpts")
    config = json.loads((convert(tmp_path / "ckpts", tmp_path / "hf") / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 2000.0, "partial_rotary_factor": 0.5}
    assert (config["rotary_pct"], config["rotary_emb_base"]) == (0.5, 2000)
    assert config["architectures"] == ["GPTNeoXForCausalLM"]
    assert config["torch_dtype"] == config["dtype"] == "float32"


def test_the_end_of_text_is_the_tokenizer_s(made, tmp_path):
    """The base model's config says 2, the class default of GPT-NeoX; its tokenizer says 0."""
    folder = convert(tmp_path / "ckpts", tmp_path / "hf")
    config, generation = AutoConfig.from_pretrained(folder), GenerationConfig.from_pretrained(folder)
    assert (config.bos_token_id, config.eos_token_id) == (0, 0)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (0, 0, 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 0


def test_a_tokenizer_that_names_no_end_of_text(made, tmp_path):
    (tmp_path / "ckpts" / "checkpoint_3" / "tokenizer_config.json").unlink()
    rewrite_manifest(tmp_path / "ckpts" / "checkpoint_3", without="tokenizer_config.json")
    folder = convert(tmp_path / "ckpts", tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 0)
    # Its class has both tokens by itself, and training pads with the second.
    assert json.loads((folder / "generation_config.json").read_text())["pad_token_id"] == 1


def test_the_end_of_text_that_only_the_tokenizer_s_class_names(tmp_path, tiny_tokenizer):
    """The token that a model was trained with goes into its configuration, whatever its number."""
    from openchatkit.data.tokenizer import Tokenizer

    tiny_models.save(tmp_path / "base", "neox", tokenizer=tiny_tokenizer)
    whole = json.loads((tmp_path / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    names = {0: "<unk>", 1: "<|padding|>", 2: "<|endoftext|>"}
    vocabulary = {token: id for token, id in whole["model"]["vocab"].items() if id > 2}
    whole["model"]["vocab"] = {name: id for id, name in names.items()} | vocabulary
    whole["added_tokens"] = [{**whole["added_tokens"][0], "id": id, "content": name} for id, name in names.items()]
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPTNeoXTokenizer"}))
    assert Tokenizer(tmp_path / "base").end_of_text == 2
    checkpoint_of(prepare(str(tmp_path / "base"), tmp_path / "prepared"), tmp_path / "ckpts")
    folder = convert(tmp_path / "ckpts", tmp_path / "hf")
    for name in ("config.json", "generation_config.json"):
        written = json.loads((folder / name).read_text())
        assert (written["bos_token_id"], written["eos_token_id"]) == (2, 2), name


def test_weights_that_are_no_numbers_are_refused_unless_they_are_meant(made, tmp_path, capsys):
    prepared = tmp_path / "prepared" / "base"
    path = prepared / "layer_00001.safetensors"
    weights = load_file(path)
    weights["mlp.dense_4h_to_h.bias"][0] = float("inf")
    save_file(weights, path)
    listed = manifest.read(prepared)
    manifest.write(prepared, [manifest.record(prepared / name) for name in listed.files], about=listed.about)
    checkpoint_of(prepared, tmp_path / "broken")
    line = failing(capsys, "--ckpt-path", tmp_path / "broken", "--save-path", tmp_path / "hf")
    assert "layers.1.mlp.dense_4h_to_h.bias holds NaN or infinite numbers" in line
    assert not (tmp_path / "hf").exists()
    flags = ["--ckpt-path", tmp_path / "broken", "--save-path", tmp_path / "hf", "--allow-non-finite"]
    assert neox(*flags) == 0


def rewrite_manifest(folder, *, without):
    old = manifest.read(folder)
    manifest.write(folder, [r for name, r in old.files.items() if name != without], about=old.about)


def test_the_chat_template_renders_as_the_kit_does(made, tmp_path):
    folder = convert(tmp_path / "ckpts", tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    turns = [
        chat.Turn("human", "What is a?", ("a: it is so", "b")),
        chat.Turn("bot", "So."),
        chat.Turn("human", "Why?"),
    ]
    roles = {"human": "user", "bot": "assistant"}
    messages = [{"role": roles[t.role], "content": t.text, "passages": list(t.passages)} for t in turns]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == chat.render_text(turns)
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == chat.CHAT_TEMPLATE


def neox(*arguments):
    main = to_hf.convert_command("t.py", family="gpt_neox", config_name="org/base", stages=3, layers_per_stage=2)
    return run(main, *arguments)


def failing(capsys, *arguments):
    """Run the GPT-NeoX command, which must fail; returns its one line."""
    assert neox(*arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_stage_flags_are_checked_against_the_record(made, tmp_path, capsys):
    paths = ("--ckpt-path", tmp_path / "ckpts", "--save-path", tmp_path / "hf")
    line = failing(capsys, *paths, "--n-stages", "8")
    assert line.endswith("checkpoint_3 was written by 3 stages, --n-stages says 8; leave the flag out")
    line = failing(capsys, *paths, "--n-stages", "3", "--n-layer-per-stage", "6")
    assert line.endswith("was written by 2 layers_per_stage, --n-layer-per-stage says 6; leave the flag out")
    assert not (tmp_path / "hf").exists()
    assert neox(*paths, "--n-stages", "3", "--n-layer-per-stage", "2") == 0


def test_a_checkpoint_and_its_parent_and_either_spelling(made, tmp_path):
    for number, path in enumerate([tmp_path / "ckpts", tmp_path / "ckpts" / "checkpoint_3", tmp_path / "ckpts" / "3"]):
        assert same_bytes(tensors(convert(path, tmp_path / f"hf_{number}")), tensors(tmp_path / "base"))


def test_no_checkpoint(tmp_path, capsys):
    line = failing(capsys, "--ckpt-path", tmp_path / "x", "--save-path", tmp_path / "hf")
    assert "holds no checkpoint: found no such folder; expected checkpoint_<step>" in line


def test_the_other_family_s_tool(tmp_path, tiny_tokenizer, capsys):
    make(tmp_path, "gptj", tiny_tokenizer)
    line = failing(capsys, "--ckpt-path", tmp_path / "ckpts", "--save-path", tmp_path / "hf")
    assert line.endswith("is a gptj model, gpt_neox was expected; use tools/convert_to_hf_gptj.py")
    assert not (tmp_path / "hf").exists()


def test_a_model_that_transformers_cannot_compute(tmp_path, tiny_tokenizer, capsys):
    raw = tiny_shards.NEOX | {"model_type": "neox", "vocab_size": 400, "max_position_embeddings": 32, "num_kv_heads": 1}
    tiny_shards.write_prepared(tmp_path / "prepared", raw | {"norm": "rmsnorm", "hidden_act": "swiglu"})
    tiny_models.copy_tokenizer(tiny_tokenizer, tmp_path / "prepared")
    checkpoint_of(tmp_path / "prepared", tmp_path / "ckpts")
    line = failing(capsys, "--ckpt-path", tmp_path / "ckpts", "--save-path", tmp_path / "hf")
    assert "has norm rmsnorm, num_kv_heads 1, hidden_act swiglu, which GPT-NeoX in transformers does not" in line
    assert line.endswith("chat with the checkpoint as it is, inference/bot.py --model")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("file", ["layer_00004.safetensors", "state.json", "config.json", "tokenizer.json"])
def test_one_altered_bit_leaves_nothing(made, tmp_path, capsys, file):
    path = tmp_path / "ckpts" / "checkpoint_3" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    line = failing(capsys, "--ckpt-path", tmp_path / "ckpts", "--save-path", tmp_path / "hf")
    assert f"{file} was altered" in line
    assert "no other checkpoint in" in line
    assert {path.name for path in tmp_path.iterdir()} == {"base", "prepared", "ckpts"}


def test_a_missing_shard(made, tmp_path):
    (tmp_path / "ckpts" / "checkpoint_3" / "head.safetensors").unlink()
    message = rf"head\.safetensors is missing; no other checkpoint in {tmp_path}/ckpts is whole$"
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "ckpts", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_folder_with_other_things_is_not_overwritten(made, tmp_path, capsys):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "thesis.txt").write_text("precious")
    line = failing(capsys, "--ckpt-path", tmp_path / "ckpts", "--save-path", tmp_path / "hf")
    assert line.endswith("holds something else than a converted model; choose another folder")
    assert (tmp_path / "hf" / "thesis.txt").read_text() == "precious"
    assert failing(capsys, "--ckpt-path", tmp_path / "ckpts", "--save-path", tmp_path / "hf" / "thesis.txt")


def test_an_earlier_result_is_replaced_and_only_by_a_whole_one(made, tmp_path):
    convert(tmp_path / "ckpts", tmp_path / "hf", dtype="float16")
    before = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    shard = tmp_path / "ckpts" / "checkpoint_3" / "head.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match="altered"):
        convert(tmp_path / "ckpts", tmp_path / "hf")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    shard.write_bytes(whole)
    convert(tmp_path / "ckpts", tmp_path / "hf")
    assert same_bytes(tensors(tmp_path / "hf"), tensors(tmp_path / "base"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "prepared", "ckpts", "hf"}


KILLED = """
import os, signal, sys
from openchatkit.convert import to_hf
from openchatkit.formats import hf_writer
def killed(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(hf_writer, sys.argv[3], killed)
to_hf.convert(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize("step", ["write_weights", "write_config", "write_tokenizer"])
def test_a_killed_conversion_leaves_nothing_under_its_name_and_can_be_run_again(made, tmp_path, step, quick_python):
    arguments = [str(tmp_path / "ckpts"), str(tmp_path / "hf"), step]
    killed = subprocess.run([quick_python, "-c", KILLED, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "hf").exists()
    convert(tmp_path / "ckpts", tmp_path / "hf")
    assert same_bytes(tensors(tmp_path / "hf"), tensors(tmp_path / "base"))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "prepared", "ckpts", "hf"}


def test_a_checkpoint_without_a_tokenizer(tmp_path, tiny_tokenizer, capsys):
    tiny_models.save(tmp_path / "base", "neox")
    checkpoint_of(prepare(str(tmp_path / "base"), tmp_path / "prepared"), tmp_path / "ckpts")
    paths = ("--ckpt-path", tmp_path / "ckpts", "--save-path", tmp_path / "hf")
    line = failing(capsys, *paths)
    assert line.endswith("holds no tokenizer: pass --config-name with the base model's name or folder")
    tiny_models.save(tmp_path / "other", "neox", tokenizer=tiny_tokenizer)
    assert neox(*paths, "--config-name", tmp_path / "other") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == 0


def test_a_config_name_that_contradicts_the_checkpoint(made, tmp_path, tiny_tokenizer, capsys):
    tiny_models.save(tmp_path / "other", "neox_sequential", tokenizer=tiny_tokenizer)
    line = failing(
        capsys, "--ckpt-path", tmp_path / "ckpts", "--save-path", tmp_path / "hf", "--config-name", tmp_path / "other"
    )
    assert "its rotary_dim is not that of" in line


# The original kit's checkpoints.


def write_stages(folder, shards_folder, *, stages, layers_per_stage, dtype=torch.float16):
    """`prank_<i>_checkpoint.pt` files as the original wrote them, with its buffers."""
    shards = LayerShards.open(shards_folder)
    files = [{} for _ in range(stages)]
    for shard in shards.shards:
        number = layer_number(shard)
        if shard == "embed":
            stage, position = 0, 0
        elif shard == "head":
            stage = stages - 1
            position = 1 + max([int(key.split(".")[0]) for key in files[stage]], default=-1 + (stage == 0))
        else:
            stage = number // layers_per_stage
            position = number % layers_per_stage + (stage == 0)
        kept = shards.read(shard)
        if number is not None:
            attention = "attention" if shards.config.family == "gpt_neox" else "attn"
            kept |= {f"{attention}.bias": torch.ones(1, 1, 8, 8), f"{attention}.masked_bias": torch.tensor(-1e4)}
        files[stage] |= {f"{position}.{name}": tensor.to(dtype) for name, tensor in kept.items()}
    folder.mkdir(parents=True)
    for stage, content in enumerate(files):
        torch.save(content, folder / legacy.stage_file(stage))
        torch.save({"lr": 0.1}, folder / f"prank_{stage}_scheduler.pt")
    (folder / "meta.json").write_text(json.dumps({"step": 10}))


def original_command(variant, **options):
    family, tool = ("gptj", "gptj") if variant == "gptj" else ("gpt_neox", "gptneox")
    defaults = {"config_name": "org/base", "stages": 3, "layers_per_stage": 2, **options}
    return to_hf.convert_command(f"convert_to_hf_{tool}.py", family=family, **defaults)


@pytest.mark.parametrize("layout", [(3, 2), (2, 3), (5, 1), (1, 5), (2, 4)], ids=str)
@pytest.mark.parametrize("variant", ["neox", "gptj"])
def test_the_original_s_stages_with_a_short_last_one_too(tmp_path, tiny_tokenizer, variant, layout):
    make(tmp_path, variant, tiny_tokenizer)
    stages, layers = layout
    write_stages(tmp_path / "old" / "10", tmp_path / "prepared" / "base", stages=stages, layers_per_stage=layers)
    (tmp_path / "old" / "latest").write_text("10")
    status = run(
        original_command(variant),
        *("--config-name", tmp_path / "base", "--ckpt-path", tmp_path / "old", "--save-path", tmp_path / "hf"),
        *("--n-stages", stages, "--n-layer-per-stage", layers),
    )
    assert status == 0
    expected = {key: tensor.half() for key, tensor in tensors(tmp_path / "base").items()}
    assert same_bytes(tensors(tmp_path / "hf"), expected)
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not any(notes.values())
    assert loaded.dtype == torch.float16
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").eos_token_id == 0


def test_the_defaults_are_those_of_the_original(tmp_path, tiny_tokenizer, monkeypatch):
    make(tmp_path / "org", "neox", tiny_tokenizer)
    shards = tmp_path / "org" / "prepared" / "base"
    write_stages(tmp_path / "old" / "checkpoint_10", shards, stages=3, layers_per_stage=2)
    monkeypatch.chdir(tmp_path)
    save = ("--save-path", tmp_path / "hf", "--bf16")
    assert run(original_command("neox"), "--ckpt-path", "old/checkpoint_10", *save) == 0
    assert {tensor.dtype for tensor in tensors(tmp_path / "hf").values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            (2, 3),
            r"holds the files of stages 0, 1, 2, --n-stages 2 expects 0 to 1; copy the missing files here, or pass",
        ),
        ((4, 2), r"holds the files of stages 0, 1, 2, --n-stages 4 expects 0 to 3"),
        ((3, 3), r"prank_0_checkpoint.pt does not hold the layers that --n-stages 3 --n-layer-per-stage 3 give it: "),
        ((3, 1), r"the stages hold \[2, 2, 1\] layers; pass --n-stages 3 --n-layer-per-stage 2"),
    ],
)
def test_stage_flags_that_do_not_fit_the_files(tmp_path, tiny_tokenizer, flags, message):
    make(tmp_path, "neox", tiny_tokenizer)
    write_stages(tmp_path / "old" / "10", tmp_path / "prepared" / "base", stages=3, layers_per_stage=2)
    with pytest.raises(UserError, match=message):
        convert(
            tmp_path / "old" / "10",
            tmp_path / "hf",
            config_name=str(tmp_path / "base"),
            stages=flags[0],
            layers_per_stage=flags[1],
        )
    assert not (tmp_path / "hf").exists()


def damage(path: Path, how: str) -> None:
    content = torch.load(path)
    key = "1.mlp.dense_h_to_4h.weight"
    if how == "missing":
        del content[key]
    elif how == "left over":
        content["1.mlp.extra"] = torch.ones(1)
    elif how == "shape":
        content[key] = content[key][1:]
    elif how == "no position":
        content["note"] = torch.ones(1)
    torch.save(content, path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "missing",
            r"prank_1_checkpoint\.pt: layer_00003 lacks mlp\.dense_h_to_4h\.weight; expected 12 tensors, found 11",
        ),
        ("left over", r"layer_00003 holds mlp\.extra, which a gpt_neox model of this config\.json does not"),
        ("shape", r"mlp\.dense_h_to_4h\.weight of layer_00003 is \[23, 16\], config\.json says \[24, 16\]"),
        ("no position", r"holds note, expected <position>\.<name>; it is not a stage of the original kit"),
    ],
)
def test_tensors_missing_left_over_or_of_another_shape(tmp_path, tiny_tokenizer, how, message):
    make(tmp_path, "neox", tiny_tokenizer)
    write_stages(tmp_path / "old" / "10", tmp_path / "prepared" / "base", stages=3, layers_per_stage=2)
    damage(tmp_path / "old" / "10" / legacy.stage_file(1), how)
    base = str(tmp_path / "base")
    with pytest.raises(UserError, match=message):
        convert(tmp_path / "old" / "10", tmp_path / "hf", config_name=base, stages=3, layers_per_stage=2)
    assert not (tmp_path / "hf").exists()


def test_a_config_with_more_layers_than_the_files(tmp_path, tiny_tokenizer):
    make(tmp_path, "neox", tiny_tokenizer)
    write_stages(tmp_path / "old" / "10", tmp_path / "prepared" / "base", stages=3, layers_per_stage=2)
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 6}))
    base = str(tmp_path / "base")
    with pytest.raises(UserError, match="the stages hold 5 layers, the config 6; pass the right --config-name"):
        convert(tmp_path / "old" / "10", tmp_path / "hf", config_name=base, stages=3, layers_per_stage=2)


def test_a_stage_that_is_cut(tmp_path, tiny_tokenizer):
    make(tmp_path, "neox", tiny_tokenizer)
    write_stages(tmp_path / "old" / "10", tmp_path / "prepared" / "base", stages=3, layers_per_stage=2)
    path = tmp_path / "old" / "10" / legacy.stage_file(2)
    os.truncate(path, 500)
    base = str(tmp_path / "base")
    with pytest.raises(
        UserError, match=r"prank_2_checkpoint\.pt is not a whole file of torch\.save; fetch or copy it again"
    ):
        convert(tmp_path / "old" / "10", tmp_path / "hf", config_name=base, stages=3, layers_per_stage=2)


@pytest.mark.parametrize("equal", [True, False])
def test_tied_embeddings_that_the_original_trained_apart(tmp_path, tiny_tokenizer, equal):
    make(tmp_path, "neox_tied", tiny_tokenizer)
    write_stages(tmp_path / "old" / "10", tmp_path / "prepared" / "base", stages=3, layers_per_stage=2)
    path = tmp_path / "old" / "10" / legacy.stage_file(2)
    embedding = torch.load(tmp_path / "old" / "10" / legacy.stage_file(0))["0.embed_in.weight"]
    torch.save({**torch.load(path), "1.embed_out.weight": embedding + (0.0 if equal else 0.5)}, path)
    options = {"config_name": str(tmp_path / "base"), "stages": 3, "layers_per_stage": 2}
    if equal:
        convert(tmp_path / "old" / "10", tmp_path / "hf", **options)
        assert "embed_out.weight" not in tensors(tmp_path / "hf")
    else:
        with pytest.raises(
            UserError, match="ties the embeddings, but the first and the last stage hold different ones"
        ):
            convert(tmp_path / "old" / "10", tmp_path / "hf", **options)
