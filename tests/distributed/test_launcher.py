"""The launcher with tiny scripts as ranks: passing on output, naming the failure, and leaving no process."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from openchatkit.distributed import launcher
from openchatkit.errors import UserError
from openchatkit.paths import ROOT

# Every script starts with this: its own rank, files that mark how far it has come, and whole lines written at once
# (unbuffered, print writes a line and its end separately, and those of two ranks mix).
PRELUDE = """
import os, signal, subprocess, sys, time
from pathlib import Path
rank = int(sys.argv[sys.argv.index("--rank") + 1])
here = Path(__file__).parent
def reached(name): (here / f"{name}.tmp").write_text(str(os.getpid())); (here / f"{name}.tmp").rename(here / name)
def await_file(name):
    while not (here / name).exists(): time.sleep(0.01)
def await_end(pid):
    try:
        while True: os.kill(pid, 0); time.sleep(0.01)
    except ProcessLookupError: pass
def handle(action):
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, action)
def say(*words): sys.stdout.write(" ".join(words) + "\\n")
def fail(text, status): print(text, file=sys.stderr, flush=True); sys.exit(status)
"""


@pytest.fixture
def start(tmp_path):
    """Start the launcher on a script's body; processes that are left are killed at the end of the test."""
    started = []
    # nohup makes processes ignore it, children inherit that, and the launcher respects it: not in these tests.
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def start_launcher(body: str, *flags: str, ranks: int = 3, arguments: tuple[str, ...] = (), **environment: str):
        script = tmp_path / "rank.py"
        script.write_text(PRELUDE + body)
        command = [sys.executable, str(ROOT / "training" / "launch.py"), "--world-size", str(ranks), *flags]
        process = subprocess.Popen(
            [*command, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        started.append(process)
        return process

    yield start_launcher
    signal.signal(signal.SIGHUP, before)
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def run(start):
    """Run the launcher to its end: (status, stdout, stderr)."""

    def run_launcher(body: str, *flags: str, **options):
        process = start(body, *flags, **options)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    return run_launcher


def wait_for(condition, seconds: float = 30.0):
    """Wait until `condition()` is true; fail the test if it never is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but was not yet reaped does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout
    return not state.strip().startswith("Z") and bool(state.strip())


def test_each_rank_gets_its_numbers_and_one_thread(run):
    body = "say(*sys.argv[1:], os.environ['OMP_NUM_THREADS'])"
    status, out, err = run(body, ranks=2, arguments=("--lr", "1"), OMP_NUM_THREADS="")
    assert (status, err) == (0, "")
    assert sorted(out.splitlines()) == [
        "--lr 1 --rank 0 --cuda-id 0 --world-size 2 1",
        "--lr 1 --rank 1 --cuda-id 1 --world-size 2 1",
    ]


def test_a_given_number_of_threads_is_kept(run):
    _, out, _ = run("say(os.environ['OMP_NUM_THREADS'])", ranks=2, OMP_NUM_THREADS="3")
    assert out.split() == ["3", "3"]


def test_a_single_rank_keeps_all_threads(run):
    _, out, _ = run("say('threads', os.environ['OMP_NUM_THREADS'])", ranks=1, OMP_NUM_THREADS="")
    assert out == "threads \n"


def test_a_second_machine_starts_its_own_ranks_only(run):
    body = "say(*sys.argv[1:])"
    status, out, _ = run(body, "--first-rank", "2", "--ranks-here", "2", ranks=8)
    assert status == 0
    assert sorted(out.splitlines()) == ["--rank 2 --cuda-id 0 --world-size 8", "--rank 3 --cuda-id 1 --world-size 8"]


def test_stderr_of_the_lead_is_unchanged_and_of_the_others_marked(run):
    body = """
if rank == 1: await_file("said")
sys.stderr.write(f"line {rank}\\nlast {rank}" + "\\n" * (1 - rank))
sys.stderr.flush()
if rank == 0: reached("said")
"""
    status, _, err = run(body, ranks=2)
    assert (status, err) == (0, "line 0\nlast 0\n[rank 1] line 1\n[rank 1] last 1\n")


def test_a_failing_rank_stops_the_others_and_is_named(run):
    body = """
if rank == 1: fail("Traceback: it broke", 1)
time.sleep(60)
"""
    status, _, err = run(body)
    assert status == 1
    assert err.splitlines() == [
        "[rank 1] Traceback: it broke",
        "error: rank 1 ended with status 1; the other ranks were stopped",
    ]


def test_other_statuses_become_status_1(run):
    status, _, err = run("if rank == 1: sys.exit(7)\ntime.sleep(60)", ranks=2)
    assert status == 1
    assert err == "error: rank 1 ended with status 7; the other ranks were stopped\n"


def test_a_killed_rank_is_named_before_those_that_noticed_sooner(run):
    body = """
if rank == 2:
    await_file("noticed")
    await_end(int((here / "noticed").read_text()))  # else the launcher stops it as soon as this one is killed
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 1:
    reached("noticed")
    fail("error: lost a peer", 75)
time.sleep(60)
"""
    status, _, err = run(body)
    assert status == 1
    assert err.splitlines() == [
        "[rank 1] error: lost a peer",
        "error: rank 2 was killed (likely out of memory); the other ranks were stopped; "
        "the same command resumes from the newest checkpoint",
    ]


def test_a_signal_is_named(run):
    status, _, err = run("if rank == 1: os.kill(os.getpid(), signal.SIGSEGV)\ntime.sleep(60)", ranks=2)
    assert status == 1
    assert err == "error: rank 1 was ended by SIGSEGV; the other ranks were stopped\n"


def test_a_mistake_that_all_ranks_find_is_one_line(run):
    status, _, err = run("fail('error: --lr must be positive', 2)")
    assert (status, err) == (2, "error: --lr must be positive\n")


def test_a_mistake_that_one_rank_finds_is_printed(run):
    status, _, err = run("if rank == 1: fail('error: data.jsonl:3 is no object', 2)\ntime.sleep(60)")
    assert status == 2
    assert err.splitlines() == [
        "[rank 1] error: data.jsonl:3 is no object",
        "error: rank 1 ended with status 2; the other ranks were stopped",
    ]


def test_a_mistake_that_several_others_find_is_printed_once(run):
    body = "if rank: fail('error: no interface nope0', 2)\ntime.sleep(60)"
    status, _, err = run(body)
    assert status == 2
    assert err.count("no interface nope0") == 1


def test_an_error_line_of_a_run_that_ends_well_is_not_lost(run):
    assert run("if rank: fail('error: only talk', 0)", ranks=2) == (0, "", "[rank 1] error: only talk\n")


def test_the_resumable_status_is_passed_on(run):
    body = "fail('error: lost a peer', 75)"
    status, _, err = run(body, ranks=2)
    assert status == 75
    last = err.splitlines()[-1]
    assert last.endswith("ended with status 75; the same command resumes from the newest checkpoint")


def test_a_rank_that_ignores_sigterm_is_killed(run):
    body = """
handle(signal.SIG_IGN)
if rank == 1:
    await_file("deaf")
    fail("error: wrong", 2)
reached("deaf")
time.sleep(60)
"""
    status, _, err = run(body, ranks=2)
    assert status == 2
    assert "error: rank 1 ended with status 2; the other ranks were stopped" in err


def test_a_suspended_rank_is_woken_to_end(run, tmp_path):
    body = """
if rank == 1:
    await_file("stopping")
    time.sleep(0.2)
    sys.exit(1)
handle(lambda *_: (reached("woken"), sys.exit(75)))
reached("stopping")
os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(60)
"""
    status, _, _ = run(body, ranks=2)
    assert status == 1
    assert (tmp_path / "woken").exists()


SAVES_AND_ENDS = """
def save(*_):
    time.sleep(0.5)
    reached(f"saved{rank}")
    sys.exit(75)
handle(save)
reached(f"ready{rank}")
while True: time.sleep(1)
"""


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_end_reaches_every_rank(start, tmp_path, signum):
    process = start(SAVES_AND_ENDS)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(3)))
    process.send_signal(signum)
    time.sleep(0.2)
    process.send_signal(signum)  # an echo, as timeout(1) makes, must not kill
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(3))


def test_a_second_request_kills(start, tmp_path):
    process = start("handle(lambda *_: reached(f'asked{rank}'))\nreached(f'ready{rank}')\nwhile True: time.sleep(1)")
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(3)))
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: all((tmp_path / f"asked{rank}").exists() for rank in range(3)))
    time.sleep(1.1)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, "error: killed by a second signal before all ranks had ended\n")


def test_ranks_interrupted_before_they_could_save_are_resumable(start, tmp_path):
    process = start("reached(f'ready{rank}')\ntime.sleep(60)", ranks=2)
    wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    message = "error: stopped before a checkpoint could be written; the same command resumes from the newest one\n"
    assert (process.returncode, err) == (75, message)


def test_no_rank_outlives_a_killed_launcher(start, tmp_path):
    body = "handle(signal.SIG_IGN)\nreached(f'ready{rank}')\ntime.sleep(600)"
    process = start(body)
    pids = [tmp_path / f"ready{rank}" for rank in range(3)]
    wait_for(lambda: all(pid.exists() for pid in pids))
    process.kill()
    wait_for(lambda: not any(alive(int(pid.read_text())) for pid in pids))


def test_processes_started_by_a_failed_rank_end_with_it(run, tmp_path):
    body = """
if rank == 1:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stderr=subprocess.DEVNULL)
    (here / "child").write_text(str(child.pid))
    sys.exit(1)
"""
    status, _, _ = run(body, ranks=2)
    assert status == 1
    wait_for(lambda: not alive(int((tmp_path / "child").read_text())))


def test_a_missing_script():
    with pytest.raises(UserError, match=r"no script nowhere\.py: the launcher is given the training script"):
        launcher.launch(Path("nowhere.py"), [], world_size=2)


@pytest.mark.parametrize("argument", ["--rank", "--cuda-id=1", "--world-size"])
def test_flags_that_the_launcher_sets_are_refused(argument):
    with pytest.raises(UserError, match="but the launcher sets it for each rank: leave it out"):
        launcher.launch(Path(__file__), [argument, "1"], world_size=2)


@pytest.mark.parametrize(("first", "here"), [(2, None), (1, 2)])
def test_ranks_beyond_the_world_are_refused(first, here):
    with pytest.raises(UserError, match="do not fit a world of 2: --first-rank plus --ranks-here"):
        launcher.launch(Path(__file__), [], world_size=2, first_rank=first, ranks_here=here)


# A rank of it counts how often it was started.
COUNTS = """
(here / f"starts{rank}").open("a").write("x")
start = len((here / f"starts{rank}").read_text())
"""
RESTART = ("--restart-delay", "0.01", "--max-restarts")


def starts(folder: Path, rank: int = 0) -> int:
    return len((folder / f"starts{rank}").read_text())


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "fail('error: lost a peer', 75)"], ids=["killed", "lost a peer"]
)
def test_an_end_by_chance_is_followed_by_a_restart_of_all_ranks(run, tmp_path, end):
    other = "time.sleep(60)" if "KILL" in end else end
    body = f"""
{COUNTS}
if start == 1 and rank: {other}
if start == 1: await_file("starts1"); {end}
"""
    status, _, err = run(body, *RESTART, "3", ranks=2)
    assert status == 0, err
    assert (starts(tmp_path, 0), starts(tmp_path, 1)) == (2, 2)
    assert "starting all ranks again in 0.01 s (restart 1 of 3 without a new checkpoint)" in err


@pytest.mark.parametrize("wrong", [1, 2])
def test_a_mistake_or_a_defect_is_not_followed_by_a_restart(run, tmp_path, wrong):
    status, _, err = run(f"{COUNTS}\nfail('error: wrong', {wrong})", *RESTART, "3", ranks=1)
    assert (status, starts(tmp_path)) == (wrong, 1)
    assert "again" not in err


def test_restarts_without_progress_are_given_up(run, tmp_path):
    status, _, err = run(f"{COUNTS}\nsys.exit(75)", *RESTART, "2", ranks=1)
    assert (status, starts(tmp_path)) == (75, 3)
    assert err.splitlines()[-1] == "error: given up: no new checkpoint in 2 restarts in a row (--max-restarts)"


def test_progress_makes_restarts_count_from_the_beginning(run, tmp_path):
    body = f"""
from openchatkit.distributed.processes import note_progress
{COUNTS}
if start <= 4: note_progress(start)
sys.exit(75 if start < 5 else 0)
"""
    status, _, err = run(body, *RESTART, "1", ranks=1)
    assert (status, starts(tmp_path)) == (0, 5), err
    assert err.count("restart 1 of 1") == 4


def test_waits_before_restarts_double(run, tmp_path):
    _, _, err = run(f"{COUNTS}\nsys.exit(75)", "--restart-delay", "0.3", "--max-restarts", "2", ranks=1)
    assert "again in 0.3 s (restart 1 of 2" in err
    assert "again in 0.6 s (restart 2 of 2" in err


def test_nothing_is_restarted_without_the_flag(run, tmp_path):
    status, _, err = run(f"{COUNTS}\nsys.exit(75)", ranks=1)
    assert (status, starts(tmp_path)) == (75, 1)
    assert "again" not in err


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_request_during_the_wait_ends_it(start, tmp_path, signum):
    process = start(f"{COUNTS}\nsys.exit(75)", "--restart-delay", "60", "--max-restarts", "2", ranks=1)
    line = process.stderr.readline()
    while "again in 60 s" not in line:
        line = process.stderr.readline()
    process.send_signal(signum)
    _, err = process.communicate(timeout=50)
    assert process.returncode == 75
    assert err == "error: stopped before a restart; the same command resumes from the newest checkpoint\n"
    assert starts(tmp_path) == 1


def test_a_run_that_was_asked_to_stop_is_not_restarted(start, tmp_path):
    process = start(COUNTS + SAVES_AND_ENDS, *RESTART, "5", ranks=1)
    wait_for(lambda: (tmp_path / "ready0").exists())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err, starts(tmp_path)) == (75, "", 1)


def test_a_run_that_stops_as_planned_is_not_restarted(run, tmp_path):
    body = f"""
from openchatkit.distributed.processes import note_stop
{COUNTS}
note_stop("step 3")
sys.exit(75)
"""
    status, _, err = run(body, *RESTART, "5", ranks=2)
    assert (status, starts(tmp_path, 0), starts(tmp_path, 1)) == (75, 1, 1)
    assert "again" not in err


DIES = """
from openchatkit.distributed.processes import note_verdict
def end(*_):
    note_verdict("rank VICTIM on here died in step 3")
    fail("error: rank VICTIM on here died in step 3", 75)
handle(end)
if rank != VICTIM: reached("handled"); time.sleep(60)
await_file("handled")
os.kill(os.getpid(), signal.SIGNAL)
"""


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("sign", ["SIGKILL", "SIGSEGV"])
def test_a_death_that_another_rank_has_named_is_one_line(run, victim, sign):
    """Whether it leads or not; of a crash, the launcher alone knows the signal."""
    mark = "[rank 1] " if victim == 0 else ""
    more = [f"[rank {victim}] rank {victim} was ended by SIGSEGV"] if sign == "SIGSEGV" else []
    status, _, err = run(DIES.replace("VICTIM", str(victim)).replace("SIGNAL", sign), ranks=2)
    assert status == 1
    assert err.splitlines() == [f"{mark}error: rank {victim} on here died in step 3", *more]


def test_a_death_that_no_rank_has_named_is_named_by_the_launcher(run):
    body = DIES.replace("    note_verdict", "    str").replace("VICTIM", "0").replace("SIGNAL", "SIGKILL")
    _, _, err = run(body, ranks=2)
    assert err.splitlines() == [
        "[rank 1] error: rank 0 on here died in step 3",
        "error: rank 0 was killed (likely out of memory); the other ranks were stopped; the same command resumes from "
        "the newest checkpoint",
    ]
