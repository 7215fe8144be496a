"""`training/metrics.py` and its sinks: metrics.jsonl, the console, log backends, and no secrets."""

import json
import re
import sys

import pexpect
import pytest
import ranks
from loguru import logger

from openchatkit.errors import UserError
from openchatkit.formats import metrics
from openchatkit.settings import to_json
from openchatkit.training import config, sinks
from openchatkit.training.curve_names import choose_curves
from openchatkit.training.metrics import Reporter


def test_print_is_the_default_and_writes_lines_to_a_file(tmp_path, flags):
    ended = ranks.train(tmp_path, {**flags, "total_steps": 2, "checkpoint_path": tmp_path / "ckpt"})
    assert ended.statuses == [0]
    assert re.search(r"step 2/2 0:00 left \| loss [\d.]+ lr \S+ norm [\d.]+ \| \d+ tok/s", ended.errors[0])
    assert not (tmp_path / "logs").exists()


def test_loguru_writes_a_file(tmp_path, flags):
    """And TensorBoard its own, in the same run, which also has a live page."""
    change = {"train_log_backend": "loguru,tensorboard", "checkpoint_path": tmp_path / "ckpt", "total_steps": 3}
    change |= {"monitor": f"127.0.0.1:{ranks.free_port()}", "log_dir": tmp_path / "runs" / "logs"}
    ended = ranks.train(tmp_path, {**flags, **change}, workplace=tmp_path)
    assert ended.statuses == [0], ended.errors
    assert f"http://{change['monitor']} shows this run" in ended.errors[0]
    (log,) = (tmp_path / "runs" / "logs").glob("file_*.log")
    text = log.read_text()
    assert [text.count(f"step {step}/3 | loss ") for step in (1, 2, 3)] == [1, 1, 1]
    assert scalars(tmp_path / "ckpt" / "tensorboard")["loss"] == [
        (row["step"], pytest.approx(row["loss"])) for row in metrics.read(tmp_path / "ckpt")
    ]


def scalars(folder):
    """{name: [(step, value)]} of TensorBoard's files."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = accumulators.EventAccumulator(str(folder))
    found.Reload()
    return {name: [(entry.step, entry.value) for entry in found.Scalars(name)] for name in found.Tags()["scalars"]}


def test_tensorboard_hides_the_steps_that_a_resumed_run_takes_again(tmp_path):
    for first_step, steps in ((0, (1, 2, 3)), (1, (2,))):
        sink = sinks.TensorBoard(tmp_path, first_step=first_step)
        for step in steps:
            sink.add_step({"step": step, "loss": first_step + step / 10, "sources": {"a": {"loss": None}}})
        sink.close()
    assert scalars(tmp_path) == {"loss": [(1, pytest.approx(0.1)), (2, pytest.approx(1.2))]}


def test_curves_have_gpt_neoxs_names_where_they_are_asked_for(tmp_path):
    sink = sinks.TensorBoard(tmp_path, first_step=0, curves=choose_curves("neox", seq_length=16))
    numbers = {"loss": 2.0, "lr": 0.5, "loss_scale": 8.0, "seconds": 0.25, "tokens_per_second": 64.0}
    nested = {"gradient_norms": {"embed": 3.0}, "sources": {"a": {"loss": 1.0}}}
    sink.add_step({"step": 1, **numbers, "operations_per_second": 1e9, "grad_norm": 4.0, **nested})
    sources = {"evaluation_sources": {"b": {"loss": 0.5}}}
    sink.add_evaluation({"step": 1, "evaluation_loss": 0.0, "evaluation_perplexity": 1.0, **sources})
    sink.add_evaluation({"step": 2, "evaluation_loss": None, "test_loss": 1.0, "test_perplexity": 2.5})
    sink.close()
    assert {name: value for name, [(_, value)] in scalars(tmp_path).items()} == {
        "train/lm_loss": 2.0,
        "train/learning_rate": 0.5,
        "train/loss_scale": 8.0,
        "runtime/iteration_time": 0.25,
        "runtime/steps_per_sec": 4.0,
        "runtime/samples_per_sec": 4.0,
        "runtime/tokens_per_sec": 64.0,
        "runtime/flops_per_sec_per_gpu": 1e9,
        "validation/lm_loss": 0.0,
        "validation/lm_loss_ppl": 1.0,
        "test/lm_loss": 1.0,
        "test/lm_loss_ppl": 2.5,
        # What GPT-NeoX has no name for.
        "grad_norm": 4.0,
        "gradient_norms/embed": 3.0,
        "loss/a": 1.0,
        "evaluation_loss/b": 0.5,
    }


def test_wandb_offline(tmp_path, flags, monkeypatch):
    secret = "not-to-be-seen-0123456789"
    environment = {"WANDB_MODE": "offline", "AWS_SECRET_ACCESS_KEY": secret, "WANDB_SILENT": "true"}
    change = {"train_log_backend": "wandb", "project_name": "testing", "total_steps": 2, "pipeline_group_size": 2}
    change |= {"wandb_team": "our-team", "wandb_group": "our-group", "wandb_run_name": "our-run"}
    flags = {**flags, **change, "checkpoint_path": tmp_path / "ckpt"}
    ended = ranks.train(tmp_path, flags, world_size=2, environment=environment, workplace=tmp_path)
    assert ended.statuses == [0, 0], ended.errors
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len(runs) == 1, "one run, whatever the number of ranks"
    written = b"".join(path.read_bytes() for path in runs[0].rglob("*") if path.is_file())
    assert b"grad_norm" in written
    assert b"loss/" in written
    assert b"micro_batch_size" in written
    assert b"our-team" in written
    assert b"our-group" in written
    assert b"our-run" in written
    assert secret.encode() not in written


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
    reporter = Reporter([sinks.MetricsFile(tmp_path, first_step=0)])
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


ROW = {
    "step": 1200,
    "loss": 2.34567,
    "lr": 4.98765e-5,
    "grad_norm": 1.23456,
    "trained_tokens": 9,
    "seconds": 2.0,
    "tokens_per_second": 12345.6,
    "data_seconds": 0.06,
    "receive_seconds": 0.25,
    "hardware_share": 0.345,
    "memory_bytes": 1234567890,
}


def test_a_line_has_what_a_step_reached_and_waited_for():
    assert sinks.format_step({**ROW, "step": 12}, 28, left=125) == (
        "step 12/28 2:05 left | loss 2.346 lr 5e-05 norm 1.23 | 12346 tok/s MFU 34% wait 12%"
    )
    assert sinks.format_step({**ROW, "step": 12}, 28) == (
        "step 12/28 | loss 2.346 lr 5e-05 norm 1.23 | 12346 tok/s MFU 34% wait 12% data 3% 1.2 GB"
    )


def test_a_line_leaves_out_what_does_not_fit_and_what_nobody_measured():
    long = sinks.format_step(ROW, 280000, left=300000.0)
    assert len(long) <= 89
    assert "MFU 34%" in long
    row = {**ROW, "hardware_share": None, "receive_seconds": None, "data_seconds": 0.001, "loss": None}
    assert sinks.format_step(row, 2800) == ("step 1200/2800 | loss not finite lr 5e-05 norm 1.23 | 12346 tok/s 1.2 GB")


@pytest.mark.parametrize("given", ["print, wandb", "wandb,print,wandb"])
def test_backends_may_be_several(given):
    assert set(config.parse_backends(given).split(",")) == {"print", "wandb"}


def test_an_unknown_backend_is_named():
    with pytest.raises(UserError, match="tensorbored") as raised:
        config.parse(["--model-name", "m", "--task-name", "d", "--train-log-backend", "print,tensorbored"])
    assert "print, loguru, tensorboard, wandb" in str(raised.value)


def test_a_backend_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'openchatkit\[tensorboard\]'"):
        sinks.check_installed("print,tensorboard")


def test_a_terminal_shows_one_live_line(tmp_path):
    script = tmp_path / "console.py"
    script.write_text(
        "from openchatkit.training.sinks import Console\n"
        f"row = {ROW}\n"
        "console = Console(first_step=0, total_steps=2)\n"
        "for step in (1, 2):\n"
        "    console.add_step({**row, 'step': step})\n"
        "console.close()\n"
    )
    terminal = pexpect.spawn(sys.executable, [str(script)], dimensions=(24, 100), encoding="utf-8", timeout=60)
    terminal.expect(pexpect.EOF)
    last = terminal.before.split("\r")[-2].strip()
    assert re.fullmatch(
        r"step 2/2 \|\S+\| 00:00 left, loss 2.346 lr 5e-05 norm 1.23 \| 12346 tok/s MFU 34% wait 12%", last
    ), last
    assert len(last) <= 100
