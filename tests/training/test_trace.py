"""`training/trace.py`, `training/timing.py` and `formats/trace.py`: what each rank did in a step, on one clock."""

import itertools
import json
import time
from collections import Counter

import gloo_ranks
import pytest
import ranks
import torch

from openchatkit.distributed.layout import Layout
from openchatkit.formats import trace
from openchatkit.formats.trace import RankTrace, TraceSpan
from openchatkit.training import timing
from openchatkit.training.timing import StepTimer
from openchatkit.training.trace import TidyTrace, measure_offsets

MESSAGES = ("Send forward", "Receive forward", "Send backward", "Receive backward")


def assert_complete(traces: list[RankTrace], *, stages: int, micro_batches: int, steps: list[int]) -> None:
    """Each pass and each message between ranks is there once, in an order that can be."""
    passes = Counter((s.kind, s.step, s.stage, s.micro_batch) for t in traces for s in t.spans if s.stage is not None)
    assert set(passes.values()) == {1}
    every = set(itertools.product(steps, range(stages), range(micro_batches)))
    for kinds in (("Forward",), ("Backward", "Backward weight"), ("Backward", "Backward input")):
        assert {tuple(of) for name, *of in passes if name in kinds} == every, kinds
    owner = {s.stage: t.rank for t in traces for s in t.spans if s.stage is not None}
    for way, direction in ((1, "forward"), (-1, "backward")):
        crossing = {
            stage for stage in range(stages) if 0 <= stage + way < stages and owner[stage] != owner[stage + way]
        }
        sent = {tuple(of) for name, *of in passes if name == f"Send {direction}"}
        received = {
            (step, stage - way, number) for name, step, stage, number in passes if name == f"Receive {direction}"
        }
        assert sent == received == set(itertools.product(steps, crossing, range(micro_batches)))
    at = {(s.kind, s.step, s.stage, s.micro_batch): s for t in traces for s in t.spans}
    for (kind, step, stage, number), span in at.items():
        if kind == "Receive forward":
            assert span.end >= at["Send forward", step, stage - 1, number].start
        if kind == "Receive backward":
            assert span.end >= at["Send backward", step, stage + 1, number].start
    for one in traces:
        busy = sorted((s.start, s.end) for s in one.spans if not s.on_host)
        assert all(after[0] >= before[1] - 1e-9 for before, after in itertools.pairwise(busy))


def run_with_trace(folder, flags, **change):
    flags = {**flags, "profiling": "tidy_profiling", "trace_postfix": "x", "job_id": "job", **change}
    flags["checkpoint_path"] = folder / "ckpt"
    world_size = flags.get("pipeline_group_size", 1) * flags.get("data_group_size", 1)
    ended = ranks.train(folder, flags, world_size=world_size, workplace=folder)
    assert ended.statuses == [0] * world_size, ended.errors
    return trace.read(folder / "ckpt" / trace.TRACE)


def test_a_trace_of_two_ranks_has_every_pass_and_message(tmp_path, flags):
    traces = run_with_trace(tmp_path, flags, pipeline_group_size=2, pp_mode="1f1b", total_steps=6)
    assert [(one.rank, one.pipeline_rank) for one in traces] == [(0, 0), (1, 1)]
    assert_complete(traces, stages=2, micro_batches=4, steps=[3, 4, 5])
    for one in traces:
        kinds = {span.kind for span in one.spans}
        assert {"Data", "Sum gradients", "Norm", "Update"} <= kinds
        assert ("Loss" in kinds) == (one.rank == 1)
        own = json.loads((tmp_path / "trace_json" / f"job_rank{one.rank}_x.json").read_text())
        assert {"Forward 0", "Backward 3"} <= {event["name"] for event in own["traceEvents"]}


@pytest.mark.long
@pytest.mark.parametrize(
    ("change", "stages", "micro_batches"),
    [
        ({"pp_mode": "gpipe", "gradient_accumulate_step": 2}, 2, 8),
        ({"pp_mode": "gpipe", "data_group_size": 2}, 2, 4),
        ({"pp_mode": "interleaved"}, 4, 4),
        ({"pp_mode": "zero-bubble", "activation_checkpointing": "none"}, 2, 4),
        ({"pp_mode": "zero-bubble-v", "activation_checkpointing": "none"}, 4, 4),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else None,
)
def test_traces_of_all_schedules(tmp_path, flags, change, stages, micro_batches):
    traces = run_with_trace(tmp_path, flags, pipeline_group_size=2, total_steps=3, **change)
    for replica in range(change.get("data_group_size", 1)):
        of_replica = [one for one in traces if one.replica == replica]
        assert_complete(of_replica, stages=stages, micro_batches=micro_batches, steps=[1, 2, 3])


def test_a_receive_is_the_time_between_two_passes():
    timer = StepTimer(torch.device("cpu"))
    timer.start_step()
    with timer.compute(timing.FORWARD, 1, 0):
        pass
    timer.at_receive(1, 0, backward=True)
    time.sleep(0.02)
    with timer.compute(timing.BACKWARD, 1, 0):
        timer.end_batch(4)
    timer.at_send(1, 0, backward=True)
    forward, receive, backward, send = timer.spans(7)
    assert (forward.name, receive.name, backward.name, send.name) == (
        "Forward 0",
        "Receive backward 0",
        "Backward 0",
        "Send backward 4",
    )
    assert forward.end <= receive.start <= receive.end == backward.start
    assert timer.seconds(*timing.RECEIVES) == receive.end - receive.start >= 0.02
    assert {span.step for span in timer.spans(7)} == {7}
    timer.start_step()
    assert timer.spans(8) == []


@pytest.mark.parametrize(("steps", "recorded"), [(1, [1]), (3, [1, 2, 3]), (4, [2, 3, 4]), (9, [3, 4, 5])])
def test_the_first_steps_are_left_out_where_there_are_others(tmp_path, steps, recorded):
    timer = StepTimer(torch.device("cpu"))
    places = {"own": tmp_path / "here" / "own.json", "merged": tmp_path / "merged.json"}
    profile = TidyTrace(Layout(0, torch.device("cpu")), timer, first_step=10, total_steps=10 + steps, **places)
    for _ in range(steps):
        timer.start_step()
        with timer.compute(timing.UPDATE):
            pass
        profile.step()
    (one,) = trace.read(tmp_path / "merged.json")
    assert [span.step for span in one.spans] == [10 + step for step in recorded]


def test_arrows_lead_from_sends_to_receives():
    first = RankTrace(0, spans=[TraceSpan("Send forward", 1, 5.0, 5.0, 0, 2)])
    second = RankTrace(1, pipeline_rank=1, spans=[TraceSpan("Receive forward", 1, 4.0, 5.5, 1, 2)])
    events = trace.to_chrome([first, second])["traceEvents"]
    (start,) = [event for event in events if event["ph"] == "s"]
    (end,) = [event for event in events if event["ph"] == "f"]
    assert start["id"] == end["id"]
    assert (start["pid"], start["ts"], end["pid"], end["ts"]) == (0, 1e6, 1, 1.5e6)
    other = RankTrace(1, replica=1, pipeline_rank=1, spans=second.spans)
    assert not [event for event in trace.to_chrome([first, other])["traceEvents"] if event["ph"] in "sf"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"traceEvents": [{"ph": "X"}], "otherData": {"ranks": []}}'])
def test_a_file_that_is_no_trace(tmp_path, text):
    (tmp_path / "trace.json").write_text(text)
    with pytest.raises(ValueError, match="is not a trace of all ranks"):
        trace.read(tmp_path / "trace.json")


def measure_shifted_clocks(rank: int) -> list[torch.Tensor]:
    """Compare two clocks, of which that of rank 1 is an hour ahead."""
    layout = Layout(rank, torch.device("cpu"), pipeline_size=2, control=torch.distributed.group.WORLD)
    true = time.perf_counter
    time.perf_counter = lambda: true() + 3600 * rank
    try:
        return [torch.tensor(measure_offsets(layout) or [], dtype=torch.float64)]
    finally:
        time.perf_counter = true


def test_clocks_are_compared(tmp_path):
    (offsets,), (none,) = gloo_ranks.run(measure_shifted_clocks, 2, tmp_path)
    assert offsets.tolist() == pytest.approx([0.0, -3600.0], abs=1.0)
    assert len(none) == 0


@pytest.mark.long
def test_torchs_profiler_writes_a_trace_a_rank(tmp_path, flags):
    change = {"profiling": "pytorch_profiling", "total_steps": 5, "checkpoint_path": tmp_path / "ckpt"}
    ended = ranks.train(tmp_path, {**flags, **change}, workplace=tmp_path)
    assert ended.statuses == [0], ended.errors
    found = json.loads((tmp_path / "trace_json" / "0_rank0_default.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in found["traceEvents"])
