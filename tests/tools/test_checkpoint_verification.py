"""The command `verify_checkpoint`: what it prints, what it repairs, and that it changes nothing else."""

import os
import shutil

import pytest
from tiny_shards import flip, write_checkpoint

from openchatkit.formats import checkpoint
from openchatkit.tools import checkpoint_verification


@pytest.fixture
def root(tmp_path):
    """A run's folder with the checkpoints 5, 10 and 15."""
    for step in (5, 10, 15):
        write_checkpoint(tmp_path / "run", step)
    return tmp_path / "run"


@pytest.fixture
def verify(capsys):
    """Run the command; returns (status, stdout, stderr)."""

    def run(*argv):
        with pytest.raises(SystemExit) as ended:
            checkpoint_verification.main([str(argument) for argument in argv])
        said = capsys.readouterr()
        return ended.value.code, said.out, said.err

    return run


def contents(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


def test_whole_checkpoints_of_a_run_of_several_and_one_alone(root, verify):
    before = contents(root)
    for folder in (root, root.parent):
        status, printed, errors = verify(folder)
        assert (status, errors) == (0, "")
        lines = printed.splitlines()
        assert [line.split(": whole, ")[0] for line in lines[:-1]] == [
            str(root / f"checkpoint_{n}") for n in (5, 10, 15)
        ]
        assert lines[-1] == f"{root}: latest is checkpoint_15"
    size = sum(path.stat().st_size for path in (root / "checkpoint_10").iterdir() if path.name != "manifest.json")
    assert verify(root / "checkpoint_10")[:2] == (0, f"{root}/checkpoint_10: whole, {size / 1000:.1f} kB\n")
    assert contents(root) == before


def test_damage_is_named_and_changes_no_file(root, verify):
    flip(root / "checkpoint_10" / "head.safetensors")
    before = contents(root)
    status, printed, errors = verify(root)
    assert status == 2
    assert f"{root}/checkpoint_10: DAMAGED: {root}/checkpoint_10/head.safetensors was altered" in printed
    assert errors.startswith(f"error: {root}/checkpoint_10/head.safetensors was altered: its SHA-256 is ")
    assert verify(root / "checkpoint_10")[0] == 2
    assert contents(root) == before


def replace_by_another(root):
    shutil.copytree(root / "checkpoint_5", root / "checkpoint_15", dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("damage", "said", "left"),
    [
        (lambda root: (root / "latest").unlink(), "names no checkpoint", ""),
        (lambda root: (root / "latest").write_text("99"), "names no checkpoint", ""),
        (
            lambda root: os.truncate(root / "checkpoint_15" / "head.safetensors", 9),
            "names checkpoint_15, which",
            "head.safetensors has 9 bytes",
        ),
        (replace_by_another, "names checkpoint_15, which", "checkpoint_15 holds the checkpoint of step 5"),
    ],
    ids=["missing", "wrong", "truncated", "of another step"],
)
def test_a_latest_that_leads_nowhere_good_is_named_and_repaired(root, verify, damage, said, left):
    damage(root)
    newest = checkpoint.newest_verified(root)
    status, printed, errors = verify(root)
    assert status == 2
    assert f"{root}: latest {said}" in printed
    assert f"latest {said}" in errors
    assert f"the newest verified checkpoint is {newest}; run this again with --repair latest to go on from" in errors
    status, printed, errors = verify(root, "--repair", "latest")
    assert status == (2 if left else 0), "a damaged checkpoint is no less so for it"
    assert left in errors
    assert f"{root}: latest is {newest.name} from now on" in printed
    assert checkpoint.latest(root) == newest


def test_a_good_latest_is_not_moved_by_a_repair(root, verify):
    """It may name an older one on purpose."""
    checkpoint.point_to(root, 5)
    assert verify(root, "--repair", "latest")[0] == 0
    assert checkpoint.latest(root) == root / "checkpoint_5"
    flip(root / "checkpoint_10" / "head.safetensors")
    status, _, errors = verify(root, "--repair", "latest")
    assert status == 2
    assert "checkpoint_10/head.safetensors was altered" in errors
    assert checkpoint.latest(root) == root / "checkpoint_5"


def test_latest_of_a_run_that_goes_on_is_not_repaired(root, verify):
    (root / "latest").unlink()
    with checkpoint.lock_run(root):
        status, _, errors = verify(root, "--repair", "latest")
    assert (status, errors) == (2, f"error: {root} is in use by another run: wait for it, or give another folder\n")


def test_mistakes(root, verify, tmp_path):
    for path in (root / "checkpoint_5", root / "checkpoint_10", root / "checkpoint_15"):
        (path / "manifest.json").unlink()
    for flags in ((), ("--repair", "latest")):
        assert "no checkpoint is whole: copy a whole one here, or move these away (and 3 mo" in verify(root, *flags)[2]
    assert "--repair latest is for the folder of a run" in verify(root / "checkpoint_5", "--repair", "latest")[2]
    assert f"{tmp_path}/none: no such folder" in verify(tmp_path / "none")[2]
    assert "--repair state: only the file latest can be repaired" in verify(root, "--repair", "state")[2]
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path}/empty holds no checkpoint: expected checkpoint_<step>" in verify(tmp_path / "empty")[2]
