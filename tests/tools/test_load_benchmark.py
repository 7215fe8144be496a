"""The load benchmark on small models on the CPU: its keys, what its numbers are, and its one-line errors."""

import json
import sys

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit.tools import load_benchmark

KEYS = [
    "tokenizer_download_sec",
    "tokenizer_load_sec",
    "model_download_sec",
    "model_load_to_ram_sec",
    "model_main_memory_MB",
    "model_transfer_to_gpu_sec",
    "model_gpu_memory_MB",
    "inference_sec",
    "inference_warm_sec",
    "total_sec",
]


@pytest.fixture
def command(tmp_path, capsys):
    """Run the command on some models; returns (status, stdout, stderr, results)."""

    def run(models, *flags):
        given, out = tmp_path / "models.json", tmp_path / "made" / "out.json"
        given.write_text(models if isinstance(models, str) else json.dumps(models))
        with pytest.raises(SystemExit) as ended:
            load_benchmark.main(["-i", str(given), "-o", str(out), "-d", "cpu", *flags])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err, json.loads(out.read_text()) if out.exists() else None

    return run


@pytest.fixture
def quick_command(command, quick_python, monkeypatch):
    """The same, with a process of each model that has imported all beforehand."""
    monkeypatch.setattr(sys, "executable", str(quick_python))
    return command


@pytest.fixture(scope="module")
def large(tiny_tokenizer, tmp_path_factory):
    """A model of about 100 MB, much more than what a process's memory varies by."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2, "num_attention_heads": 8}
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=384, **sizes)).to(torch.float32).save_pretrained(folder)
    for file in tiny_tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_every_model_has_every_number_and_its_own_memory(command, large, random_models):
    models = {"large": str(large), "small": str(random_models["neox"]), "again": str(large)}
    status, printed, noted, results = command(models, "-r", "3")
    assert (status, noted) == (0, "")
    assert list(results) == list(models)
    for name, numbers in results.items():
        assert list(numbers) == KEYS
        assert all(isinstance(number, float | int) and number >= 0 for number in numbers.values()), numbers
        assert numbers["model_transfer_to_gpu_sec"] == numbers["model_gpu_memory_MB"] == 0
        parts = sum(numbers[key] for key in KEYS if key.endswith("_sec") and key not in ("total_sec", KEYS[-2]))
        assert numbers["total_sec"] >= parts + 3 * numbers["inference_warm_sec"]
        assert name in printed
    size = sum(file.stat().st_size for file in large.glob("*.safetensors")) / (1 << 20)
    for name in ("large", "again"):
        assert size * 0.9 < results[name]["model_main_memory_MB"] < size * 1.6
    assert results["small"]["model_main_memory_MB"] < size / 2


@pytest.mark.parametrize(
    ("models", "flags", "expected"),
    [
        ({"gone": "/no/such/model"}, (), "gone: /no/such/model: no such folder"),
        ({"gone": "{folder}"}, (), "gone: "),
        ({"gone": "x"}, ("-d", "toaster"), "--device toaster cannot be used here (pass -d cpu?)"),
        ({"gone": "x"}, ("-d", "meta"), "--device meta cannot be used here (pass -d cpu?)"),
        ({"gone": "x"}, ("-r", "many"), "expected a whole number of at least 1, got 'many'"),
        ({"gone": "x"}, ("-r", "0"), "expected a whole number of at least 1, got '0'"),
        ({"gone": "x"}, ("-o", "{folder}"), "is a folder"),
        ({"gone": "x"}, ("-i", "/no/models.json"), "--input /no/models.json cannot be read: No such file"),
        ({}, (), "expected an object of models"),
        ({"gone": 3}, (), "expected an object of models"),
        ("[", (), "is not JSON"),
    ],
)
def test_mistakes_are_one_line(models, flags, expected, quick_command, tmp_path):
    models = (
        {key: str(tmp_path) if value == "{folder}" else value for key, value in models.items()}
        if isinstance(models, dict)
        else models
    )
    status, printed, noted, results = quick_command(
        models, *(str(tmp_path) if flag == "{folder}" else flag for flag in flags)
    )
    assert (status, printed, results) == (2, "", None)
    assert len(noted.splitlines()) == 1
    assert expected in noted


def test_a_file_that_cannot_be_written_is_one_line(quick_command, random_models, tmp_path):
    (tmp_path / "file").touch()
    status, _, noted, _ = quick_command(
        {"small": str(random_models["neox"])}, "-o", str(tmp_path / "file" / "results.json")
    )
    assert (status, len(noted.splitlines())) == (2, 1)
    assert "results.json cannot be written: " in noted


def test_a_missing_model_does_not_cost_the_others_their_results(quick_command, random_models):
    status, _, noted, results = quick_command(
        {"small": str(random_models["neox"]), "gone": "/no/such/model"}, "-r", "1"
    )
    assert (status, list(results)) == (2, ["small"])
    assert "gone: /no/such/model: no such folder" in noted
