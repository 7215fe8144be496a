"""The scripts that users start: short, quick to explain themselves, one line for what they refuse."""

import subprocess
import sys

import pytest

from openchatkit.paths import ROOT

PREPARE = {
    "GPT-NeoX-20B": "EleutherAI/gpt-neox-20b",
    "Pythia-6.9B-deduped": "EleutherAI/pythia-6.9b-deduped",
    "RedPajama-3B": "togethercomputer/RedPajama-INCITE-Base-3B-v1",
    "GPT-J-6B": "EleutherAI/gpt-j-6b",
}
FROM_HF = {"gptneox": "EleutherAI/gpt-neox-20b", "gptj": "EleutherAI/gpt-j-6b"}
SCRIPTS = [
    *(f"pretrained/{name}/prepare.py" for name in PREPARE),
    *(f"tools/convert_{way}_hf_{name}.py" for way in ("from", "to") for name in FROM_HF),
]


def start(script, *arguments):
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    run = start(script, "--help")
    assert run.returncode == 0
    text = " ".join(run.stdout.split())
    if "to_hf" in script:
        assert all(flag in text for flag in ("--config-name", "--ckpt-path", "--save-path", "--n-stages", "--fp16"))
    else:
        name = PREPARE.get(script.split("/")[1]) or FROM_HF[script.split("_")[-1].removesuffix(".py")]
        assert f"(default: {name})" in text
        assert all(flag in text for flag in ("--save-dir", "--dtype", "--offload-dir"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_short(script):
    assert len((ROOT / script).read_text().splitlines()) <= 20


def test_the_stage_defaults_are_the_original_s():
    neox, gptj = (" ".join(start(f"tools/convert_to_hf_{name}.py", "--help").stdout.split()) for name in FROM_HF)
    assert "the original's EleutherAI/gpt-neox-20b" in neox
    assert "the original's 8" in neox
    assert "the original's 6" in neox
    assert "the original's EleutherAI/gpt-j-6b" in gptj
    assert "the original's 2" in gptj
    assert "the original's 14" in gptj


def test_prepare_saves_beside_itself():
    assert f"(default: {ROOT}/pretrained/GPT-J-6B)" in " ".join(
        start("pretrained/GPT-J-6B/prepare.py", "--help").stdout.split()
    )


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model-name", "./nowhere"], "./nowhere: no such folder; pass a folder or a hub name such as EleutherAI/"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--model", "x"], "unrecognized arguments: --model x (see prepare.py --help)"),
    ],
)
def test_what_is_refused_is_one_line(arguments, line):
    run = start("pretrained/GPT-NeoX-20B/prepare.py", *arguments)
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.startswith("error: ")
    assert line in run.stderr
    assert run.stderr.count("\n") == 1


def test_both_halves_at_once():
    run = start("tools/convert_to_hf_gptneox.py", "--ckpt-path", "a", "--save-path", "b", "--fp16", "--bf16")
    assert run.returncode == 2
    assert "--bf16: not allowed with argument --fp16" in run.stderr
