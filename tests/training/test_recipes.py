"""The recipes as a shell runs them, with a stand-in for Python that prints its arguments; and the README's flags."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from openchatkit.paths import ROOT
from openchatkit.settings import update_table
from openchatkit.training import config

OWN_FLAGS = ("--config", "--overrides")  # of the parser, in no table of settings
RECIPES = sorted(path.name for path in (ROOT / "training").glob("finetune_*.sh"))


@pytest.fixture
def given(tmp_path):
    """Run a recipe in a checkout of its own, from another folder: (launcher's flags, trainer's arguments)."""
    root = tmp_path / "a checkout"
    (root / "training").mkdir(parents=True)
    (root / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "environment.sh", root / "tools")
    shutil.copy(ROOT / "training" / "_recipe.sh", root / "training")
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)

    def run(recipe: str, *arguments: str, **environment: str) -> tuple[list[str], list[str]]:
        shutil.copy(ROOT / "training" / recipe, root / "training")
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FINETUNE_")}
        result = subprocess.run(
            ["bash", str(root / "training" / recipe), *arguments],
            cwd="/",
            capture_output=True,
            text=True,
            env={**inherited, "PYTHON": str(python), **environment},
        )
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert lines[0] == str(root / "training" / "launch.py")
        script = lines.index(str(root / "training" / "dist_clm_train.py"))
        return lines[1:script], lines[script + 1 :]

    return run


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_trainer_accepts_every_recipe(given, recipe):
    launcher_flags, arguments = given(recipe)
    settings = config.parse([*arguments, "--rank", "0", "--cuda-id", "0", *launcher_flags])
    assert launcher_flags == ["--world-size", str(settings.pipeline_group_size * settings.data_group_size)]
    assert not settings.ignored
    assert settings.pp_mode == "1f1b"


def sources(settings: config.Settings) -> dict[str, float]:
    pairs = [source.rsplit(":", 1) for source in settings.task_name.split(",")]
    return {Path(name).name: float(weight) for name, weight in pairs}


@pytest.mark.parametrize(
    ("recipe", "model_name", "expected"),
    [
        (
            "finetune_GPT-NeoXT-Chat-Base-20B.sh",
            "GPT-Neo-XT-Chat-Base-20B",
            {"lr": 1e-6, "batch_size": 64, "num_layers": 6, "embedding_dim": 6144, "pipeline_group_size": 8},
        ),
        (
            "finetune_Pythia-Chat-Base-7B.sh",
            "Pythia-Chat-Base-7B",
            {"lr": 1e-5, "batch_size": 32, "num_layers": 8, "embedding_dim": 4096, "pipeline_group_size": 4},
        ),
    ],
)
def test_the_original_recipes_keep_its_hyper_parameters(given, recipe, model_name, expected):
    _, arguments = given(recipe)
    settings = config.parse(arguments)
    assert {key: getattr(settings, key) for key in expected} == expected
    assert (settings.total_steps, settings.checkpoint_steps, settings.warmup_steps) == (20000, 100, 10)
    assert (settings.seq_length, settings.micro_batch_size, settings.gradient_accumulate_step) == (2048, 1, 1)
    assert (settings.optimizer, settings.fp16, settings.seed, settings.loss_on) == ("adam", True, 42, "all")
    assert settings.checkpoint_path.parts[-2:] == ("model_ckpts", model_name)
    weights = sources(settings)
    assert len(weights) == 26
    assert weights["unified_p3.jsonl"] == 0.5
    assert sum(weights.values()) == pytest.approx(1.84)


@pytest.mark.parametrize("recipe", ["finetune_GPT-JT-Moderation-6B.sh", "finetune_Pythia-Moderation-1.4B.sh"])
def test_moderation_recipes_train_on_labels_as_the_published_model_was(given, recipe):
    _, arguments = given(recipe)
    settings = config.parse(arguments)
    assert settings.batch_size * settings.data_group_size * settings.gradient_accumulate_step == 64
    assert (settings.lr, settings.warmup_steps) == (1e-5, 100)
    assert (settings.packing, settings.loss_on) == ("documents", "responses")
    assert sources(settings) == {"prosocial_plus_regular.jsonl": 1}


def test_the_environment_and_further_arguments_win(given):
    _, arguments = given(
        "finetune_Pythia-1.4B.sh",
        "--lr",
        "3e-5",
        FINETUNE_TOTAL_STEPS="7",
        FINETUNE_CHECKPOINT_STEPS="3",
        FINETUNE_CHECKPOINT_PATH="else where",
        FINETUNE_DATA="mine.jsonl:1",
    )
    settings = config.parse(arguments)
    assert (settings.total_steps, settings.checkpoint_steps, settings.lr) == (7, 3, 3e-5)
    assert (settings.checkpoint_path, settings.task_name) == (Path("else where"), "mine.jsonl:1")


def test_a_file_wins_over_the_recipe_and_further_arguments_over_the_file(given, tmp_path):
    path = tmp_path / "run.yml"
    path.write_text("lr: 3e-5\nseed: 7\nbf16: true\nnepochs: 2\ntask_name: [a.jsonl:1, b.jsonl:2]\n", encoding="utf-8")
    _, arguments = given("finetune_Pythia-Chat-Base-7B.sh", "--config", str(path), "--seed", "9")
    settings = config.parse(arguments)
    assert (settings.lr, settings.seed, settings.task_name) == (3e-5, 9, "a.jsonl:1,b.jsonl:2")
    # Of --fp16 and --total-steps, which the recipe gives, the file says something else in other words.
    assert (settings.precision, settings.fp16, settings.nepochs, settings.total_steps) == ("bfloat16", False, 2, None)
    assert (settings.batch_size, settings.pipeline_group_size) == (32, 4)


def test_the_readme_has_every_flag_and_recipe():
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    assert update_table(text, config.Settings) == text, "python -m openchatkit.training.config writes the table"
    shown = [line.split()[0] for line in config.build_parser().format_help().splitlines() if line.startswith("  --")]
    assert re.findall(r"(?m)^\| `(--\S+)` \|", text) == [flag for flag in shown if flag not in OWN_FLAGS]
    assert set(re.findall(r"`(finetune_\S+\.sh)`", text)) == set(RECIPES)
