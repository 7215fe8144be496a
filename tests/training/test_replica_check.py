"""`training/replica_check.py`: one bit that differs between replicas ends the run, by a line that says where."""

import functools
import socket

import pytest
import ranks
import torch
from test_layouts import run

from openchatkit.distributed.layout import Layout
from openchatkit.errors import UserError
from openchatkit.formats import checkpoint
from openchatkit.training import config
from openchatkit.training.replica_check import describe_difference

REPLICAS = {"data_group_size": 2, "batch_size": 4, "check_replicas": 2}


def flip(weights, kind: str) -> None:
    """Flip one bit of what a rank has of a matrix of layer 2: of the weight, or of the optimizer's second moment."""
    victim = dict(weights.stages.named_shards())["layer_00002"].mlp.dense_4h_to_h.weight
    if kind == "moment":
        [master] = [each for run, each in weights.masters.items() if weights.parameter(run) is victim]
        victim = weights.optimizer.state[master]["exp_avg_sq"]
    victim.data.view(-1)[3:4].view(torch.int32).bitwise_xor_(1 << 5)


def flip_before_step_3(kind: str) -> None:
    """Let rank 1 flip a bit before its third step."""
    from openchatkit.training.step import Trainer

    step = Trainer.step

    def flip_and_step(self, number, *arguments, **options):
        if number == 2 and self.layout.rank == 1:
            flip(self.weights, kind)
        return step(self, number, *arguments, **options)

    Trainer.step = flip_and_step


def flip_after_step_3() -> None:
    from openchatkit.training.loop import Loop

    compare = Loop._compare_replicas

    def flip_and_compare(self):
        if self.progress.step == 3 and self.trainer.layout.rank == 1:
            flip(self.trainer.weights, "weight")
        compare(self)

    Loop._compare_replicas = flip_and_compare


STAGES = {"pipeline_group_size": 2, "pp_mode": "1f1b"}


@pytest.mark.parametrize(
    ("spoil", "change", "pair"),
    [
        (functools.partial(flip_before_step_3, "weight"), {}, (0, 1)),
        pytest.param(functools.partial(flip_before_step_3, "moment"), {"bf16": True}, (0, 1), marks=pytest.mark.long),
        pytest.param(functools.partial(flip_before_step_3, "weight"), STAGES, (1, 3), marks=pytest.mark.long),
        pytest.param(flip_after_step_3, {"dp_mode": "sharded"}, (0, 1), marks=pytest.mark.long),
    ],
    ids=["weight", "moment", "stages", "shared state"],
)
def test_a_flipped_bit_is_found_and_the_last_checkpoint_is_from_before_it(tmp_path, flags, spoil, change, pair):
    flags = {**flags, **REPLICAS, **change, "total_steps": 9, "checkpoint_steps": 1}
    flags["checkpoint_path"] = tmp_path / "ckpt"
    count = 2 * flags.get("pipeline_group_size", 1)
    ended = ranks.train(tmp_path, flags, world_size=count, before_main=spoil)
    assert ended.statuses == [2] * count, ended.errors
    path = checkpoint.latest(tmp_path / "ckpt")
    assert path.name == "checkpoint_2"
    checkpoint.verify(path)
    host = socket.gethostname()
    for errors in ended.errors:
        [line] = [line for line in errors.splitlines() if line.startswith("error: ")]
        where = " and ".join(f"rank {rank} on {host}" for rank in pair)
        assert line.startswith(f"error: after step 3, layer_00002 differs between {where}, of which one is wrong: have")
        assert line.endswith(f"the same command goes on from {path}")
    assert "comparing replicas takes " in ended.errors[0]
    assert run(tmp_path, {**flags, "total_steps": 4}).name == "checkpoint_4"


def test_of_three_replicas_the_one_that_differs_is_named():
    layout = Layout(0, torch.device("cpu"), pipeline_size=2, replicas=3)
    hosts = [f"host{rank // 2}" for rank in range(6)]
    sums = [{"embed": 1, "layer_00000": 7}, {"layer_00001": 5, "head": -3}] * 3
    sums[5] = {"layer_00001": 5, "head": -4}
    found = describe_difference(sums, hosts, layout)
    assert found == "head of rank 5 on host2 is not that of its other 2 replicas"
    sums[3], sums[1] = {"layer_00001": 6, "head": -3}, {"layer_00001": 8, "head": -3}
    found = describe_difference(sums, hosts, layout)
    ranks_on_hosts = "rank 1 on host0 and rank 3 on host1 and rank 5 on host2"
    assert found == f"layer_00001 differs between {ranks_on_hosts}, of which one is wrong"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--check-replicas compares replicas, and --data-group-size 1 means one: leave it out"),
        (["--data-group-size", "2", "--dp-mode", "sharded-parameters"], "sharded-parameters and --check-replicas excl"),
    ],
)
def test_what_cannot_be_compared_is_refused(argv, message):
    with pytest.raises(UserError, match=message):
        config.parse(["--model-name", "m", "--task-name", "d", "--total-steps", "1", "--check-replicas", "5", *argv])
