"""minimal20b against transformers: the same weights as GPT-NeoX wrote them, cut in all ways, and as layer shards."""

import copy
import json
import re

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit import minimal20b
from openchatkit.convert.from_hf import prepare
from openchatkit.errors import UserError
from openchatkit.formats.neox_checkpoint import NeoXCheckpoint

LAYERS = 3
IDS = torch.tensor([[5, 17, 3, 60, 22, 9, 41], [8, 8, 1, 30, 2, 55, 70]])
YML = """
# As GPT-NeoX writes them: a flow mapping with comments and a comma too many.
{
  "pipe-parallel-size": 2, # not ours to know
  "num-layers": %d,
  "hidden-size": 32,
  "num-attention-heads": 4,
  "max_position_embeddings": 64,
  "norm": "layernorm", "pos-emb": "rotary", "rotary_pct": 0.25,
  "no-weight-tying": %s,
  "gpt_j_residual": %s,
  "bias-gelu-fusion": true,
  "layernorm-epsilon": 1e-5,
}
"""
MODULES = {"embed_in": "word_embeddings", "final_layer_norm": "norm", "embed_out": "final_linear"}
NEWER = {"dense_h_to_4h": "linear1", "dense_4h_to_h": "linear2"}


def neox(*, parallel_residual=True, tied=False):
    """A random model, its biases and norms too, of LAYERS layers with 4 heads of 8."""
    config = GPTNeoXConfig(
        vocab_size=96,
        hidden_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        rotary_pct=0.25,
        hidden_act="gelu_fast",
        use_parallel_residual=parallel_residual,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    return randomised(GPTNeoXForCausalLM(config))


def randomised(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def split(name, tensor, ranks, *, parallel_residual):
    """A tensor as `ranks` ranks of tensor parallelism keep it."""
    if re.search(r"(attention\.dense|dense_4h_to_h)\.bias", name):
        if not parallel_residual:
            return [tensor] * ranks
        parts = [torch.randn_like(tensor) for _ in range(ranks - 1)]
        return [*parts, tensor - sum(parts)]
    if "norm" in name:
        drift = torch.linspace(-0.5, 0.5, ranks) if ranks > 1 else torch.zeros(1)
        return [tensor + step for step in drift]
    return tensor.chunk(ranks, dim=1 if re.search(r"(attention\.dense|dense_4h_to_h)\.weight", name) else 0)


def write_neox(folder, model, *, ranks=2, newer_names=False):
    """The model as GPT-NeoX saves it; returns the folder of its layer files."""
    config = model.config
    files = {}
    for key, tensor in model.state_dict().items():
        name = key.removeprefix("gpt_neox.").replace("lm_head", "embed_out")
        if config.tie_word_embeddings and name.startswith("embed_out"):
            continue
        module, _, rest = name.partition(".")
        number = {"embed_in": 0, "final_layer_norm": LAYERS + 3, "embed_out": LAYERS + 4}.get(module)
        if number is None:
            layer, _, rest = rest.partition(".")
            number, theirs = int(layer) + 2, rest
        else:
            theirs = f"{MODULES[module]}.{rest}"
        if newer_names:
            for old, new in NEWER.items():
                theirs = theirs.replace(old, new)
        parts = split(name, tensor, ranks, parallel_residual=config.use_parallel_residual)
        for rank, part in enumerate(parts):
            files.setdefault((number, rank), {})[theirs] = part.clone()
    steps = folder / "global_step7"
    steps.mkdir(parents=True)
    for (number, rank), tensors in files.items():
        if 2 <= number < LAYERS + 2:
            tensors["attention.rotary_emb.inv_freq"] = torch.ones(1)
        torch.save(tensors, steps / f"layer_{number:02}-model_{rank:02}-model_states.pt")
    (folder / "latest").write_text("global_step7\n")
    (folder / "configs").mkdir()
    said = (str(not config.tie_word_embeddings).lower(), str(config.use_parallel_residual).lower())
    (folder / "configs" / "tiny.yml").write_text(YML % (LAYERS, *said))
    return steps


def create(path, **options):
    return minimal20b.create_model(path, device="cpu", **options)


def close(ours, theirs):
    return torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def same_logits(model, reference):
    close(model(IDS), reference(IDS).logits)


@pytest.mark.parametrize("newer_names", [False, True], ids=["h_to_4h", "linear"])
@pytest.mark.parametrize("parallel_residual", [False, True], ids=["sequential", "parallel"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_logits_of_a_neox_checkpoint(tmp_path, ranks, parallel_residual, newer_names):
    reference = neox(parallel_residual=parallel_residual)
    steps = write_neox(tmp_path, reference, ranks=ranks, newer_names=newer_names)
    same_logits(create(steps), reference)


def test_tied_embeddings_and_the_folder_above(tmp_path):
    reference = neox(tied=True)
    write_neox(tmp_path, reference)
    model = create(tmp_path)
    same_logits(model, reference)
    assert model.stage.projection.weight.data_ptr() == model.stage.shards["embed"].embed_in.weight.data_ptr()


def test_precision_is_float32_on_the_cpu_unless_said(tmp_path):
    steps = write_neox(tmp_path, neox().half())
    assert {p.dtype for p in create(steps).parameters()} == {torch.float32}
    assert {p.dtype for p in create(steps, dtype=torch.float16).parameters()} == {torch.float16}


@torch.inference_mode()
def test_a_rotary_table_in_half_precision(tmp_path):
    steps = write_neox(tmp_path, neox())
    exact, rounded = create(steps), create(steps, use_cache=True, rope_table_dtype=torch.float16)
    turns = torch.arange(2048).half().outer((10000 ** -torch.tensor([0.0])).half())
    cos, sin = rounded.stage.rotary(2048, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float16
    assert torch.equal(cos, turns.cos())
    assert torch.equal(sin, turns.sin())
    whole, _ = rounded(IDS)
    assert 0 < (whole - exact(IDS)).abs().max() < 0.1
    first, past = rounded(IDS[:, :3])
    rest, _ = rounded(IDS[:, 3:], layer_past=past)
    close(torch.cat([first, rest], dim=1), whole)
    with pytest.raises(UserError, match=r"^rope_table_dtype is torch.int8, expected [^\n]*$"):
        create(steps, rope_table_dtype=torch.int8)


def test_the_cache_of_all_layers_may_be_one_tensor(tmp_path):
    model = create(write_neox(tmp_path, neox()), use_cache=True)
    _, past = model(IDS[:, :3])
    apart, _ = model(IDS[:, 3:], layer_past=past)
    stacked, _ = model(IDS[:, 3:], layer_past=torch.stack(past))
    assert torch.equal(stacked, apart)


def test_float16_generates_on_the_cpu(tmp_path):
    steps = write_neox(tmp_path, neox().half())
    rows = minimal20b.greedy_generate(create(steps, use_cache=True, dtype=torch.float16), IDS, 12)
    assert [row[:7] for row in rows] == IDS.tolist()


def gptj():
    config = GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64, eos_token_id=0)
    torch.manual_seed(0)
    return randomised(GPTJForCausalLM(config))


@pytest.fixture(params=[neox, gptj, lambda: neox(tied=True)], ids=["neox", "gptj", "tied"])
def shards(request, tmp_path, tiny_tokenizer):
    """A model of transformers and the same as layer shards."""
    reference = request.param()
    reference.save_pretrained(tmp_path / "hf")
    return reference, prepare(str(tmp_path / "hf"), tmp_path / "prepared")


@torch.inference_mode()
def test_layer_shards(shards):
    reference, folder = shards
    same_logits(create(folder), reference)
    logits, past = create(folder, use_cache=True)(IDS)
    close(logits, reference(IDS).logits)
    assert [tuple(layer.shape) for layer in past] == [(2, 7, 2, 4, 8)] * reference.config.num_hidden_layers


@pytest.mark.parametrize("cuts", [[1] * 7, [3, 4], [4, 1, 2], [2, 2, 3]], ids=str)
@torch.inference_mode()
def test_the_cache_changes_nothing(shards, cuts):
    reference, folder = shards
    model, past, logits = create(folder, use_cache=True), None, []
    for piece in IDS.split(cuts, dim=1):
        some, past = model(piece, layer_past=past)
        logits.append(some)
    close(torch.cat(logits, dim=1), reference(IDS).logits)


@torch.inference_mode()
def test_a_mask_hides_tokens():
    for use_cache in (False, True):
        model = minimal20b.create_dummy_model(use_cache, "cpu")
        mask = minimal20b.generate_mask(7).repeat(2, 1, 1, 1)
        plain = model(IDS, mask)
        mask[0, :, 3:, :3] = False
        hidden = model(IDS, mask)
        plain, hidden = (plain[0], hidden[0]) if use_cache else (plain, hidden)
        close(hidden[1], plain[1])
        close(hidden[0, :3], plain[0, :3])
        assert not torch.allclose(hidden[0, 3:], plain[0, 3:])


def without_end(rows, prompt):
    """Rows of `generate()`, up to their end of text."""
    return [row[: row.index(0, prompt)] if 0 in row[prompt:] else row for row in rows.tolist()]


@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "cached"])
def test_greedy_generation_is_that_of_transformers(shards, use_cache):
    reference, folder = shards
    ours = minimal20b.greedy_generate(create(folder, use_cache=use_cache), IDS, 40, verbose=False)
    theirs = reference.generate(IDS, max_length=40, do_sample=False, pad_token_id=0, eos_token_id=0)
    assert ours == without_end(theirs, IDS.shape[1])


@pytest.mark.parametrize("use_cache", [False, True], ids=["plain", "cached"])
def test_end_of_text_ends_a_row_alone(use_cache):
    model = minimal20b.create_dummy_model(use_cache, "cpu")
    rows = minimal20b.greedy_generate(model, IDS, 20, verbose=False)
    assert [len(row) for row in rows] == [20, 20]
    end = rows[0][10]
    model.eos_ids = frozenset([end])
    stopped = minimal20b.greedy_generate(model, IDS, 20, verbose=False)
    for before, after in zip(rows, stopped, strict=True):
        assert after == before[: before.index(end, 7) if end in before[7:] else None]
    assert len(stopped[0]) <= 10


def test_text(tmp_path, tiny_tokenizer):
    folder = tmp_path / "model"
    write_neox(folder, neox())
    (folder / "20B_tokenizer.json").write_bytes((tiny_tokenizer / "tokenizer.json").read_bytes())
    tokenizer = minimal20b.create_tokenizer(folder)
    assert tokenizer.to_str() == minimal20b.create_tokenizer(folder / "20B_tokenizer.json").to_str()
    assert tokenizer.to_str() == minimal20b.create_tokenizer(folder / "global_step7").to_str()
    model = minimal20b.create_dummy_model(True, "cpu")
    model.stage.shards["head"].embed_out.weight[384:] = -100.0 * model.stage.shards["head"].embed_out.weight[0]
    said = minimal20b.greedy_generate_text(model, tokenizer, "The answer", 24, "cpu", False)
    rows = minimal20b.greedy_generate(model, torch.tensor([tokenizer.encode("The answer").ids]), 24)
    assert said == tokenizer.decode(rows[0])
    assert said.startswith("The answer")
    with pytest.raises(UserError, match=r"^text is empty; [^\n]*$"):
        minimal20b.greedy_generate_text(model, tokenizer, "", 24)


def refused(path, message):
    with pytest.raises(UserError) as caught:
        create(path)
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_missing_files(tmp_path):
    steps = write_neox(tmp_path, neox(), ranks=2)
    (steps / "layer_03-model_00-model_states.pt").unlink()
    refused(steps, r"layer_03-model_00-model_states\.pt is missing; shards up to 1")
    (steps / "layer_03-model_01-model_states.pt").unlink()
    refused(steps, r"layer_03-model_00-model_states\.pt is missing; .*tiny\.yml says 3 layers$")


def test_a_missing_rank_is_seen_in_the_shapes(tmp_path):
    steps = write_neox(tmp_path, neox(), ranks=2)
    for path in steps.glob("*-model_01-*"):
        path.unlink()
    refused(steps, "holds 1 shards a layer, its tensors were cut into 2;")


def test_mixed_numbers_of_shards(tmp_path):
    steps = write_neox(tmp_path / "two", neox(), ranks=2)
    four = write_neox(tmp_path / "four", neox(), ranks=4)
    for rank in range(4):
        name = f"layer_03-model_{rank:02}-model_states.pt"
        (steps / name).write_bytes((four / name).read_bytes())
    refused(steps, "holds 2 shards of layer 0 and 4 of layer 3;")


def test_files_of_different_cuts(tmp_path):
    steps = write_neox(tmp_path / "two", neox(), ranks=2)
    four = write_neox(tmp_path / "four", neox(), ranks=4)
    name = "layer_03-model_01-model_states.pt"
    (steps / name).write_bytes((four / name).read_bytes())
    refused(steps, f"{name} and layer_03-model_00.* hold different tensors")


def test_more_layers_than_the_yml_tells_of(tmp_path):
    steps = write_neox(tmp_path, neox(), ranks=1)
    yml = tmp_path / "configs" / "tiny.yml"
    yml.write_text(yml.read_text().replace('"num-layers": 3', '"num-layers": 2'))
    refused(steps, r"layer_07-model_00-model_states\.pt is one too many; .*tiny\.yml says 2 layers$")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("{", '{ "use_mup": true,', r"tiny\.yml: use_mup True: the kit has no such network$"),
        ('"rotary_pct": 0.25', '"rotary_pct": "many"', r"tiny\.yml: rotary_pct many: expected a number$"),
        ('bias-gelu-fusion": true', 'bias-gelu-fusion": 3', r"bias_gelu_fusion 3: expected true or false$"),
        ('"hidden-size": 32', '"hidden-size": 64', r"is 32 wide, .*tiny\.yml says 64$"),
        ('"num-attention-heads": 4,', "", r"tiny\.yml does not say num_attention_heads, a whole number of at least 1$"),
        ('"num-layers": 3', '"num-layers": "x"', r"tiny\.yml does not say num_layers, a whole number of at least 1$"),
        ("{", "{ [", r"^cannot read .*tiny\.yml"),
        ('"norm":', '"activation": "tanh", "norm":', r"tiny\.yml, read as .*hidden_act is 'tanh', expected one of"),
    ],
)
def test_settings_that_do_not_fit(tmp_path, before, after, message):
    steps = write_neox(tmp_path, neox())
    yml = tmp_path / "configs" / "tiny.yml"
    yml.write_text(yml.read_text().replace(before, after, 1))
    refused(steps, message)


def test_files_that_contradict_each_other_or_say_nothing(tmp_path):
    steps = write_neox(tmp_path, neox())
    (tmp_path / "configs" / "other.yml").write_text("num_layers: 44")
    refused(steps, r"tiny\.yml says num_layers: 3, another file beside it 44")
    (tmp_path / "configs" / "other.yml").write_text("- 1")
    refused(steps, r"other\.yml holds no settings")
    (tmp_path / "configs" / "other.yml").unlink()
    (tmp_path / "configs" / "tiny.yml").unlink()
    refused(steps, r"configs/\*\.yml is missing, and .* is not GPT-NeoX-20B;")


def test_the_published_model_needs_no_yml(tmp_path, monkeypatch):
    from openchatkit.formats import neox_saved_settings

    published = {**neox_saved_settings._PUBLISHED, "num_layers": LAYERS, "hidden_size": 32, "num_attention_heads": 4}
    monkeypatch.setattr(neox_saved_settings, "_PUBLISHED", published)
    reference = neox()
    steps = write_neox(tmp_path, reference)
    (tmp_path / "configs" / "tiny.yml").unlink()
    same_logits(create(steps), reference)


def test_a_tensor_too_few_and_one_too_many(tmp_path):
    steps = write_neox(tmp_path, neox(), ranks=1)
    path = steps / "layer_03-model_00-model_states.pt"
    tensors = torch.load(path)
    fewer = copy.copy(tensors)
    del fewer["attention.dense.bias"]
    torch.save(fewer, path)
    refused(steps, r"layer_03-.* lacks attention\.dense\.bias, unlike the network")
    torch.save({**tensors, "x.bias": torch.ones(2)}, path)
    refused(steps, r"layer_03-.* holds x\.bias, unlike the network")
    torch.save({**tensors, "mlp.dense_h_to_4h.bias": torch.ones(2)}, path)
    refused(steps, r"layer_03-.*: mlp\.dense_h_to_4h\.bias is \[2\], .* makes it \[64\]")


def test_wrong_folders(tmp_path):
    refused(tmp_path, "holds no model: neither GPT-NeoX's layer files")
    refused(tmp_path / "no", "holds no model")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt_neox"}))
    refused(tmp_path, "hidden_size is None")


def test_tokenizer_errors(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file; [^\n]*$"):
        minimal20b.create_tokenizer(tmp_path)
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(UserError, match=r"t\.json is not a tokenizer: [^\n]*$"):
        minimal20b.create_tokenizer(tmp_path / "t.json")


def test_generation_errors():
    model = minimal20b.create_dummy_model(device="cpu")
    with pytest.raises(UserError, match=r"^max_seq_len is 2049, this model reads at most 2048 tokens, [^\n]*$"):
        minimal20b.greedy_generate(model, IDS, 2049)
    with pytest.raises(UserError, match=r"^input_ids are \[2, 0\], expected [^\n]*$"):
        minimal20b.greedy_generate(model, IDS[:, :0], 20)
    with pytest.raises(UserError, match=r"^layer_past is given to a model without a cache; [^\n]*$"):
        model(IDS, layer_past=[torch.ones(1)])


def test_one_layer_at_a_time(tmp_path, monkeypatch):
    """When a layer is read, no earlier one is held but by the model."""
    import gc
    import weakref

    steps = write_neox(tmp_path, neox().half())
    held, most = [], []
    read = NeoXCheckpoint.read

    def counted(self, shard):
        gc.collect()
        most.append(sum(tensor() is not None for tensor in held))
        tensors = read(self, shard)
        held.extend(map(weakref.ref, tensors.values()))
        return tensors

    monkeypatch.setattr(NeoXCheckpoint, "read", counted)
    create(steps)
    assert most == [0] * (LAYERS + 2)


def test_the_example_of_the_docstring(tmp_path, monkeypatch, capsys, tiny_tokenizer):
    folder = tmp_path / "20B_checkpoints"
    write_neox(folder, neox()).rename(folder / "global_step150000")
    (folder / "20B_tokenizer.json").write_bytes((tiny_tokenizer / "tokenizer.json").read_bytes())
    monkeypatch.chdir(tmp_path)
    lines = [line[4:] for line in minimal20b.__doc__.splitlines() if line.startswith("    ")]
    assert len(lines) == 4
    exec("\n".join(lines).replace("max_seq_len=100", "max_seq_len=12"), {})
    assert capsys.readouterr().out
