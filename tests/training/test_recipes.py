"""The recipes as a shell runs them: with a stand-in for Python that prints its arguments, and with all their ranks on
small models; and the README's flags."""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
from transformers import GPTJConfig, GPTJForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from openchatkit.convert.from_hf import prepare
from openchatkit.formats import checkpoint, metrics
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
    settings = config.parse([*arguments, "--rank", "0", "--cuda-id", "0", *launcher_flags[:2]])
    groups = (settings.pipeline_group_size, settings.data_group_size, settings.tensor_group_size)
    assert launcher_flags == ["--world-size", str(math.prod(groups)), "--max-restarts", "3"]
    assert not settings.ignored
    # GPipe, which is the flag's default, holds all micro-batches at a time.
    assert settings.pipeline_group_size == 1 or settings.pp_mode in ("1f1b", "interleaved")
    # Sharing among replicas costs no bits.
    assert settings.data_group_size == 1 or settings.dp_mode == "sharded"


def sources(settings: config.Settings) -> dict[str, float]:
    pairs = [source.rsplit(":", 1) for source in settings.task_name.split(",")]
    return {Path(name).name: float(weight) for name, weight in pairs}


@pytest.mark.parametrize(
    ("recipe", "model_name", "rows", "expected"),
    [
        ("finetune_GPT-NeoXT-Chat-Base-20B.sh", "GPT-Neo-XT-Chat-Base-20B", 64, {"lr": 1e-6, "embedding_dim": 6144}),
        ("finetune_Pythia-Chat-Base-7B.sh", "Pythia-Chat-Base-7B", 64, {"lr": 1e-5, "embedding_dim": 4096}),
    ],
)
def test_the_original_recipes_keep_its_hyper_parameters(given, recipe, model_name, rows, expected):
    _, arguments = given(recipe)
    settings = config.parse(arguments)
    assert {key: getattr(settings, key) for key in expected} == expected
    assert (settings.total_steps, settings.checkpoint_steps, settings.warmup_steps) == (20000, 100, 10)
    assert (settings.seq_length, settings.micro_batch_size) == (2048, 1)
    assert count_rows(settings) == rows
    assert (settings.optimizer, settings.fp16, settings.seed, settings.loss_on) == ("adam", True, 42, "all")
    assert settings.checkpoint_path.parts[-2:] == ("model_ckpts", model_name)
    weights = sources(settings)
    assert len(weights) == 26
    assert weights["unified_p3.jsonl"] == 0.5
    assert sum(weights.values()) == pytest.approx(1.84)


def count_rows(settings: config.Settings) -> int:
    """Return the rows of a step."""
    return settings.batch_size * settings.gradient_accumulate_step * settings.data_group_size


@pytest.mark.parametrize(
    ("recipe", "rows", "warmup_steps"),
    [
        ("finetune_GPT-J-6B.sh", 64, 10),
        ("finetune_RedPajama-INCITE-Chat-3B.sh", 32, 0),
        ("finetune_RedPajama-INCITE-7B-Chat.sh", 32, 0),
    ],
)
def test_other_models_of_the_original_train_as_it_did(given, recipe, rows, warmup_steps):
    _, arguments = given(recipe)
    settings = config.parse(arguments)
    assert (count_rows(settings), settings.lr, settings.warmup_steps) == (rows, 1e-5, warmup_steps)
    assert (settings.seq_length, settings.seed, settings.loss_on) == (2048, 42, "all")


@pytest.mark.parametrize("recipe", ["finetune_GPT-JT-Moderation-6B.sh", "finetune_Pythia-Moderation-1.4B.sh"])
def test_moderation_recipes_train_on_labels_as_the_published_model_was(given, recipe):
    _, arguments = given(recipe)
    settings = config.parse(arguments)
    assert count_rows(settings) == 64
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


@pytest.fixture(scope="module")
def small_models(tmp_path_factory, tiny_tokenizer) -> dict[str, Path]:
    """Layer shards of a model of 8 layers of each family: enough for 4 ranks of 2 stages."""
    folder = tmp_path_factory.mktemp("small_models")
    neox = GPTNeoXConfig(
        vocab_size=400,
        hidden_size=32,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        use_parallel_residual=False,
    )
    gptj = GPTJConfig(vocab_size=400, n_embd=32, n_layer=8, n_head=4, n_positions=64, rotary_dim=4)
    models = {"gptneox": GPTNeoXForCausalLM(neox), "gptj": GPTJForCausalLM(gptj)}
    prepared = {}
    for name, model in models.items():
        model.save_pretrained(folder / "hf" / name)
        shutil.copytree(tiny_tokenizer, folder / "hf" / name, dirs_exist_ok=True)
        prepared[name] = prepare(str(folder / "hf" / name), folder)
    return prepared


@pytest.mark.long  # up to eight ranks
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_a_small_model_with_all_its_ranks(given, small_models, chats, tmp_path, recipe):
    """The recipe's own layout, batches, optimizer and precision; the model, its width and the rows are smaller."""
    launcher_flags, arguments = given(recipe)
    settings = config.parse([*arguments, "--rank", "0", "--cuda-id", "0", *launcher_flags[:2]])
    change = {
        "model_name": small_models[settings.model_type],
        "num_layers": 0,
        "embedding_dim": 32,
        "seq_length": 32,
        "use_cuda": "false",
        "lr": 1e-3,
        "data_cache": tmp_path / "cache",
        "dist_url": f"tcp://127.0.0.1:{ranks.free_port()}",
    }
    result = subprocess.run(
        ["bash", str(ROOT / "training" / recipe), *ranks.to_argv(change)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OPENCHATKIT_VENV": sys.prefix,  # the Python of the tests, whichever else there are
            "FINETUNE_DATA": str(chats),
            "FINETUNE_TOTAL_STEPS": "2",
            "FINETUNE_CHECKPOINT_PATH": str(tmp_path / "ckpt"),
        },
    )
    assert result.returncode == 0, result.stderr
    losses = [row["loss"] for row in metrics.read(tmp_path / "ckpt")]
    assert len(losses) == 2
    assert all(math.isfinite(loss) for loss in losses)
    newest = checkpoint.latest(tmp_path / "ckpt")
    layout = checkpoint.read_state(newest)["layout"]
    assert layout["stages"] == settings.stages
    assert (layout["replicas"], layout["tensor"]) == (settings.data_group_size, settings.tensor_group_size)


def test_the_slurm_example_is_a_run_that_is_accepted():
    """Syntax, and the trainer's arguments as torchrun would give them to rank 0 of as many as the nodes start."""
    path = ROOT / "training" / "slurm_example.sbatch"
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    text = path.read_text(encoding="utf-8")
    nodes = int(re.search(r"(?m)^#SBATCH --nodes=(\d+)$", text)[1])
    here = int(re.search(r"--nproc-per-node (\d+)", text)[1])
    assert f"#SBATCH --gpus-per-node={here}" in text
    arguments = text.split("training/dist_clm_train.py")[-1].replace("\\\n", " ").replace('"$@"', "").split()
    settings = config.parse([*arguments, "--rank", "0", "--world-size", str(nodes * here)])
    assert here % settings.tensor_group_size == 0
    assert settings.data_group_size == 1 or settings.dp_mode == "sharded"


def test_the_readme_has_every_flag_and_recipe():
    text = (ROOT / "training" / "README.md").read_text(encoding="utf-8")
    assert update_table(text, config.Settings) == text, "python -m openchatkit.training.config writes the table"
    shown = [line.split()[0] for line in config.build_parser().format_help().splitlines() if line.startswith("  --")]
    assert re.findall(r"(?m)^\| `(--\S+)` \|", text) == [flag for flag in shown if flag not in OWN_FLAGS]
    assert set(re.findall(r"`(finetune_\S+\.sh)`", text)) == set(RECIPES)
