"""benchmarks/gpu_check.py: that no failure, hang or silence of a part goes unreported, and the whole on the CPU."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from openchatkit.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_check.py"
NEEDS_CUDA = "needs CUDA"


@pytest.fixture
def kit(monkeypatch):
    """The modules of the check that know no torch."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from _gpu_check import report, rows, runner

    return SimpleNamespace(report=report, rows=rows, runner=runner)


@pytest.fixture
def run_parts(kit, tmp_path):
    """Run parts whose code is given by name, each with a limit; returns (part, name, status, reason) of every row."""

    def run(code: dict[str, str], *, limit: float = 20.0, seconds: float = 60.0) -> list[tuple[str, str, str, str]]:
        path = tmp_path / "rows.jsonl"
        names = {"path": str(path), "folder": str(SCRIPT.parent)}

        def command(part, seconds):
            begin = f"import sys; sys.path.insert(0, {names['folder']!r})\nfrom pathlib import Path\n"
            begin += f"from _gpu_check.rows import Row, append\npath = Path({names['path']!r})\n"
            return [sys.executable, "-c", begin + code[part.name]]

        parts = [kit.runner.Part(name, 1, limit) for name in code]
        found = kit.runner.run(parts, command, seconds=seconds, folder=tmp_path)
        return [(row.part, row.name, row.status, row.reason) for row in found]

    return run


GOOD = "append(path, Row('good', 'all of it', 'passed'))"


def test_a_part_that_crashes_is_a_row_and_the_next_one_runs(run_parts):
    code = {"bad": "append(path, Row('bad', 'one', 'passed'))\nraise ValueError('too small')", "good": GOOD}
    assert run_parts(code) == [
        ("bad", "one", "passed", ""),
        ("bad", "the rest", "failed", "exit status 1: ValueError: too small"),
        ("good", "all of it", "passed", ""),
    ]


def test_a_part_that_is_killed_or_says_nothing_has_failed(run_parts):
    code = {"killed": "import os\nos.kill(os.getpid(), 9)", "silent": "", "good": GOOD}
    assert run_parts(code) == [
        ("killed", "all", "failed", "killed by signal 9"),
        ("silent", "all", "failed", "reported nothing"),
        ("good", "all of it", "passed", ""),
    ]


def test_a_part_that_hangs_is_cut_with_all_that_it_started(run_parts, tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import subprocess, time\nchild = subprocess.Popen(['sleep', '600'])\n"
        f"Path({str(pid)!r}).write_text(str(child.pid))\ntime.sleep(600)"
    )
    started = time.monotonic()
    found = run_parts({"hangs": code, "good": GOOD}, limit=3)
    assert found == [("hangs", "all", "cut", "ended after 3 s"), ("good", "all of it", "passed", "")]
    assert time.monotonic() - started < 30
    for _ in range(100):
        if not _runs(int(pid.read_text())):
            break
        time.sleep(0.05)
    assert not _runs(int(pid.read_text()))


def _runs(pid: int) -> bool:
    """Whether a process is there and no zombie that waits to be collected."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return bool(state.strip()) and not state.strip().startswith("Z")


def test_a_part_for_which_no_time_is_left_is_cut_unstarted(run_parts, tmp_path):
    found = run_parts({"slow": "import time\ntime.sleep(600)", "late": GOOD}, limit=6, seconds=8)
    assert [row[:3] for row in found] == [("slow", "all", "cut"), ("late", "all", "cut")]
    assert re.fullmatch(r"out of time: \d s of 8 left", found[1][3])
    assert not (tmp_path / "late.log").exists()


def test_a_row_that_a_killed_part_left_half_written_is_no_row(run_parts):
    code = "append(path, Row('torn', 'one', 'passed'))\npath.open('a').write('{\"part\": \"to')\nimport os\nos._exit(1)"
    assert run_parts({"torn": code, "good": GOOD}) == [
        ("torn", "one", "passed", ""),
        ("torn", "the rest", "failed", "exit status 1: nothing on stderr"),
        ("good", "all of it", "passed", ""),
    ]


def test_every_outcome_of_a_check(kit, tmp_path, capsys):
    context = kit.rows.Context("part", tmp_path / "rows.jsonl", device="cpu", size="toy", seconds=100)

    def unmet(result):
        result.values["found"] = 2.0
        result.require(False, "it is 2")

    def skip(result):
        raise kit.rows.Skip("nothing to see")

    context.check("met", lambda result: result.require(True, "never said"))
    context.check("figures alone", lambda result: result.values.update(ms=1.5))
    context.check("unmet", unmet)
    context.check("raises", lambda result: 1 / 0)
    context.check("not finite", lambda result: result.values.update(ms=math.nan))
    context.check("skips", skip)
    context.check("a GPU's", unmet, needs_cuda=True)
    context.check("too long", unmet, needs_seconds=1000)
    found = kit.rows.read(tmp_path / "rows.jsonl")
    assert [(row.name, row.status, row.reason) for row in found[:-1]] == [
        ("met", "passed", ""),
        ("figures alone", "measured", ""),
        ("unmet", "failed", "it is 2"),
        ("raises", "failed", "ZeroDivisionError: division by zero"),
        ("not finite", "failed", "not finite: ms"),
        ("skips", "skipped", "nothing to see"),
        ("a GPU's", "skipped", NEEDS_CUDA),
    ]
    assert (found[-1].status, found[-1].reason[:13]) == ("cut", "needs 1000 s,")
    assert found[2].values == {"found": 2.0}
    assert len(capsys.readouterr().out.splitlines()) == len(found)


def test_exit_status_and_tables(kit, tmp_path):
    row = kit.rows.Row
    good = [
        row("a", "one", "passed", values={"ms": 12.345, "equal": True}),
        row("a", "two", "skipped", NEEDS_CUDA),
        row("a", "three", "measured", values={"GB": 1234.5}),
        row("b", "four", "measured", values={"ms": 1}),
    ]
    assert kit.report.exit_status(good) == 0
    assert kit.report.exit_status([]) == 1
    assert kit.report.exit_status([*good, row("b", "five", "failed", "why")]) == 1
    assert kit.report.exit_status([*good, row("b", "five", "cut", "why")]) == 1
    kit.report.write(tmp_path, good, {"device": "cpu"})
    assert json.loads((tmp_path / "results.json").read_text())["rows"][1]["reason"] == NEEDS_CUDA
    assert (tmp_path / "results.md").read_text() == (
        "| a | ms | equal | result |\n|-|-|-|-|\n| one | 12.3 | yes | passed |\n| two |  |  | skipped: needs CUDA |\n\n"
        "| a | GB | result |\n|-|-|-|\n| three | 1234 | measured |\n\n"
        "| b | ms | result |\n|-|-|-|\n| four | 1 | measured |\n"
    )


def test_a_model_that_computes_something_else_fails(kit, monkeypatch):
    from _gpu_check import correctness

    from openchatkit.models import gpt_neox
    from openchatkit.models.layers import causal_attention

    def wrong(query, *others):
        return causal_attention(query, *others) * (1 if query.dtype == torch.float64 else 1.0001)

    monkeypatch.setattr(gpt_neox, "causal_attention", wrong)
    reference = correctness.Reference("neox, parallel", "documents")
    with pytest.raises(kit.rows.Unmet, match="float32: a gradient is off by"):
        correctness.one_step(kit.rows.Result(), torch.device("cpu"), reference, recompute=False)
    monkeypatch.undo()


def check(folder: Path, *arguments: str, seconds: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPT), "--output", str(folder), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)


def test_a_part_that_is_not_there_is_named(tmp_path):
    ended = check(tmp_path, "--parts", "machine,nothing")
    assert ended.returncode == 2
    assert "no part 'nothing'; there are machine, correctness," in ended.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_every_part_fails_and_says_why(tmp_path):
    ended = check(tmp_path, "--parts", "machine")
    assert ended.returncode == 1
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert (row["part"], row["status"], row["reason"]) == ("machine", "failed", "torch finds no CUDA device")


def test_ended_from_outside_it_leaves_no_part_running(tmp_path):
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path), "--device", "cpu", "--parts", "correctness"]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}) as process:
        limit = time.monotonic() + 60
        while not (parts := _children(process.pid)):
            assert time.monotonic() < limit, "no part was started within a minute"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not any(map(_runs, parts))


def test_ended_while_a_part_is_being_started_it_leaves_none_running(tmp_path):
    code = f"""
import os, pathlib, signal, subprocess, sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
from _gpu_check import runner
folder = pathlib.Path({str(tmp_path)!r})
start = subprocess.Popen
def start_and_be_ended(*arguments, **options):
    process = start(*arguments, **options)
    (folder / "pid").write_text(str(process.pid))
    os.kill(os.getpid(), signal.SIGTERM)
    return process
subprocess.Popen = start_and_be_ended
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
runner.run([runner.Part("long", 1, 600)], lambda *_: ["sleep", "600"], seconds=600, folder=folder)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 128 + signal.SIGTERM
    assert not _runs(int((tmp_path / "pid").read_text()))


def _children(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-A", "-o", "ppid=,pid="], capture_output=True, text=True).stdout
    pairs = (map(int, line.split()) for line in found.splitlines())
    return [child for parent, child in pairs if parent == pid]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_whole_on_the_cpu(tmp_path):
    ended = check(tmp_path, "--device", "cpu", "--seconds", "800", seconds=850)
    whole = json.loads((tmp_path / "results.json").read_text())
    found = {(row["part"], row["name"]): row for row in whole["rows"]}
    logs = "\n".join(path.read_text()[-500:] for path in tmp_path.glob("*.log"))
    assert ended.returncode == whole["exit_status"] == 0, ended.stdout + ended.stderr + logs
    assert {part for part, _ in found} == set(whole["parts"])
    # Nothing is skipped but what only a GPU has, and 8-bit Adam without bitsandbytes.
    skipped = {key: row["reason"] for key, row in found.items() if row["status"] == "skipped"}
    skipped.pop(("trainer", "8-bit Adam"), None)
    assert set(skipped.values()) == {NEEDS_CUDA}
    expected = [("machine", "card"), ("profile", "calls that may wait for the GPU"), ("trainer", "out of memory")]
    assert {*expected, ("snapshot", "into pinned memory"), ("training", "2 x 64, kept, cuDNN")} <= skipped.keys()
    steps = [row for (part, name), row in found.items() if part == "correctness" and name.startswith("one step")]
    assert len(steps) == 16, "four models, plain and documents, recomputed or not"
    for row in steps:
        assert row["status"] == "passed"
        assert 0 < row["values"]["float32"] < row["values"]["float16"] < row["values"]["bfloat16"]
    for key in [
        ("trainer", "SIGTERM in a step"),
        ("trainer", "kill -9 in a step"),
        ("deterministic", "a step twice, plain"),
    ]:
        assert found[key]["status"] == "passed"
    resumed = found["trainer", "resumed, against unstopped"]["values"]
    assert resumed["tensors"] > 0
    assert resumed["tensors that differ"] == 0
    assert found["profile", "weight casts of a step"]["values"]["casts a matrix"] == 0
    assert 0 < found["training", "2 x 64, recomputed"]["values"]["MFU, measured rate"] < 1
    assert found["decoding", "2 x 64, compiled"]["values"]["tokens/s"] > 0
    assert (
        f"| resumed, against unstopped | {resumed['tensors']} | 0 | passed |" in (tmp_path / "results.md").read_text()
    )
