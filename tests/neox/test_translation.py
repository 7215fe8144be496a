"""GPT-NeoX's settings as the trainer's, and refusals of what the trainer cannot follow."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from neox_cases import GOLDEN, REFUSED, SHIPPED

from openchatkit.errors import UserError
from openchatkit.formats.store_writer import TokenStoreWriter
from openchatkit.formats.token_store import write_maker
from openchatkit.neox import data, model
from openchatkit.neox.config import NeoxConfig
from openchatkit.neox.translation import TrainerRun, translate
from openchatkit.training import config as trainer


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of 100 documents, in the current folder."""
    monkeypatch.chdir(tmp_path)
    with TokenStoreWriter(tmp_path / "a_store", vocab_size=256, masked=False) as writer:
        writer.add(np.full(1000, 97), np.full(100, 10))
    return "a_store"


@pytest.fixture
def run(configure, store):
    """Translate SMALLEST, with a store and other settings."""

    def run(*, ranks: int = 1, on_gpu: bool = True, **settings: object) -> TrainerRun:
        return translate(configure(**{"data_path": store, "save": "out"} | settings), ranks=ranks, on_gpu=on_gpu)

    return run


@pytest.mark.parametrize(
    ("settings", "ranks", "expected"),
    [
        (
            {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 8},
            2,
            {"batch_size": 32, "micro_batch_size": 4, "gradient_accumulate_step": 1, "data_group_size": 2},
        ),
        (
            {"pipe_parallel_size": 2, "model_parallel_size": 2, "gradient_accumulation_steps": 2},
            8,
            {"pipeline_group_size": 2, "tensor_group_size": 2, "data_group_size": 2, "pp_mode": "1f1b"},
        ),
        ({"pipe_parallel_size": 2}, 2, {"pp_mode": "gpipe"}),
        ({"pipe_parallel_size": 0}, 1, {"pipeline_group_size": 1, "dp_mode": "allreduce"}),
        ({"zero_optimization": {"stage": 1}}, 2, {"dp_mode": "sharded", "use_offload": False}),
        ({"zero_optimization": {"stage": 1, "cpu_offload": True}}, 2, {"use_offload": True}),
        ({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, 2, {"use_offload": True}),
        ({"zero_optimization": {"stage": 2}}, 2, {"dp_mode": "sharded-gradients"}),
        ({"zero_optimization": {"stage": 3}}, 2, {"dp_mode": "sharded-parameters"}),
        ({"s3_path": "s3://bucket/runs"}, 1, {"checkpoint_upload_prefix": "s3://bucket/runs"}),
        ({}, 1, {"train_log_backend": "print", "checkpoint_upload_prefix": None}),
        (
            {"optimizer": {"type": "CPU_Adam", "params": {"lr": 1, "betas": [0.8, 0.9], "eps": 1e-3}}},
            1,
            {
                "optimizer": "adamw",
                "use_offload": True,
                "lr": 1,
                "adam_beta1": 0.8,
                "adam_beta2": 0.9,
                "adam_eps": 1e-3,
            },
        ),
        (
            {"optimizer": {"type": "CPU_torch_Adam", "params": {"adamw_mode": False}}},
            1,
            {"optimizer": "adam", "use_offload": True, "lr": 0.001, "adam_eps": 1e-8},
        ),
        (
            {"optimizer": {"type": "SM3", "params": {"lr": 0.1, "beta": 0.9}}},
            1,
            {"optimizer": "sm3", "lr": 0.1, "momentum": 0.0, "sm3_beta": 0.9, "adam_eps": 1e-30},
        ),
        (
            {"optimizer": {"type": "SM3", "params": {"momentum": 0.5}}, "zero_optimization": {"stage": 2}},
            2,
            {"optimizer": "sm3", "momentum": 0.5, "dp_mode": "allreduce"},
        ),
        (
            {"optimizer": {"type": "madgrad_wd", "params": {}}, "zero_optimization": {"stage": 1}, "weight_decay": 0.5},
            2,
            {"optimizer": "madgrad", "momentum": 0.9, "adam_eps": 1e-6, "weight_decay": 0.5, "dp_mode": "sharded"},
        ),
        (
            {"optimizer": {"type": "madgrad_wd", "params": {"momentum": 0, "eps": 1e-3}}},
            1,
            {"optimizer": "madgrad", "momentum": 0, "adam_eps": 1e-3},
        ),
        (
            {"optimizer": {"type": "Lion", "params": {"lr": 1e-4}}, "use_bnb_optimizer": True},
            1,
            {"optimizer": "lion", "adam_beta1": 0.9, "adam_beta2": 0.99, "adam_eps": None},
        ),
        ({"log_dir": "some/logs"}, 1, {"train_log_backend": "print,loguru", "log_dir": "some/logs"}),
        ({"log_param_norm": True, "log_grad_norm": True}, 1, {"log_norms": "gradients,parameters"}),
        ({"log_optimizer_states": True, "use_bnb_optimizer": True}, 1, {"log_norms": None}),
        ({"log_optimizer_states": True}, 1, {"log_norms": "optimizer-state", "curve_names": "neox"}),
        ({}, 1, {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_eps": 1e-8, "weight_decay": 0.1, "max_grad_norm": 1.0}),
        ({"use_bnb_optimizer": True}, 1, {"optimizer": "8bit-adam"}),
        ({"train_iters": 1000, "warmup": 0.05}, 1, {"total_steps": 1000, "warmup_fraction": 0.05, "nepochs": None}),
        (
            {"train_iters": 1000, "lr_decay_style": "cosine", "min_lr": 1e-4, "lr_decay_iters": 900, "lr_rule": 2021},
            1,
            {"lr_decay_style": "cosine", "min_lr": 1e-4, "lr_decay_steps": 900, "lr_rule": "neox-2021"},
        ),
        ({"train_iters": 999, "lr_decay_fraction": 0.5}, 1, {"lr_decay_steps": 499, "lr_rule": "neox"}),
        (
            {"train_iters": 100, "lr_decay_style": "wsd", "wsd_decay_share": 0.2},
            1,
            {"lr_decay_style": "wsd", "lr_rule": "kit", "lr_decay_steps": None, "wsd_decay_share": 0.2},
        ),
        ({"train_iters": None, "train_epochs": 2}, 1, {"total_steps": None, "nepochs": 2}),
        ({"checkpoint_activations": True}, 1, {"activation_checkpointing": "full"}),
        ({}, 1, {"activation_checkpointing": "none", "precision": "float32", "seed": 1234}),
        (
            {
                "fp16": {"enabled": True, "initial_scale_power": 12, "hysteresis": 3, "consecutive_hysteresis": True},
                "zero_optimization": {"stage": 1},
            },
            2,
            {
                "precision": "float16",
                "initial_loss_scale": 4096,
                "hysteresis": 3,
                "consecutive_hysteresis": True,
                "end_at_min_loss_scale": True,
                "max_overflows": 50,
            },
        ),
        (
            {"fp16": {"enabled": True, "hysteresis": 3, "loss_scale_window": 500, "consecutive_hysteresis": True}},
            1,
            {
                "hysteresis": 1,
                "consecutive_hysteresis": False,
                "end_at_min_loss_scale": False,
                "max_overflows": 50,
                "loss_scale_window": 500,
            },
        ),
        ({"fp16": {"enabled": True}}, 1, {"initial_loss_scale": 65536, "min_loss_scale": 1, "loss_scale": 0}),
        ({"bf16": {"enabled": True}}, 1, {"precision": "bfloat16"}),
        ({"model_parallel_size": 2, "sequence_parallel": True}, 2, {"sequence_parallel": True}),
        ({"sequence_parallel": True}, 2, {"sequence_parallel": False}),
        ({"save_interval": 500, "keep_last_n_checkpoints": 4}, 1, {"checkpoint_steps": 500, "keep_checkpoints": 4}),
        ({"checkpoint_factor": 2, "checkpoint_scale": "log"}, 1, {"checkpoint_steps": 0, "checkpoint_growth": 2}),
        ({"extra_save_iters": [0, 1, 64]}, 1, {"extra_save_steps": "1,64", "exit_interval": 0}),
        ({"extra_save_iters": [0], "exit_interval": 7}, 1, {"extra_save_steps": None, "exit_interval": 7}),
        ({}, 1, {"data_order": "neox", "packing": "concat", "allow_chopped": True, "mask_end_of_text": False}),
        ({"pack_impl": "unpacked", "allow_chopped": False}, 1, {"packing": "none", "allow_chopped": False}),
        (
            {"pack_impl": "pack_until_overflow", "eod_mask_loss": True},
            1,
            {"packing": "overflow", "mask_end_of_text": True},
        ),
        (
            {"eval_iters": 7, "split": "8,1,1"},
            1,
            {"task_name": "a_store[0:80]", "evaluation_data": "a_store[80:90]", "test_data": "a_store[90:100]"},
        ),
        (
            {"eval_iters": 7, "eval_interval": 0, "split": "8,1,1"},
            1,
            {"evaluation_data": None, "evaluation_num_batch": 7},
        ),
        ({"split": "8,1,1"}, 1, {"evaluation_data": None, "test_data": None, "evaluation_num_batch": None}),
        ({"eval_iters": 7, "eval_interval": 50}, 1, {"evaluation_steps": 50, "evaluation_num_batch": 7}),
        ({"char_level_ppl": True}, 1, {"character_perplexity": True}),
        ({"eval_iters": 7, "split": "9,1"}, 1, {"task_name": "a_store[0:90]", "evaluation_data": "a_store[90:100]"}),
        ({}, 1, {"evaluation_data": None, "evaluation_steps": 0, "packing": "concat", "seq_length": 64}),
    ],
)
def test_settings_become_the_trainers(run, settings, ranks, expected):
    found = run(ranks=ranks, **settings)
    assert expected.items() <= found.flags.items()
    trainer.parse(found.arguments)  # they are flags of the trainer, and fit each other


def test_a_rule_of_the_learning_rate_that_was_not_chosen_is_named(run):
    line = "the learning rate follows GPT-NeoX's rule of today for cosine; lr_rule 2021 is that of GPT-NeoX-20B and"
    assert [note for note in run(lr_decay_style="cosine").notes if note.startswith(line)]
    for chosen in ({"lr_rule": "today"}, {"lr_rule": "2021"}, {"lr_decay_style": "wsd"}):
        assert not [note for note in run(**chosen).notes if "rule of" in note]


def test_a_warm_up_of_less_than_a_step_is_named(run):
    """GPT-NeoX's rate is the peak times one over the steps of the warm-up then."""
    line = "it is less than a step, and as in GPT-NeoX of today the first step has the rate 0.01, above"
    assert [note for note in run(train_iters=10).notes if line in note]  # warmup is 0.01 by default, lr 0.001
    epochs = {"train_iters": None, "train_epochs": 1}  # whose steps are not known yet
    for settings in ({"train_iters": 100}, {"warmup": 0}, {"lr_rule": "2021"}, {"lr_decay_iters": 200}, epochs):
        assert not [note for note in run(**settings).notes if "less than a step" in note]


def test_saves_and_falls_without_effect_are_named(run):
    line = "extra_save_iters 0: the weights that training starts from are not saved: seed 1234 makes them again"
    assert line in run(extra_save_iters=[0, 2]).notes
    notes = run(train_iters=None, train_epochs=2, lr_decay_fraction=0.5).notes
    assert [note for note in notes if "lr_decay_fraction 0.5: it has no effect with train_epochs: give lr_d" in note]


def test_stores_with_weights(run, store):
    paths = {"data_path": None, "train_data_paths": [store, store], "valid_data_paths": store, "eval_iters": 2}
    flags = run(**paths, train_data_weights=[1, 0.5]).flags
    assert (flags["task_name"], flags["evaluation_data"]) == ("a_store:1,a_store:0.5", "a_store:1")
    assert run(**paths).flags["task_name"] == "a_store:1,a_store:1"
    assert run(**paths, test_data_paths=[store], test_data_weights=[3]).flags["test_data"] == "a_store:3"


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_stores_weighted_by_their_documents(run, store, alpha):
    with TokenStoreWriter(Path("b_store"), vocab_size=256, masked=False) as writer:
        writer.add(np.full(300, 97), np.full(300, 1))
    paths = {"data_path": None, "train_data_paths": [store, "b_store"], "train_data_weights": [9, 1]}
    flags = run(**paths, weight_by_num_documents=True, weighted_sampler_alpha=alpha).flags
    drawn = [0.25**alpha * 0.75, 0.75**alpha * 0.25]
    entries = [entry.split(":") for entry in flags["task_name"].split(",")]
    assert [name for name, _ in entries] == ["a_store", "b_store"]
    assert [float(weight) for _, weight in entries] == pytest.approx([share / sum(drawn) for share in drawn])
    assert data.weigh_by_documents([7], alpha) == [1.0]


def test_label_stores(run, store):
    paths = {"data_path": None, "train_data_paths": [store, store], "train_label_data_paths": [store, store]}
    flags = run(**paths, train_data_weights=[1, 0.5]).flags
    assert flags["task_name"] == "a_store[labels=a_store]:1,a_store[labels=a_store]:0.5"
    assert (flags["loss_on"], flags["max_without_reply"]) == ("responses", 1.0)
    flags = run(**paths, valid_data_paths=store, valid_label_data_paths=store, eval_iters=2).flags
    assert flags["evaluation_data"] == "a_store[labels=a_store]:1"
    assert "loss_on" not in run(data_path=None, train_data_paths=store).flags


def test_without_a_gpu_products_are_in_what_the_processor_has(run):
    half = run(on_gpu=False, fp16={"enabled": True})
    assert half.flags["precision"] == "float32"
    assert half.notes[-1] == "float16 is for GPUs, and there is none: products are in float32"
    assert run(on_gpu=False, bf16={"enabled": True}).flags["precision"] == "auto"


@pytest.mark.parametrize(
    "name",
    [name for name, given in SHIPPED.items() if {"num_layers", "optimizer"} <= given.keys() and name not in REFUSED],
)
def test_shipped_configurations_are_runs_of_the_trainer(name, write, store):
    paths = {"data_path": store, "save": "out", "tokenizer_type": "CharLevelTokenizer", "load": None, "hostfile": None}
    model_alone = {key: value for key, value in SHIPPED[name].items() if not key.endswith("_data_paths")}
    # Finetuning starts from a checkpoint, which is not here.
    config = NeoxConfig.read([str(write("c.json", model_alone | paths | {"finetune": False}))])
    ranks = max(config.get("pipe_parallel_size"), 1) * config.get("model_parallel_size")
    settings = trainer.parse(translate(config, ranks=ranks, on_gpu=True).arguments)
    assert settings.lr == SHIPPED[name]["optimizer"]["params"]["lr"]
    rows = SHIPPED[name]["train_micro_batch_size_per_gpu"] * SHIPPED[name].get("gradient_accumulation_steps", 1)
    assert settings.batch_size == rows
    assert settings.tensor_group_size == SHIPPED[name]["model_parallel_size"]


@pytest.mark.parametrize(("split", "documents", "borders"), GOLDEN["split"])
def test_splits_are_gpt_neox_s_own(split, documents, borders):
    assert data.split_documents(split, documents) == borders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_iters": None}, r"give train_iters or train_epochs, one of the two: none of them is given"),
        ({"train_epochs": 1}, r"give train_iters or train_epochs, one of the two: both are given"),
        (
            {"optimizer": {"type": "Adam", "params": {"momentum": 0.9}}},
            r"c.yml:\d+: optimizer.params.momentum: Adam has no such parameter, it takes adam_w_mode, betas, eps, lr",
        ),
        (
            {"optimizer": {"type": "OneBitAdam", "params": {}}},
            r"c.yml:\d+: optimizer.type OneBitAdam: it is for slow links between machines, and not here yet: use Adam",
        ),
        (
            {"optimizer": {"type": "Adam", "params": {"freeze_step": 400}}},
            r"c.yml:\d+: optimizer.params.freeze_step 400: it belongs to OneBitAdam",
        ),
        ({"optimizer": {"type": "sgd", "params": {}}}, r"optimizer.type sgd: it belongs to µP"),
        (
            {"optimizer": {"type": "Adafactor", "params": {}}},
            r"optimizer.type Adafactor: GPT-NeoX has no such optimizer",
        ),
        ({"optimizer": {"type": "Adam"}}, r"optimizer is missing: expected"),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.9]}}}, r"optimizer.params.betas \[0.9\]: expected two"),
        ({"min_lr": 0.1}, r"min_lr 0.1 is above optimizer.params.lr 0.001"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization.stage 4: the kit's trainer has stages 0, 1, 2"),
        ({"warmup": 1}, r"warmup 1: expected a share of the steps, at least 0 and below 1"),
        ({"lr_decay_iters": 0}, r"lr_decay_iters 0: expected at least one step"),
        ({"lr_decay_fraction": 0.1}, r"lr_decay_fraction 0.1: expected at least one step"),
        ({"lr_rule": "2023"}, r"lr_rule is '?2023'?: expected one of today, 2021"),
        ({"checkpoint_factor": 0.5}, r"checkpoint_factor 0.5: expected a whole number of steps"),
        ({"checkpoint_factor": 1, "checkpoint_scale": "log"}, r"checkpoint_factor 1: .* give a number above 1"),
        ({"extra_save_iters": [1, "x"]}, r"extra_save_iters .*: expected a list of whole numbers"),
        ({"seq_length": 128}, r"seq_length 128 is above max_position_embeddings 64"),
        ({"data_path": None}, r"give data_path or train_data_paths, one of the two: none of them is given"),
        ({"train_data_paths": ["a_store"]}, r"give data_path or train_data_paths, one of the two: both are given"),
        (
            {"data_path": "no_store"},
            r"c.yml:\d+: data_path no_store: there is no no_store.idx: make the store with prepa",
        ),
        ({"split": "1,x"}, r"split '1,x': expected shares of training, validation and test such as 969,30,1"),
        ({"split": "0,1,0"}, r"split 0,1,0: it leaves none of the 100 documents of a_store for training"),
        (
            {"eval_iters": 5, "split": "999,1"},
            r"split 999,1: it leaves none of the 100 documents .* for validation, and",
        ),
        (
            {"data_path": None, "train_data_paths": ["a_store"], "train_data_weights": [1, 2]},
            r"train_data_weights \[1, 2\]: 2 weights for 1 train_data_paths",
        ),
        (
            {"data_path": None, "train_data_paths": ["a_store"] * 2, "train_data_weights": [1, 0]},
            r"train_data_weights \[1, 0\]: expected numbers above 0: leave the store out",
        ),
        (
            {"train_iters": None, "train_epochs": 1, "pack_impl": "unpacked"},
            r"pack_impl unpacked: it does not go with train_epochs: give train_iters, or leave it out",
        ),
        (
            {"train_iters": None, "train_epochs": 1, "weight_by_num_documents": True},
            r"weight_by_num_documents True: it does not go with train_epochs",
        ),
        (
            {"data_path": None, "train_data_paths": ["a_store"], "train_label_data_paths": ["a_store", "b_store"]},
            r"train_label_data_paths \['a_store', 'b_store'\]: 2 label stores for 1 train_data_paths",
        ),
        (
            {"data_path": None, "train_data_paths": ["a_store"], "train_label_data_paths": ["no_store"]},
            r"c.yml:\d+: train_label_data_paths no_store: there is no no_store.idx",
        ),
        (
            {"train_label_data_paths": ["a_store"]},
            r"train_label_data_paths \['a_store'\]: label stores go with train_data_paths, not with data_path",
        ),
        (
            {
                "data_path": None,
                "eval_iters": 2,
                "train_data_paths": ["a_store"],
                "train_label_data_paths": ["a_store"],
                "valid_data_paths": ["a_store"],
            },
            r"train_label_data_paths \['a_store'\]: valid_label_data_paths is missing: give it for valid_data_paths",
        ),
        ({"finetune": True}, r"finetune True: load is not given: name the folder of the run to start from"),
        ({"finetune": True, "load": "elsewhere"}, r"finetune True: elsewhere holds no checkpoint to start from"),
        ({"finetune": True, "load": "out"}, r"finetune True: load and save are both out: give another save"),
        ({"use_mup": True}, r"use_mup True: there is no µP"),
        ({"launcher": "openmpi"}, r"launcher openmpi: there are no MPI launchers: use ssh"),
    ],
)
def test_refusals(run, settings, message):
    with pytest.raises(UserError, match=message) as caught:
        run(**settings)
    assert "\n" not in str(caught.value)


def test_pipelines_share_states_of_the_optimizer_alone(run):
    with pytest.raises(UserError, match=r"stage 2 and pipe_parallel_size 2 exclude each other: use stage 1"):
        run(ranks=2, zero_optimization={"stage": 2}, pipe_parallel_size=2)


def test_tensor_ranks_and_sm3_exclude_each_other(run):
    with pytest.raises(
        UserError, match=r"c.yml:\d+: model_parallel_size 2: SM3 keeps maxima of whole rows and columns"
    ):
        run(ranks=2, optimizer={"type": "SM3", "params": {}}, model_parallel_size=2)


def test_what_optimizers_and_norms_do_otherwise_is_named(run):
    sm3 = {"type": "SM3", "params": {}}
    said = "replicas all have the state of SM3, which needs whole matrices"
    assert f"zero_optimization.stage 1: {said}" in run(ranks=2, optimizer=sm3, zero_optimization={"stage": 1}).notes
    assert not any(said in note for note in run(optimizer=sm3, zero_optimization={"stage": 1}).notes)
    notes = run(log_optimizer_states=True, use_bnb_optimizer=True).notes
    assert any("log_optimizer_states True: state of 8 bits has no norms" in note for note in notes)
    notes = run(log_grad_norm=True).notes
    assert any("log_grad_norm True: norms are of layers, not of single parameters" in note for note in notes)
    notes = run(use_bnb_optimizer=True, optimizer={"type": "Lion", "params": {}}).notes
    assert any("use_bnb_optimizer True: it has no effect with Lion" in note for note in notes)


def test_wandb_is_used_where_it_can_log_in(run, monkeypatch, tmp_path):
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    settings = {"use_wandb": True, "wandb_team": "t", "wandb_group": "g", "wandb_run_name": "r"}
    without = run(**settings)
    assert without.flags["train_log_backend"] == "print"
    assert "use_wandb True: nothing is sent: " in without.notes[-1]
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    expected = {"train_log_backend": "print,wandb", "wandb_team": "t", "wandb_group": "g", "wandb_run_name": "r"}
    assert (expected | {"project_name": "neox"}).items() <= run(**settings).flags.items()
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert run(**settings).flags["train_log_backend"] == "print,wandb"


def test_tensorboard_is_written_where_it_is_installed(run):
    found = run(tensorboard_dir="curves")
    if importlib.util.find_spec("tensorboard") is None:
        assert "tensorboard_dir curves: nothing is written: pip install 'openchatkit[tensorboard]'" in found.notes[-1]
    else:
        expected = {"train_log_backend": "print,tensorboard", "tensorboard_dir": "curves"}
        assert expected.items() <= found.flags.items()


def test_where_a_run_starts(run, tmp_path):
    first = run(load="out")
    assert (first.flags["model_name"], first.flags.get("load_checkpoint")) == (Path("out/model"), None)
    assert run().flags["load_checkpoint"] is False
    without_checkpoint = "load nowhere holds no checkpoint: training starts from random weights"
    assert [note for note in run(load="nowhere").notes if note.endswith(without_checkpoint)]
    assert "save is not given: checkpoints go to checkpoints" in run(save=None).notes
    (tmp_path / "neox" / "global_step3").mkdir(parents=True)
    (tmp_path / "neox" / "global_step3" / "layer_00-model_00-model_states.pt").touch()
    advice = (
        r"neox holds checkpoints of GPT-NeoX itself: run `python tools/convert_from_neox\.py neox --save-dir MODEL`"
    )
    with pytest.raises(UserError, match=advice):
        run(load="neox")
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "config.json").touch()
    assert run(load="converted", finetune=True).flags["model_name"] == Path("converted")


def test_data_say_which_tokenizer_made_them(run, configure, store):
    write_maker(Path(store), {"tokenizer_type": "CharLevelTokenizer"})
    found = run(tokenizer_type=None, vocab_file="data/gpt2-vocab.json")
    assert "tokenizer_type is not given: it is CharLevelTokenizer, which made the data" in found.notes
    for path in (store, f"{store}.bin"):  # which names the same store
        config = configure(tokenizer_type=None, data_path=path, vocab_file="data/gpt2-vocab.json")
        assert model.load_tokenizer(config).vocab_size == 512
    with TokenStoreWriter(Path("b_store"), vocab_size=256, masked=False) as writer:
        writer.add(np.full(10, 97), np.full(1, 10))
    write_maker(Path("b_store"), {"tokenizer_type": "HFTokenizer"})
    with pytest.raises(UserError, match="b_store was made by HFTokenizer, other stores by CharLevelTokenizer: make"):
        run(data_path=None, train_data_paths=[store, "b_store"])
    with pytest.raises(UserError, match="b_store was made by HFTokenizer, other stores by CharLevelTokenizer: make"):
        run(data_path=None, train_data_paths=[store], test_data_paths=["b_store"])
    other = run(tokenizer_type="HFTokenizer").notes
    assert [note for note in other if "tokenizer_type HFTokenizer: CharLevelTokenizer made the data: leave it" in note]
