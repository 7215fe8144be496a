"""Text generation in GPT-NeoX's three modes, held against transformers with the same weights."""

import io
import itertools
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from random_models import write_run
from test_minimal20b import neox, write_neox
from transformers import AutoModelForCausalLM, AutoTokenizer

from openchatkit.inference.engine.sampling import choose
from openchatkit.neox import generation

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 512}
PROMPTS = ["What does it say?", "The answer", "on and on " * 200]


@pytest.fixture
def run(random_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the checkpoints of a run, which is the current one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "checkpoints", random_models["neox"], 3, 20)
    return tmp_path


@pytest.fixture
def command(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command with settings and flags; returns (status, stdout, stderr)."""

    def command(*flags: object, **settings: Any) -> tuple[int, str, str]:
        path = write("c.json", {**MODEL, "load": "checkpoints", "maximum_tokens": 12} | settings)
        with pytest.raises(SystemExit) as ended:
            generation.main([str(path), *map(str, flags)])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return command


def oracle(folder: Path, prompt: str, *, tokens: int = 12) -> list[int]:
    """What transformers writes after a prompt, or after end-of-text."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer.encode(prompt) or [0]])
    options = {"do_sample": False, "max_new_tokens": tokens, "eos_token_id": 0, "pad_token_id": 1}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


def text_of(folder: Path, ids: list[int]) -> str:
    return AutoTokenizer.from_pretrained(folder).decode(ids)


def strange(ids: list[int], *, size: int = 298) -> str | None:
    """The message on tokens that the tokenizer does not have."""
    count = sum(token >= size for token in ids)
    return f"{count} of the tokens are not in the tokenizer, and are left out of the text" if count else None


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_samples_without_a_prompt(run, command, random_models):
    status, _, noted = command(num_samples=2)
    assert (status, noted.splitlines()[-1]) == (0, "2 of 2 texts, by checkpoints/checkpoint_20, are in samples.txt")
    first, second = read(run / "samples.txt")
    assert list(first) == ["context", "text", "length", "finished", "message", "duration_seconds"]
    seconds = first.pop("duration_seconds"), second.pop("duration_seconds")
    assert min(seconds) > 0
    ids = oracle(random_models["neox"], "")
    expected = {"text": text_of(random_models["neox"], ids), "message": strange(ids)}
    assert first == {"context": "", "length": 12, "finished": False, **expected}
    assert second == first
    # Draws follow the seed, and 2021's number of samples is 1.
    drawn = []
    for seed in (1, 1, 2):
        assert command("--num-samples", 3, "--seed", seed, "-o", "out/drawn.jsonl", temperature=1.0)[0] == 0
        drawn.append([line["text"] for line in read(run / "out" / "drawn.jsonl")])
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3
    assert command("-o", "one.jsonl", num_samples=0)[0] == 0
    assert len(read(run / "one.jsonl")) == 1


def test_prompts_of_a_file(run, command, random_models):
    (run / "prompts").write_text(f"{PROMPTS[0]} \n\n  {PROMPTS[1]}\n{PROMPTS[2]}\n", encoding="utf-8")
    for flags in (["-i", "prompts"], ["-i", "prompts", "--recompute", "true"], ["-i", "prompts", "--iteration", 3]):
        assert command(*flags)[0] == 0
        lines = read(run / "prompts.output.jsonl")
        assert [line["context"] for line in lines] == [PROMPTS[0], PROMPTS[1], PROMPTS[2].strip()]
        expected = [text_of(random_models["neox"], oracle(random_models["neox"], prompt)) for prompt in PROMPTS[:2]]
        assert [line["text"] for line in lines] == [*expected, None]
        assert re.match(r"the prompt has \d+ tokens, the model reads 512: shorten it$", lines[2]["message"])
        assert (lines[2]["length"], lines[2]["finished"]) == (0, False)
    # Another end of a prompt, and of a text: the model's positions.
    long = "on and on " * 165
    (run / "two").write_text(f"{long}\nEND {PROMPTS[0]}", encoding="utf-8")
    assert command("-i", "two", "-o", "two.jsonl", prompt_end="END", maximum_tokens=100)[0] == 0
    first, second = read(run / "two.jsonl")
    assert first["message"].startswith("the text met the end of the model's 512 positions")
    assert 0 < first["length"] < 100
    assert (first["finished"], second["context"], second["length"]) == (False, PROMPTS[0], 100)


def write_letters(path: Path, *, end: int = 0) -> dict[int, str]:
    """Write a tokenizer of 26 letters and two special tokens, of which `end` is end-of-text; return the letters."""
    free = [number for number in range(2, 29) if number != end]
    letters = {number: chr(97 + place) for place, number in enumerate(free[:26])}
    special = [(end, "<|endoftext|>"), (1, "<|padding|>")]
    options = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": number, "content": content, **options} for number, content in special]
    vocabulary = {content: number for number, content in [*special, *letters.items()]}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}), encoding="utf-8")
    return letters


def test_end_of_text_ends_a_text(run, command, tmp_path):
    """A tokenizer of which a token that the model would write is the end of a text."""
    reference = neox()
    reference.save_pretrained(tmp_path / "model")
    prompt = torch.tensor([[2, 3, 4]])
    ids = reference.generate(prompt, do_sample=False, max_new_tokens=12, eos_token_id=None)[0, 3:].tolist()
    place, end = next(
        (place, token) for place, token in enumerate(ids) if place and token > 4 and token not in ids[:place]
    )
    letters = write_letters(tmp_path / "model" / "tokenizer.json", end=end)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    write_run(tmp_path / "ended", tmp_path / "model", 5)
    (run / "prompts").write_text("abc", encoding="utf-8")
    status, _, noted = command("-i", "prompts", load="ended", num_layers=3, max_position_embeddings=64)
    assert status == 0, noted
    [line] = read(run / "prompts.output.jsonl")
    assert line["text"] == "".join(letters.get(token, "") for token in ids[:place])
    assert (line["length"], line["finished"], line["message"]) == (
        place,
        True,
        strange(ids[:place], size=max(end + 1, 28)),
    )


def test_a_prompt_of_several_lines_is_typed(run, command, random_models, monkeypatch):
    typed = f"{PROMPTS[1]}END\n{PROMPTS[0]}\nEND\n\nEND{PROMPTS[1]}"
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    status, printed, noted = command(text_gen_type="interactive", prompt_end="END")
    model = random_models["neox"]
    expected = [text_of(model, oracle(model, text)) for text in (PROMPTS[1], f"{PROMPTS[0]}\n", PROMPTS[1])]
    assert status == 0, noted
    # Neither control characters are shown nor a last character that is not whole.
    shown, whole = (re.sub(r"[^ -~\n]", "", text) for text in (printed, "".join(text + "\n" for text in expected)))
    assert shown == whole


def test_a_folder_of_gpt_neox(run, command, tmp_path, tiny_tokenizer, write):
    reference = neox()
    write_neox(tmp_path / "theirs", reference)
    shutil.copy(tiny_tokenizer / "tokenizer.json", tmp_path / "mine.json")
    sizes = {"num_layers": 3, "max_position_embeddings": 64}
    tokenizer = {"tokenizer_type": "HFTokenizer", "vocab_file": "mine.json"}
    status, _, noted = command(**sizes, **tokenizer, load="theirs")
    assert status == 2
    assert "has 298 tokens, the model 96: they do not belong together" in noted
    letters = write_letters(tmp_path / "mine.json")
    (run / "prompts").write_text("abc", encoding="utf-8")
    expected = reference.generate(torch.tensor([[2, 3, 4]]), do_sample=False, max_new_tokens=12, eos_token_id=0)[0, 3:]
    for iteration in (None, 7):
        flags = ["-i", "prompts"] if iteration is None else ["-i", "prompts", "--iteration", iteration]
        assert command(*flags, **sizes, **tokenizer, load="theirs")[0] == 0
        [line] = read(run / "prompts.output.jsonl")
        assert line["text"] == "".join(letters.get(token, "") for token in expected.tolist())
        assert line["message"] == strange(expected.tolist(), size=28)


SETTINGS = list(itertools.product((0.0, 0.5, 2.0), (0, 1, 3), (0.0, 0.25, 0.6, 1.0)))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_tokens_are_chosen_by_the_rule_of_gpt_neox(configure, temperature, top_k, top_p):
    """Among equal logits too, and where probabilities add up to `top_p` itself."""
    logits = torch.tensor([0.0, 0.0, 0.0, 0.0]).log_softmax(0) if top_p == 0.25 else torch.tensor([2.0, 1, 1, 0, -1])
    values = logits.double().tolist()
    if temperature == top_k == top_p == 0:
        allowed = {0}
    else:
        scaled = [value / (temperature or 1) for value in values]
        least = sorted(scaled)[-top_k] if top_k else min(scaled)
        weights = {place: 2.718281828459045**value for place, value in enumerate(scaled) if value >= least}
        allowed, total = set(), 0.0
        for place in sorted(weights, key=weights.__getitem__, reverse=True):
            if top_p and total > top_p + 1e-12:
                break
            allowed.add(place)
            total += weights[place] / sum(weights.values())
    config = configure(temperature=temperature, top_k=top_k, top_p=top_p)
    sampling, draws = generation.read_sampling(config), torch.Generator().manual_seed(0)
    drawn = {choose(logits, sampling, draws) for _ in range(2000)}
    if len(set(values)) == len(values) or top_k != 1:
        # Which of equal logits come first, where not all are kept, is left open.
        assert len(drawn) == len(allowed)
        assert sorted(values[place] for place in drawn) == sorted(values[place] for place in allowed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load": None}, "load is not given: name the folder of the checkpoints, as training's save does"),
        ({"load": "none"}, "c.json:1: load none: it is no folder: train first, or name the folder that training saved"),
        ({"load": "."}, "c.json:1: load .: it holds no checkpoint: train first, or name the folder"),
        ({"iteration": 7}, "c.json:1: iteration 7: checkpoints has no checkpoint of it: there are 3, 20"),
        ({"hidden_size": 64}, "c.json:1: hidden_size 64: the checkpoint in checkpoints has 32: give the configuration"),
        ({"text_gen_type": "precompute"}, "text_gen_type precompute: there is no store of logits: use unconditional"),
        ({"return_logits": True}, "return_logits True: logits are not written: openchatkit.minimal20b gives a model's"),
        ({"text_gen_type": "input-file"}, "sample_input_file is not given: name it, or pass -i FILE"),
        ({"sample_input_file": "none"}, "sample_input_file none cannot be read: No such file or directory"),
        ({"sample_input_file": "empty"}, r"sample_input_file empty holds no prompt: each ends with '\n'"),
        ({"sample_input_file": "empty", "prompt_end": ""}, "prompt_end : it is empty: expected what ends a prompt"),
        ({"sample_output_file": "empty/out"}, "cannot write empty/out: "),
        ({"sample_output_file": "checkpoints"}, "checkpoints is a folder: expected the name of a file to write"),
        ({"temperature": -1}, "temperature -1: expected a number of at least 0"),
        ({"top_p": 2}, "top_p 2: expected a number from 0 to 1; 0 keeps all tokens"),
        ({"top_k": -1}, "top_k -1: expected a whole number of at least 0; 0 keeps all tokens"),
        ({"maximum_tokens": 0}, "maximum_tokens 0: expected a whole number of at least 1"),
        ({"num_samples": -1}, "num_samples -1: expected a whole number of at least 1"),
        ({"mamba_use_bias_in_linears": True}, "another architecture, which the kit does not have"),
    ],
)
def test_mistakes_are_one_line(run, command, settings, message):
    (run / "empty").write_text(" \n\n", encoding="utf-8")
    status, printed, noted = command(**settings)
    assert (status, printed, noted.count("\n")) == (2, "", 1)
    assert message in noted
    assert not (run / "samples.txt").exists()


def test_what_came_before_ctrl_c_is_kept(run, command, monkeypatch):
    whole = generation.Generator.continue_text
    calls = itertools.count()

    def stop(self: generation.Generator, context: str, **options: Any) -> dict[str, Any]:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, context, **options)

    monkeypatch.setattr(generation.Generator, "continue_text", stop)
    status, _, noted = command(num_samples=5)
    assert (status, noted.splitlines()) == (
        130,
        ["2 of 5 texts, by checkpoints/checkpoint_20, are in samples.txt", "interrupted"],
    )
    assert len(read(run / "samples.txt")) == 2
