"""Commands in the places they are started in: without standard streams, in a locale of ASCII, without shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from openchatkit.data.stores import workers
from openchatkit.errors import UserError
from openchatkit.paths import ROOT
from openchatkit.training import config


def shell(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a line of sh in a folder; {python} is this interpreter."""
    return subprocess.run(
        ["sh", "-c", command.replace("{python}", sys.executable)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        errors="replace",
    )


@pytest.fixture
def rows(tmp_path: Path, tiny_tokenizer: Path) -> str:
    """A command that does some work, writes files and prints what it did."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one"}) + "\n")
    script = ROOT / "tools" / "preprocess_data.py"
    return (
        f"{{python}} {script} --input a.jsonl --output-prefix out --tokenizer-type HFTokenizer "
        f"--vocab-file {tiny_tokenizer}/tokenizer.json"
    )


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_error(tmp_path: Path, rows: str, closed: str) -> None:
    done = shell(f"{rows} {closed}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    # No file has become what the program writes its lines to.
    assert (tmp_path / "out_text_document.idx").read_bytes().startswith(b"MMIDIDX")


def test_a_path_that_the_locale_has_no_characters_for(tmp_path: Path, rows: str) -> None:
    folder = tmp_path / "d\u00e9j\u00e0 vu"
    folder.mkdir()
    (tmp_path / "a.jsonl").rename(folder / "a.jsonl")
    quiet = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = shell(rows.replace("--output-prefix out", f"--output-prefix '{folder}/out'"), folder, **quiet)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "out_text_document.idx").exists()


def test_without_shared_memory_one_process_does_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(30, "Read-only file system")

    assert workers.can_start()
    monkeypatch.setattr(workers.multiprocessing, "Lock", refuse)
    assert not workers.can_start()


FLAGS = ["--model-name", "m", "--task-name", "d", "--total-steps", "1"]


def test_one_rank_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Kubernetes' operators set; torchrun sets LOCAL_RANK as well."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    settings = config.parse(FLAGS)
    assert (settings.rank, settings.world_size, settings.cuda_id) == (0, 1, 0)


@pytest.mark.parametrize(("size", "found"), [(None, "is not set"), ("two", "is 'two'")])
def test_a_rank_without_a_world(monkeypatch: pytest.MonkeyPatch, size: str | None, found: str) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if size is not None:
        monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(UserError, match=f"RANK is set, and WORLD_SIZE {found}: expected a whole number"):
        config.parse(FLAGS)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adam-beta1", "1.0"], "expected a number of at least 0 and below 1, got '1.0'"),
        (["--adam-beta2", "1"], "expected a number of at least 0 and below 1, got '1'"),
        (["--initial-loss-scale", "0"], "expected a number above 0, got '0'"),
        (["--min-loss-scale", "0"], "expected a number above 0, got '0'"),
        (["--min-loss-scale", "1e9"], "--min-loss-scale 1e\\+09 is above --initial-loss-scale 32768"),
        (["--max-without-reply", "1.5"], "expected a share from 0 to 1, got '1.5'"),
    ],
)
def test_numbers_that_no_run_could_use(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config.parse([*FLAGS, *flags])
