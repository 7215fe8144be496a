"""The evaluation command on a small model in its three forms, with tasks over local files, held against transformers.

Everything here runs with the network shut: a connection that is tried fails the test.
"""

import functools
import json
import math
import shutil
import socket
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTJConfig, GPTJForCausalLM, GPTNeoXConfig
from transformers import GPTNeoXForCausalLM as NeoX

from openchatkit.convert.from_hf import prepare
from openchatkit.convert.to_hf import convert
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint
from openchatkit.formats.layer_shards import LayerShards
from openchatkit.tools.evaluation import harness

lm_eval = pytest.importorskip("lm_eval")
TaskManager = pytest.importorskip("lm_eval.tasks").TaskManager

SIZES = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
NEOX = {**SIZES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
MODELS = {
    "neox": lambda: NeoX(GPTNeoXConfig(**NEOX, max_position_embeddings=64)),
    "tied": lambda: NeoX(GPTNeoXConfig(**NEOX, max_position_embeddings=64, tie_word_embeddings=True)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**SIZES, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4)),
}
QUESTIONS = [
    {"question": "What does it say?", "choices": ["The answer", "one goes on and on"], "gold": 0},
    {"question": "The answer is", "choices": ["this", "that this one goes on"], "gold": 1},
    {"question": "", "choices": ["on", "What"], "gold": 0},
    {"question": "Goes on " * 40, "choices": ["and on", "The"], "gold": 1},
    {"question": "What is it", "choices": ["goes", "say?"], "gold": 1},
]
# The second is longer than the models' 64 tokens, so it is read in windows.
TEXTS = ["The answer is that this one goes on.", " ".join(["What does it say?"] * 30), "bot: on and on"]
CHOICE = """
task: own_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.0}}
"""
PERPLEXITY = """
task: own_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1.0}}
"""
GENERATION = """
task: own_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "say: {{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n", "e"], max_gen_toks: 12, do_sample: {sample}}}
process_results: !function kept.keep
metric_list: [{{metric: length, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
KEPT = """
import json


def keep(doc, results):
    with open({target!r}, "a") as file:
        file.write(json.dumps(results[0]) + "\\n")
    return {{"length": len(results[0])}}
"""


@pytest.fixture(scope="module")
def forms(tmp_path_factory, tiny_tokenizer):
    """{family: {form: folder}} of the same weights, the converted folder coming from the checkpoint."""
    root = tmp_path_factory.mktemp("forms")
    made = {}
    for name, make in MODELS.items():
        torch.manual_seed(0)
        source = root / "base" / name
        make().save_pretrained(source)
        shutil.copytree(tiny_tokenizer, source, dirs_exist_ok=True)
        shards = LayerShards.open(prepare(str(source), root / "prepared"))
        temporary = checkpoint.begin(root / name, 7)
        records = [checkpoint.write_weights(temporary, shard, shards.read(shard)) for shard in shards.shards]
        layout = {"step": 7, "layout": {"stages": 1, "layers_per_stage": 2, "replicas": 1}}
        options = {"state": layout, "records": records, "raw_config": shards.raw_config}
        checkpoint.finish(temporary, root / name, 7, tokenizer_from=shards.path, **options)
        made[name] = {
            "shards": shards.path,
            "checkpoint": root / name,
            "converted": convert(root / name, root / "converted" / name),
        }
    return made


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of task files over local records."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, rows in (("questions", QUESTIONS), ("texts", [{"text": text} for text in TEXTS])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(CHOICE.format(folder=folder))
    (folder / "perplexity.yaml").write_text(PERPLEXITY.format(folder=folder))
    (folder / "generation.yaml").write_text(GENERATION.format(folder=folder, sample="false"))
    longer = GENERATION.format(folder=folder, sample="false").replace("own_generation", "own_longer")
    (folder / "longer.yaml").write_text(longer.replace("max_gen_toks: 12", "max_gen_toks: 100"))
    sampled = GENERATION.format(folder=folder, sample="true").replace("own_generation", "own_sampled")
    (folder / "sampled.yaml").write_text(sampled)
    (folder / "kept.py").write_text(KEPT.format(target=str(folder / "kept.jsonl")))
    return folder


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("the network is shut in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert not tried, tried


@pytest.fixture(autouse=True)
def own_tasks_alone(request, monkeypatch):
    """lm-eval takes seconds to read the thousands of task files that it brings along; one test has them."""
    if "with_all_tasks" not in request.node.name:
        monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))


@pytest.fixture
def command(tasks, capsys):
    """Run the command; returns (status, stdout, stderr)."""

    def run(*flags):
        with pytest.raises(SystemExit) as ended:
            harness.main([str(flag) for flag in (*flags, "--include-path", tasks, "--device", "cpu")])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def loglikelihood(model, tokenizer, context, text):
    """By hand: the sum over the tokens of `text`, of the last 64 tokens that the model can see."""
    before = tokenizer.encode(context) or [tokenizer.bos_token_id]
    after = tokenizer.encode(context + text)[len(tokenizer.encode(context)) :]
    ids = torch.tensor((before + after)[-65:])
    with torch.no_grad():
        chances = model(ids[None, :-1]).logits[0].log_softmax(-1)
    return sum(chances[len(ids) - 1 - len(after) + i, token].item() for i, token in enumerate(after))


def by_hand(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = []
    for row in QUESTIONS:
        values = [loglikelihood(model, tokenizer, row["question"], " " + choice) for choice in row["choices"]]
        right.append(values.index(max(values)) == row["gold"])
    total = 0.0
    for text in TEXTS:
        ids = tokenizer.encode(text)
        for first in range(0, len(ids), 64):
            window = ids[first : first + 64]
            # The last window is filled up with what comes before it.
            before = ids[first - (65 - len(window)) : first] if first else [tokenizer.bos_token_id]
            seen = torch.tensor(before + window)
            with torch.no_grad():
                chances = model(seen[None, :-1]).logits[0].log_softmax(-1)
            total += chances.gather(1, seen[1:, None])[-len(window) :].sum().item()
    words = sum(len(text.split()) for text in TEXTS)
    return sum(right) / len(right), total / words


@pytest.mark.parametrize("family", MODELS)
def test_the_three_forms_agree_with_each_other_and_with_transformers(family, forms, tasks, command, tmp_path):
    found = {}
    for form, folder in forms[family].items():
        output = tmp_path / "new" / f"{form}.json"
        flags = ("--tasks", "own_choice,own_perplexity", "--batch-size", 3, "--output", output)
        status, printed, noted = command("--model", folder, *flags)
        assert (status, noted) == (0, "")
        assert "own_choice" in printed
        assert "word_perplexity" in printed
        found[form] = json.loads(output.read_text())["results"]
    accuracy, per_word = by_hand(forms[family]["converted"])
    for form, results in found.items():
        assert results["own_choice"]["acc,none"] == accuracy, form
        assert math.log(results["own_perplexity"]["word_perplexity,none"]) == pytest.approx(-per_word, rel=1e-5), form
        for metric in ("acc_norm,none", "acc_stderr,none"):
            assert results["own_choice"][metric] == found["converted"]["own_choice"][metric]


@pytest.mark.parametrize("family", ["neox", "gptj"])
def test_greedy_answers_are_those_of_the_converted_model(family, forms, tasks, command):
    said = []
    for form in ("shards", "converted"):
        (tasks / "kept.jsonl").unlink(missing_ok=True)
        status, _, noted = command("--model", forms[family][form], "--tasks", "own_generation", "--batch-size", 1)
        assert (status, noted) == (0, "")
        said.append((tasks / "kept.jsonl").read_text().splitlines())
    assert said[0] == said[1]
    assert len(said[0]) == len(QUESTIONS)
    assert any(json.loads(line) for line in said[0])


def test_batches_do_not_change_the_figures(forms, command, tmp_path):
    found = []
    for size in (1, 64):
        flags = ("--tasks", "own_*", "--batch-size", size, "--output", tmp_path / "out.json", "--limit", 3)
        model = forms["neox"]["shards"]
        status, _, noted = command("--model", model, *flags[:1], "own_choice,own_per*,own_generation", *flags[2:])
        assert (status, noted) == (0, "")
        found.append(json.loads((tmp_path / "out.json").read_text()))
    for task, entry in found[0]["results"].items():
        for key, value in entry.items():
            assert found[1]["results"][task][key] == (pytest.approx(value) if isinstance(value, float) else value)
    assert found[0]["n-samples"]["own_choice"]["effective"] == 3
    assert found[0]["kind"] == "layer shards"


def test_few_shots_come_before_the_question(forms, command, tmp_path):
    flags = ("--tasks", "own_choice", "--num-fewshot", 2, "--output", tmp_path / "out.json")
    assert command("--model", forms["neox"]["checkpoint"] / "checkpoint_7", *flags)[0] == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["n-shot"]["own_choice"] == 2
    assert written["kind"] == "training checkpoint"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--tasks", "own_choise"), "unknown task 'own_choise': did you mean own_choice"),
        (("--tasks", ","), "--tasks names none"),
        (("--tasks", "own_choice", "--include-path", "/nowhere"), "--include-path /nowhere is not a folder"),
        (("--tasks", "own_choice", "--model", "/no/model"), "/no/model: no such folder"),
        (("--tasks", "own_choice", "--model", "{tasks}"), "holds no model: neither GPT-NeoX"),
        (("--tasks", "own_choice", "--tokenizer", "{tasks}"), "holds no tokenizer: pass --tokenizer"),
        (("--tasks", "own_choice", "--device", "cuda:99"), "--device cuda:99: there is no such device here"),
        (("--tasks", "own_choice", "--device", "toaster"), "--device toaster: there is no such device here"),
        (("--tasks", "own_choice", "--batch-size", "0"), "expected a whole number of at least 1"),
        (("--tasks", "own_choice", "--output", "{tasks}"), "is a folder"),
        (("--tasks", "own_sampled"), "a task samples its answers"),
        (("--tasks", "own_longer"), "a task generates 100 tokens, the model's context is 64"),
        (("--tasks", "own_longer", "--model", "{converted}"), "lm-eval cannot put these tasks to this model"),
        (("--tasks", "own_choice", "--num-fewshot", "9"), "lm-eval cannot put these tasks to this model"),
        (("--tasks", "own_choice", "--tokenizer", "{large}"), "has 600 tokens, the model 400"),
        (("--tasks", "own_choice", "--model", "{original}"), "is a checkpoint of the original kit"),
        (("--tasks", "own_choice", "--model", "{tasks}/checkpoint_9"), "holds no checkpoint: found no such folder"),
    ],
)
def test_mistakes_are_one_line(flags, expected, forms, tasks, tiny_tokenizer, capsys, tmp_path):
    places = {"tasks": tasks, "large": tmp_path / "large", "original": tmp_path / "old"}
    larger = AutoTokenizer.from_pretrained(tiny_tokenizer)
    larger.add_tokens([f"<{number}>" for number in range(600 - len(larger))])
    larger.save_pretrained(places["large"])
    places["original"].mkdir()
    (places["original"] / "prank_0_checkpoint.pt").touch()
    given = [flag.format(**places, converted=forms["neox"]["converted"]) for flag in flags]
    defaults = {"--model": forms["neox"]["shards"], "--device": "cpu", "--include-path": tasks}
    rest = [str(part) for pair in defaults.items() if pair[0] not in given for part in pair]
    with pytest.raises(SystemExit) as ended:
        harness.main([*given, *rest])
    said = capsys.readouterr()
    assert ended.value.code == 2
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert expected in said.err


def test_a_text_that_a_task_cannot_make_ends_no_training(tasks, tiny_tokenizer, tmp_path):
    later = "{{{{ question if gold == 0 else nothing.here }}}}"  # lm-eval tries the first record when it loads a task
    task = CHOICE.replace("{{{{question}}}}", later).format(folder=tasks)
    (tmp_path / "choice.yaml").write_text(task.replace("own_choice", "own_unmade"))
    put = harness.load_evaluation(["own_unmade"], tiny_tokenizer, include_paths=[tmp_path])
    with pytest.raises(UserError, match=r"lm-eval cannot put these tasks .*UndefinedError: 'nothing' is undefined"):
        put(None)  # no model is asked before all texts are there


@pytest.mark.parametrize("form", ["shards", "checkpoint", "converted"])
def test_a_damaged_model_is_refused(form, forms, command, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(forms["neox"][form], copy)
    damaged = next(copy.rglob("layer_00001.safetensors"), None) or next(copy.glob("*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data = data[:-8] if form == "converted" else data[:-1] + bytes([data[-1] ^ 1])
    damaged.write_bytes(data)
    status, printed, noted = command("--model", copy, "--tasks", "own_choice")
    assert (status, printed, len(noted.splitlines())) == (2, "", 1)
    assert str(copy) in noted


@pytest.mark.long  # lm-eval reads all its task files; above, the same with few tasks
def test_a_misspelt_task_is_answered_with_similar_names_with_all_tasks(forms, command):
    status, _, noted = command("--model", forms["neox"]["shards"], "--tasks", "piqa,lambada_opena")
    assert (status, len(noted.splitlines())) == (2, 1)
    assert "unknown task 'lambada_opena': did you mean lambada_openai" in noted


def test_missing_data_of_a_task_is_one_line(forms, tasks, command):
    (tasks / "broken.yaml").write_text(CHOICE.format(folder="/nowhere").replace("own_choice", "broken"))
    status, _, noted = command("--model", forms["neox"]["shards"], "--tasks", "broken")
    (tasks / "broken.yaml").unlink()
    assert (status, len(noted.splitlines())) == (2, 1)
    assert "task broken cannot be loaded" in noted


@pytest.mark.parametrize("package", ["lm_eval", "accelerate"])
def test_without_the_package_the_command_says_what_to_install(package, forms, command, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    status, _, noted = command("--model", forms["neox"]["shards"], "--tasks", "own_choice")
    assert (status, len(noted.splitlines())) == (2, 1)
    assert package in noted
    assert "pip install 'openchatkit[eval]'" in noted
