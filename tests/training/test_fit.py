"""`training/fit.py`: runs that are refused, or warned of, before their weights are loaded."""

import dataclasses
import json
import os

import pytest
import ranks
import torch
from loguru import logger

from openchatkit import storage
from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.loading import hardware
from openchatkit.models.registry import config_from_hf
from openchatkit.settings import to_json
from openchatkit.training import config, fit
from openchatkit.training.plan.memory import checkpoint_bytes, rank_bytes
from openchatkit.training.plan.planner import plan_run

GIB = 1 << 30
MODEL = {
    "model_type": "gpt_neox",
    "vocab_size": 50432,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}


class ManyRanks(Layout):
    """One rank of several that are all alike, on hosts by turns: what it gathers is what it gives itself."""

    hosts = ("here",)

    def gather(self, value):
        if isinstance(value, fit.RankNeed):
            count = len(self.hosts)
            return [dataclasses.replace(value, host=self.hosts[rank % count]) for rank in range(self.world_size)]
        return [value] * self.world_size


@pytest.fixture
def said():
    """What was logged."""
    lines = []
    sink = logger.add(lambda message: lines.append(message.record["message"]), level="INFO")
    yield lines
    logger.remove(sink)


def check(tmp_path, monkeypatch, *flags, memory=1 << 50, disk=1 << 60, hosts=("here",), total_steps=10):
    monkeypatch.setattr(hardware, "main_memory", lambda: memory)
    monkeypatch.setattr(storage, "free_bytes", lambda _: disk)
    argv = ["--model-name", str(tmp_path), "--task-name", "x", "--total-steps", str(total_steps), "--rank", "0"]
    argv += ["--checkpoint-path", str(tmp_path / "ckpt"), "--use-cuda", "false", "--bf16", *map(str, flags)]
    settings = config.parse(argv)
    plan = plan_run(settings, config_from_hf(MODEL), on_gpu=False)
    layout = ManyRanks(0, torch.device("cpu"), plan.pipeline_size, plan.replicas, plan.tensor_size)
    object.__setattr__(layout, "hosts", hosts)
    fit.check_run(settings, plan, layout, total_steps=total_steps)
    return settings, plan


def test_a_run_without_enough_memory_is_refused_with_one_that_has(tmp_path, monkeypatch):
    with pytest.raises(UserError) as error:
        check(tmp_path, monkeypatch, "--data-group-size", 4, memory=300 * GIB)
    assert str(error.value).startswith("ranks of this host, 4, hold ")
    assert " of main memory at least, and it has 300.0 GiB: " in str(error.value)
    # What it names is not refused.
    changed = str(error.value).split(" would do with ")[1].split()
    check(tmp_path, monkeypatch, "--data-group-size", 4, *changed, memory=300 * GIB)


def test_memory_of_other_hosts_is_not_this_ones(tmp_path, monkeypatch):
    _, plan = check(tmp_path, monkeypatch, "--data-group-size", 2, memory=1 << 50)
    one = rank_bytes(plan, 0).least
    with pytest.raises(UserError, match="ranks of this host, 2, hold"):
        check(tmp_path, monkeypatch, "--data-group-size", 2, memory=int(1.5 * one))
    check(tmp_path, monkeypatch, "--data-group-size", 2, memory=int(1.5 * one), hosts=("here", "there"))


def test_memory_that_may_be_too_small_is_warned_of(tmp_path, monkeypatch, said):
    _, plan = check(tmp_path, monkeypatch)
    assert not [line for line in said if "memory will be close" in line]
    check(tmp_path, monkeypatch, memory=int(rank_bytes(plan, 0).least) + 1)
    assert [line for line in said if line.startswith("memory will be close: ranks of this host, 1, may hold ")]


def test_unknown_memory_refuses_nothing(tmp_path, monkeypatch):
    check(tmp_path, monkeypatch, memory=0)


def test_a_card_that_is_too_small_is_named(monkeypatch):
    """Of a rank on a GPU, by what the card would say of itself; there is none here."""
    argv = ["--model-name", "x", "--task-name", "x", "--total-steps", "1", "--bf16", "--rank", "0"]
    settings = config.parse([*argv, "--data-group-size", "8"])
    plan = plan_run(settings, config_from_hf(MODEL))
    held = rank_bytes(plan, 0)
    layout = ManyRanks(0, torch.device("cuda", 0), 1, 8)
    need = fit.RankNeed("here", 24.0 * GIB, held.least, held.total, 0.0, 0.0)
    with pytest.raises(UserError, match=r"rank 0 \(replica 0 of 8\) holds .* GiB at least, and its GPU has 24.0 GiB: "):
        fit._check_memory(settings, plan, layout, [need] * 8, 22.0 * GIB)
    close = dataclasses.replace(need, card=held.total + GIB)
    assert "memory will be close" in fit._check_memory(settings, plan, layout, [close] * 8, None)
    enough = dataclasses.replace(need, card=held.total + 3 * GIB)
    assert fit._check_memory(settings, plan, layout, [enough] * 8, None) is None


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path, monkeypatch, said):
    _, plan = check(tmp_path, monkeypatch)
    size = int(checkpoint_bytes(plan))
    with pytest.raises(UserError, match=r"a checkpoint: 82.3 GB are needed and .* has room for 82.3 GB: make room"):
        check(tmp_path, monkeypatch, disk=size - 1)
    check(tmp_path, monkeypatch, "--on-full-disk", "continue", disk=size - 1)
    said.clear()
    often = ("--checkpoint-steps", 2, "--keep-checkpoints")
    check(tmp_path, monkeypatch, *often, 2, disk=2 * size)
    assert [line for line in said if "or keep fewer than --keep-checkpoints 2" in line]
    said.clear()
    check(tmp_path, monkeypatch, *often, 1, disk=2 * size)
    # However many are to be kept, so many are written.
    check(tmp_path, monkeypatch, "--checkpoint-steps", 5, "--keep-checkpoints", 1000, disk=2 * size)
    # One of three is there already.
    (tmp_path / "ckpt" / "checkpoint_5").mkdir(parents=True)
    check(tmp_path, monkeypatch, *often, 2, disk=2 * size)
    assert not [line for line in said if "--keep-checkpoints" in line]
    # Nothing is left to be saved.
    check(tmp_path, monkeypatch, disk=0, total_steps=5)


def test_wasted_ranks_are_warned_of_at_the_start(tmp_path, monkeypatch, said):
    check(tmp_path, monkeypatch, "--pipeline-group-size", 4, "--batch-size", 16, "--micro-batch-size", 8)
    [waiting] = [line for line in said if line.startswith("by the order of passes, ranks wait in ")]
    [warning] = [line for line in said if "4 stages take turns with 2 micro-batches" in line]
    assert waiting.removeprefix("by the order of passes, ") in warning
    said.clear()
    check(tmp_path, monkeypatch, "--pipeline-group-size", 4, "--batch-size", 64, "--micro-batch-size", 1)
    assert not [line for line in said if "take turns" in line]


def give_each_rank_its_host():
    fit.identify_host = lambda: str(os.getpid())


def test_a_tensor_group_over_two_hosts_is_warned_of_with_its_link(tmp_path, flags):
    """Of real ranks, each of which takes itself for a host; and a plain run says nothing of the kind."""
    flags = {**flags, "tensor_group_size": 2, "checkpoint_path": tmp_path / "ckpt"}
    ended = ranks.train(tmp_path, flags, world_size=2, before_main=give_each_rank_its_host)
    assert ended.statuses == [0, 0], ended.errors
    said = "a tensor group is spread over several hosts, whose link carries "
    [warning] = [line for line in ended.errors[0].splitlines() if said in line]
    assert " GB/s: its sums take " in warning
    assert "start a multiple of --tensor-group-size 2 ranks on each host" in warning
    assert said not in ended.errors[1]


def test_settings_of_the_model_are_read_once(tmp_path):
    """A plan of training's settings is that of the planner's command, of the same flags."""
    from openchatkit.tools.planning import settings as planning

    flags = ["--pipeline-group-size", "4", "--pp-mode", "interleaved", "--use-offload", "--packing", "documents"]
    flags += ["--optimizer-state", "bf16", "--bf16", "--model-name", str(tmp_path), "--micro-batch-size", "2"]
    own = config.parse([*flags, "--task-name", "x", "--total-steps", "5", "--rank", "0"])
    assert plan_run(own, config_from_hf(MODEL)) == plan_run(planning.parse(flags), config_from_hf(MODEL))
    assert to_json(own).keys() < to_json(planning.parse(flags)).keys()
    assert json.dumps(to_json(own))
