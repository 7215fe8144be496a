"""`training/metrics.py`, and the traces of `training/device.py`: metrics.jsonl, log backends, and no secrets."""

import json

import pytest
import ranks
from loguru import logger

from openchatkit.formats import metrics
from openchatkit.settings import to_json
from openchatkit.training import config
from openchatkit.training.metrics import Reporter


def test_print_is_the_default_and_writes_lines_to_a_file(tmp_path, flags):
    ended = ranks.train(tmp_path, {**flags, "total_steps": 2, "checkpoint_path": tmp_path / "ckpt"})
    assert ended.statuses == [0]
    assert "step 2/2 | loss " in ended.errors[0]
    assert "tokens/s" in ended.errors[0]
    assert not (tmp_path / "logs").exists()


def test_loguru_writes_a_file(tmp_path, flags):
    change = {"train_log_backend": "loguru", "checkpoint_path": tmp_path / "ckpt", "total_steps": 3}
    assert ranks.train(tmp_path, {**flags, **change}, workplace=tmp_path).statuses == [0]
    (log,) = (tmp_path / "logs").glob("file_*.log")
    text = log.read_text()
    assert all(f"step {step}/3 | loss " in text for step in (1, 2, 3))


def test_wandb_offline(tmp_path, flags, monkeypatch):
    secret = "not-to-be-seen-0123456789"
    environment = {"WANDB_MODE": "offline", "AWS_SECRET_ACCESS_KEY": secret, "WANDB_SILENT": "true"}
    change = {"train_log_backend": "wandb", "project_name": "testing", "total_steps": 2, "pipeline_group_size": 2}
    flags = {**flags, **change, "checkpoint_path": tmp_path / "ckpt"}
    ended = ranks.train(tmp_path, flags, world_size=2, environment=environment, workplace=tmp_path)
    assert ended.statuses == [0, 0], ended.errors
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1, "one run, whatever the number of ranks"
    written = b"".join(path.read_bytes() for path in runs[0].rglob("*") if path.is_file())
    assert b"grad_norm" in written
    assert b"loss/" in written
    assert b"micro_batch_size" in written
    assert secret.encode() not in written


def test_traces(tmp_path, flags):
    change = {"profiling": "tidy_profiling", "pipeline_group_size": 2, "total_steps": 6, "trace_postfix": "x"}
    flags = {**flags, **change, "checkpoint_path": tmp_path / "ckpt", "job_id": "job"}
    ended = ranks.train(tmp_path, flags, world_size=2, workplace=tmp_path)
    assert ended.statuses == [0, 0], ended.errors
    for rank in (0, 1):
        trace = json.loads((tmp_path / "trace_json" / f"job_rank{rank}_x.json").read_text())
        names = {event.get("name", "") for event in trace["traceEvents"]}
        assert {"Forward 0", "Backward 3"} <= names


def test_metrics_broken_by_a_crash_are_cut_where_a_run_resumes(tmp_path):
    for step in range(1, 6):
        metrics.append(tmp_path, {"step": step})
    path = tmp_path / metrics.METRICS
    path.write_bytes(path.read_bytes().replace(b'"step": 4', b"\0\0\0\xff\0\0\0\0\0"))
    with pytest.raises(ValueError, match=r"metrics\.jsonl:4 is not JSON"):
        metrics.read(tmp_path)
    metrics.cut(tmp_path, 3)
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]


def test_metrics_survive_a_cut_line(tmp_path):
    for step in (1, 2, 3):
        metrics.append(tmp_path, {"step": step})
    with open(tmp_path / metrics.METRICS, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]
    metrics.cut(tmp_path, 2)
    metrics.append(tmp_path, {"step": 3})
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2, 3]


def test_numbers_that_are_not_finite_are_null_at_every_depth(tmp_path):
    """And the step's samples are named, with the sources whose loss is not finite."""
    said = []
    sink = logger.add(lambda message: said.append(message.record["message"]))
    place = {"first_step": 0, "total_steps": 2, "backend": "print", "project": "", "job_id": "", "config": {}}
    reporter = Reporter(tmp_path, **place)
    sources = {"a": {"loss": float("nan"), "trained_tokens": 3}, "b": {"loss": None, "trained_tokens": 0}}
    row = {
        "step": 1,
        "loss": float("inf"),
        "lr": 0.1,
        "grad_norm": float("nan"),
        "tokens_per_second": 1.0,
        "trained_tokens": 3,
    }
    reporter.report_step({**row, "sources": sources}, applied=False, samples=range(8, 16))
    logger.remove(sink)
    assert said[0] == (
        "step 1, samples 8 to 15: the gradient is not finite, the loss of a neither; no weight was changed"
    )
    row = {"step": 1, "evaluation_loss": float("nan"), "evaluation_tokens": 3, "evaluation_sources": sources}
    reporter.report_evaluation(row)
    reporter.close()
    step, evaluation = (json.loads(line, parse_constant=pytest.fail) for line in lines(tmp_path))
    assert (step["loss"], step["grad_norm"], step["lr"]) == (None, None, 0.1)
    nulls = {"a": {"loss": None, "trained_tokens": 3}, "b": {"loss": None, "trained_tokens": 0}}
    assert step["sources"] == evaluation["evaluation_sources"] == nulls
    assert evaluation["evaluation_loss"] is None


def lines(folder):
    return (folder / metrics.METRICS).read_text().splitlines()


def test_recorded_settings_are_json():
    settings = config.parse(["--model-name", "m", "--task-name", "d", "--total-steps", "1"])
    assert json.loads(json.dumps(to_json(settings)))["model_name"] == "m"
