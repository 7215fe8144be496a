"""Checkpoints (`checkpoint`, `checkpoint_folders`): the same bytes back, no damage trusted, nothing lost too early."""

import json
import os
import re

import pytest
import tiny_shards
import torch
from tiny_shards import NEOX, equal, flip, write_checkpoint

from openchatkit.errors import UserError
from openchatkit.formats import checkpoint, checkpoint_folders, legacy
from openchatkit.formats.manifest import DamagedError
from openchatkit.storage import FullDiskError

SHARDS = ["embed", "layer_00000", "layer_00001", "layer_00002", "head"]


@pytest.fixture
def root(tmp_path):
    return tmp_path / "ckpts"


def names(root):
    return sorted(path.name for path in root.iterdir())


def test_everything_comes_back(root, tiny_tokenizer):
    made = write_checkpoint(root, 7, tokenizer=tiny_tokenizer)
    path = checkpoint.latest(root)
    assert path == root / "checkpoint_7"
    assert names(root) == ["checkpoint_7", "latest"]
    assert (root / "latest").read_text() == "7\n"
    checkpoint.verify(path)
    assert checkpoint.read_state(path) == {
        "step": 7,
        "lr": 0.1 + 0.2,
        "layout": {"stages": 2, "layers_per_stage": 2, "replicas": 1},
    }
    assert json.loads((path / "config.json").read_text()) == NEOX
    for shard, tensors in made.items():
        assert equal(checkpoint.read_weights(path, shard), tensors)
        state = checkpoint.read_optimizer(path, shard)
        assert state.keys() == tensors.keys()
        for name, expected in tiny_shards.optimizer_state(tensors).items():
            assert state[name].pop("beta") == expected.pop("beta")
            assert equal(state[name], expected)
    expected = {f"{shard}{end}.safetensors" for shard in SHARDS for end in ("", ".optimizer")}
    small = {"state.json", "manifest.json", "config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(names(path)) == expected | small


def test_parameters_without_state_and_states_of_odd_values(root):
    checkpoint.begin(root, 1)
    state = {
        "a.weight": {},
        "b.bias": {"step": 3, "name": "x", "betas": [0.9, 0.999], "none": None, "inf": float("inf")},
    }
    checkpoint.write_optimizer(root / ".checkpoint_1.tmp", "head", state)
    os.rename(root / ".checkpoint_1.tmp", root / "checkpoint_1")
    assert checkpoint.read_optimizer(root / "checkpoint_1", "head") == state


def test_nothing_appears_before_it_is_finished(root):
    temporary = checkpoint.begin(root, 5)
    checkpoint.write_weights(temporary, "embed", tiny_shards.weights(NEOX)["embed"])
    assert names(root) == [".checkpoint_5.tmp"]
    assert checkpoint.latest(root) is None
    assert checkpoint.list_steps(root) == []


def test_begin_removes_what_killed_saves_left(root):
    (root / ".checkpoint_3.tmp").mkdir(parents=True)
    (root / ".checkpoint_3.tmp" / "embed.safetensors").write_bytes(b"half")
    assert checkpoint.count_leftover_bytes(root) == 4
    checkpoint.begin(root, 4)
    assert checkpoint.count_leftover_bytes(root) == 0
    assert names(root) == [".checkpoint_4.tmp"]


def test_a_save_that_failed_can_be_discarded(root):
    temporary = checkpoint.begin(root, 4)
    checkpoint.write_weights(temporary, "embed", tiny_shards.weights(NEOX)["embed"])
    checkpoint.discard(temporary)
    assert names(root) == []


def test_a_rank_that_writes_elsewhere_is_found(root):
    made = tiny_shards.weights(NEOX)
    temporary = checkpoint.begin(root, 1)
    records = [checkpoint.write_weights(temporary, shard, tensors) for shard, tensors in made.items()]
    (temporary / "head.safetensors").unlink()
    with pytest.raises(
        DamagedError, match=r"head\.safetensors is missing; every rank must see the same checkpoint folder"
    ):
        checkpoint.finish(temporary, root, 1, state={}, records=records, raw_config=NEOX, tokenizer_from=None)
    assert checkpoint.latest(root) is None


def test_a_shard_that_no_rank_wrote_is_found(root):
    made = tiny_shards.weights(NEOX)
    temporary = checkpoint.begin(root, 1)
    records = [checkpoint.write_weights(temporary, shard, made[shard]) for shard in SHARDS[:-1]]
    with pytest.raises(DamagedError, match=r"head\.safetensors is not listed"):
        checkpoint.finish(temporary, root, 1, state={}, records=records, raw_config=NEOX, tokenizer_from=None)


def test_a_checkpoint_of_the_same_step_is_replaced(root):
    write_checkpoint(root, 1)
    temporary = checkpoint.begin(root, 1)
    made = tiny_shards.weights(NEOX, seed=9)
    records = [checkpoint.write_weights(temporary, shard, tensors) for shard, tensors in made.items()]
    path = checkpoint.finish(temporary, root, 1, state={}, records=records, raw_config=NEOX, tokenizer_from=None)
    assert equal(checkpoint.read_weights(path, "head"), made["head"])
    assert names(root) == ["checkpoint_1", "latest"]


def test_a_kill_while_one_replaces_another_loses_neither(root, monkeypatch):
    made = write_checkpoint(root, 1)

    def killed(*args):
        raise KeyboardInterrupt

    temporary = checkpoint.begin(root, 1)
    records = [checkpoint.write_weights(temporary, shard, tensors) for shard, tensors in made.items()]
    real, calls = os.rename, []

    def rename(a, b):
        if len(calls) == 1:
            killed()
        calls.append(a)
        real(a, b)

    monkeypatch.setattr(checkpoint_folders.os, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.finish(temporary, root, 1, state={}, records=records, raw_config=NEOX, tokenizer_from=None)
    monkeypatch.undo()
    assert not (root / "checkpoint_1").exists()
    checkpoint.begin(root, 2)
    assert equal(checkpoint.read_weights(root / "checkpoint_1", "embed"), made["embed"])


@pytest.mark.parametrize(
    "file", ["embed.safetensors", "layer_00001.optimizer.safetensors", "state.json", "config.json"]
)
def test_one_bit_in_any_file_is_refused_and_the_way_back_named(root, file):
    write_checkpoint(root, 5)
    write_checkpoint(root, 10)
    flip(root / "checkpoint_10" / file, position=20, bit=1)
    message = (
        f"checkpoint_10/{file} was altered: .*; the newest verified checkpoint is {root}/checkpoint_5: "
        f"`echo 5 > {root}/latest` resumes from it$"
    )
    with pytest.raises(DamagedError, match=message):
        checkpoint.verify(root / "checkpoint_10")
    checkpoint.verify(root / "checkpoint_5")


def test_following_the_advice_resumes(root):
    write_checkpoint(root, 5)
    write_checkpoint(root, 10)
    flip(root / "checkpoint_10" / "head.safetensors")
    assert checkpoint.latest(root) == root / "checkpoint_10"
    (root / "latest").write_text("5\n")
    assert checkpoint.latest(root) == root / "checkpoint_5"


def test_verify_looks_at_what_a_rank_reads(root):
    write_checkpoint(root, 1)
    flip(root / "checkpoint_1" / "head.optimizer.safetensors")
    checkpoint.verify(root / "checkpoint_1", ["embed", "layer_00000"])
    checkpoint.verify_weights(root / "checkpoint_1", "head")
    with pytest.raises(DamagedError, match=r"head\.optimizer.*; no other checkpoint in .* is whole$"):
        checkpoint.verify(root / "checkpoint_1", ["head"])
    flip(root / "checkpoint_1" / "head.safetensors")
    with pytest.raises(DamagedError, match=r"head\.safetensors"):
        checkpoint.verify_weights(root / "checkpoint_1", "head")


@pytest.mark.parametrize("read", [checkpoint.read_weights, checkpoint.read_optimizer])
def test_a_missing_file_is_named_with_the_way_back(root, read):
    write_checkpoint(root, 1)
    write_checkpoint(root, 2)
    for file in ("head.safetensors", "head.optimizer.safetensors"):
        (root / "checkpoint_2" / file).unlink()
    with pytest.raises(
        DamagedError, match=rf"head\..*is missing; the newest verified checkpoint is {root}/checkpoint_1"
    ):
        read(root / "checkpoint_2", "head")


def test_a_missing_manifest(root):
    write_checkpoint(root, 1)
    (root / "checkpoint_1" / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"manifest\.json is missing; no other checkpoint"):
        checkpoint.read_state(root / "checkpoint_1")


def test_shards_of_two_steps_mixed_are_refused(root):
    write_checkpoint(root, 1)
    write_checkpoint(root, 2)
    older = (root / "checkpoint_1" / "embed.safetensors").read_bytes()
    (root / "checkpoint_2" / "embed.safetensors").write_bytes(older)
    with pytest.raises(DamagedError, match=r"embed\.safetensors was altered"):
        checkpoint.verify(root / "checkpoint_2", ["embed"])


@pytest.mark.parametrize("content", ["", "abc", "99", "../../x", "-1", "7.5", "\x00", "checkpoint_99"])
def test_a_latest_that_names_nothing_stops_with_the_newest_verified_one(root, content):
    for step in (5, 10, 9):
        write_checkpoint(root, step)
    flip(root / "checkpoint_10" / "head.safetensors")
    (root / "latest").write_text(content)
    message = (
        f"{root}/latest says {content.strip()!r}, and there is no such checkpoint: the newest verified checkpoint "
        f"is {root}/checkpoint_9; `python tools/verify_checkpoint.py {root} --repair latest` makes it the one to "
        "go on from"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        checkpoint.latest(root)


def test_a_latest_that_is_no_text_or_is_missing_stops(root):
    write_checkpoint(root, 5)
    (root / "latest").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(
        UserError, match=f"latest cannot be read: the newest verified checkpoint is {root}/checkpoint_5"
    ):
        checkpoint.latest(root)
    (root / "latest").unlink()
    with pytest.raises(UserError, match=f"latest is missing: the newest verified checkpoint is {root}/checkpoint_5"):
        checkpoint.latest(root)


def test_a_missing_latest_beside_checkpoints_of_the_original_kit_stops(tmp_path):
    (tmp_path / "100").mkdir()
    torch.save({}, tmp_path / "100" / legacy.stage_file(0))
    with pytest.raises(UserError, match=f"latest is missing: give the checkpoint itself, such as {tmp_path}/100$"):
        checkpoint.latest(tmp_path)


def test_a_kill_at_the_first_publication_leaves_no_checkpoint_that_latest_does_not_name(root, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    for moment in ("point_to", "replace_folder"):
        monkeypatch.setattr(checkpoint_folders, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            write_checkpoint(root, 5)
        monkeypatch.undo()
        assert checkpoint.latest(root) is None
    real, calls = checkpoint_folders.point_to, []

    def killed_the_second_time(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)

    (root / "latest").unlink()
    monkeypatch.setattr(checkpoint_folders, "point_to", killed_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(root, 5)
    assert checkpoint.latest(root) == root / "checkpoint_5"


def test_a_folder_under_the_name_of_another_step_is_refused(root):
    for step in (5, 10):
        write_checkpoint(root, step)
    os.rename(root / "checkpoint_5", root / "aside")
    os.rename(root / "checkpoint_10", root / "checkpoint_5")
    os.rename(root / "aside", root / "checkpoint_10")
    for read in (checkpoint.verify, checkpoint.read_state):
        with pytest.raises(DamagedError, match="checkpoint_10 holds the checkpoint of step 5: it was renamed or repla"):
            read(root / "checkpoint_10")
    assert checkpoint.newest_verified(root) is None


def test_bytes_that_the_disk_did_not_keep_are_found(root):
    temporary = checkpoint.begin(root, 1)
    record = checkpoint.write_weights(temporary, "embed", tiny_shards.weights(NEOX)["embed"])
    checkpoint.reread(temporary, [record])
    flip(temporary / "embed.safetensors")
    with pytest.raises(DamagedError, match=r"embed\.safetensors was altered: .*; the disk did not keep what"):
        checkpoint.reread(temporary, [record])


def test_no_save_begins_without_room_for_it(root):
    with pytest.raises(FullDiskError, match=r"checkpoint_1: 1000000000.0 GB are needed and .* has room for"):
        checkpoint.begin(root, 1, needed=10**18)
    assert names(root) == []


def test_latest_is_believed(root):
    write_checkpoint(root, 10)
    write_checkpoint(root, 5)
    assert checkpoint.latest(root) == root / "checkpoint_5"


def test_no_checkpoints_at_all(root):
    assert checkpoint.latest(root) is None
    assert checkpoint.newest_verified(root) is None


def test_only_broken_checkpoints_do_not_mean_a_new_start(root):
    write_checkpoint(root, 5)
    (root / "latest").unlink()
    (root / "checkpoint_5" / "manifest.json").unlink()
    with pytest.raises(UserError, match="holds the checkpoints 5 but none is whole: copy a whole one here, or move"):
        checkpoint.latest(root)


def test_newest_verified_reads_the_bytes(root):
    for step in (1, 2, 3):
        write_checkpoint(root, step)
    flip(root / "checkpoint_3" / "head.safetensors")
    assert checkpoint.newest_verified(root) == root / "checkpoint_2"
    assert checkpoint.newest_verified(root, but=root / "checkpoint_2") == root / "checkpoint_1"


def test_prune_keeps_the_newest(root):
    for step in (1, 2, 10, 20):
        write_checkpoint(root, step)
    assert checkpoint.prune(root, 2) == [root / "checkpoint_1", root / "checkpoint_2"]
    assert names(root) == ["checkpoint_10", "checkpoint_20", "latest"]
    assert checkpoint.prune(root, 2) == []


def test_prune_deletes_nothing_that_a_damaged_one_would_replace(root):
    for step in (1, 2, 3):
        write_checkpoint(root, step)
    flip(root / "checkpoint_3" / "head.safetensors")
    assert checkpoint.prune(root, 1) == [root / "checkpoint_1"]
    assert names(root) == ["checkpoint_2", "checkpoint_3", "latest"]
    flip(root / "checkpoint_2" / "embed.safetensors")
    assert checkpoint.prune(root, 1) == []


def test_prune_believes_a_caller_who_verified(root):
    for step in (1, 2, 3):
        write_checkpoint(root, step)
    assert checkpoint.prune(root, 1, verified=root / "checkpoint_2") == [root / "checkpoint_1"]


def test_prune_leaves_what_is_protected_not_uploaded_or_still_written(root):
    for step in (1, 2, 3, 4, 5):
        write_checkpoint(root, step)
    (root / ".checkpoint_6.tmp").mkdir()
    for step, prefix in ((1, "s3://a/b"), (2, "s3://other"), (4, "s3://a/b")):
        path = root / f"checkpoint_{step}"
        checkpoint.mark_uploaded(path, prefix, checkpoint.list_files(path)[-1])
    assert checkpoint.prune(root, 1, protected=[4], uploads_to="s3://a/b") == [root / "checkpoint_1"]
    checkpoint.verify(root / "checkpoint_2")
    assert checkpoint.prune(root, 1, protected=[4]) == [root / "checkpoint_2", root / "checkpoint_3"]
    assert names(root) == [".checkpoint_6.tmp", "checkpoint_4", "checkpoint_5", "latest"]


def test_prune_leaves_what_is_not_ours(root):
    for step in (1, 2):
        write_checkpoint(root, step)
    for foreign in ("0", "notes", "checkpoint_0x"):
        (root / foreign).mkdir()
        (root / foreign / "prank_0_checkpoint.pt").write_bytes(b"")
    checkpoint.prune(root, 1)
    assert names(root) == ["0", "checkpoint_0x", "checkpoint_2", "latest", "notes"]


def test_a_kill_while_pruning_leaves_no_half_checkpoint(root, monkeypatch):
    for step in (1, 2):
        write_checkpoint(root, step)

    def killed(path, **kwargs):
        (path / "manifest.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_folders.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.prune(root, 1)
    monkeypatch.undo()
    assert checkpoint.list_steps(root) == [2]
    checkpoint.remove_leftovers(root)
    assert names(root) == ["checkpoint_2", "latest"]


@pytest.mark.parametrize(
    ("name", "step"),
    [("checkpoint_12", 12), ("12", 12), ("checkpoint_", None), ("checkpoint_1x", None), (".checkpoint_1.tmp", None)],
)
def test_parse_step(name, step, tmp_path):
    assert checkpoint.parse_step(name) == step
    if step is not None:
        assert checkpoint.parse_step(checkpoint.checkpoint_path(tmp_path, step).name) == step


def test_locate_takes_a_checkpoint_its_parent_and_either_spelling(root):
    write_checkpoint(root, 3)
    write_checkpoint(root, 4)
    assert checkpoint.locate(root) == root / "checkpoint_4"
    assert checkpoint.locate(root / "checkpoint_3") == root / "checkpoint_3"
    assert checkpoint.locate(root / "3") == root / "checkpoint_3"
    os.rename(root / "checkpoint_3", root / "3")
    assert checkpoint.locate(root / "checkpoint_3") == root / "3"
    assert checkpoint.locate(root / "3") == root / "3"
    assert checkpoint.list_steps(root) == [3, 4]


def test_locate_says_what_it_found(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/x holds no checkpoint: found no such folder; expected")):
        checkpoint.locate(tmp_path / "x")
    with pytest.raises(UserError, match="found nothing; expected checkpoint_<step> or a folder"):
        checkpoint.locate(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"found notes\.txt"):
        checkpoint.locate(tmp_path)


def test_a_checkpoint_of_the_original_has_no_state(tmp_path):
    folder = tmp_path / "100"
    folder.mkdir()
    torch.save({}, folder / legacy.stage_file(0))
    (tmp_path / "latest").write_text("100")
    assert checkpoint.latest(tmp_path) == folder
    with pytest.raises(
        UserError, match="is a checkpoint of the original kit, which holds no state to resume from: make"
    ):
        checkpoint.read_state(folder)


def test_weights_that_do_not_fit_the_config(root):
    write_checkpoint(root, 1)
    (root / "checkpoint_1" / "config.json").write_text(json.dumps({**NEOX, "vocab_size": 25}))
    with pytest.raises(UserError, match=r"embed_in.weight of embed is \[24, 8\], config.json says \[25, 8\]"):
        checkpoint.read_weights(root / "checkpoint_1", "embed")
