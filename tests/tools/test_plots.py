"""`tools/plots.py`: pictures of runs as PNG files and as a page."""

import json
import re

import pytest

from openchatkit.formats import metrics, trace
from openchatkit.formats.trace import RankTrace, TraceSpan
from openchatkit.tools import plots


def write_run(folder, *, steps=60, loss=5.0):
    folder.mkdir(parents=True)
    for step in range(1, steps + 1):
        numbers = {"lr": 1e-3, "grad_norm": 1.0 / step, "tokens_per_second": 100.0 + step, "seconds": 0.5}
        metrics.append(
            folder, {"step": step, "loss": None if step == 7 else loss / step, "trained_tokens": 9, **numbers}
        )
        if step % 20 == 0:
            metrics.append(folder, {"step": step, "evaluation_loss": loss / step + 0.1, "evaluation_tokens": 4})
    return folder


@pytest.fixture
def run(tmp_path):
    """The folder of a run with a trace of two ranks."""
    folder = write_run(tmp_path / "run")
    spans = [TraceSpan("Forward", 3, 1.0, 1.2, 0, 0), TraceSpan("Loss", 3, 1.2, 1.3), TraceSpan("Norm", 3, 1.3, 1.4)]
    trace.write(folder / trace.TRACE, [RankTrace(0, spans=spans), RankTrace(1, pipeline_rank=1, spans=spans)])
    return folder


def call(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        plots.main([str(argument) for argument in arguments])
    return ended.value.code


def test_pictures_and_page(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    out = tmp_path / "new" / "out"
    assert call(run, "--compare", write_run(tmp_path / "other" / "run", loss=4.0), "--out", out) in (0, None)
    assert capsys.readouterr().out.split() == [str(out / name) for name in (plots.PAGE, plots.CURVES, plots.TIMELINE)]
    for name in (plots.CURVES, plots.TIMELINE):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    page = (out / plots.PAGE).read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page)[1])
    assert [found["name"] for found in data["runs"]] == [str(run), str(tmp_path / "other" / "run")]
    assert data["runs"][1]["loss"][:2] == [4.0, 2.0]
    assert data["runs"][0]["loss"][6] is None
    assert data["timeline"]["step"] == 3
    assert re.findall(r"https?://(?!www\.w3\.org/2000/svg)|\bsrc=|url\(", page) == []


def test_figures_have_what_the_run_had(run):
    pytest.importorskip("matplotlib")
    from openchatkit.training import run_curves

    figure = plots.draw_curves([run_curves.read_curves(run).to_json()])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Loss",
        "Learning rate",
        "Throughput",
        "Gradient norm",
    ]
    loss, _, _, norm = figure.axes
    raw, mean, evaluation = (line.get_ydata() for line in loss.lines)
    assert (raw[0], raw[1], len(mean)) == (5.0, 2.5, 60)
    assert list(evaluation) == pytest.approx([5 / step + 0.1 for step in (20, 40, 60)])
    assert norm.get_yscale() == "log"
    figure = plots.draw_timeline(run_curves.read_timeline(run / trace.TRACE))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["rank 0, waits 0%", "rank 1, waits 0%"]


def test_without_matplotlib_there_is_the_page(run, monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(run) == 2
    assert capsys.readouterr().err == (
        "error: PNG files need matplotlib, which is not installed: pip install -e '.[plots]', or give --page-alone\n"
    )
    assert not (run / plots.PAGE).exists()
    assert call(run, "--page-alone") in (0, None)
    assert (run / plots.PAGE).is_file()


def test_what_there_is_not_is_named(run, tmp_path, capsys):
    def error() -> str:
        return capsys.readouterr().err

    assert call(tmp_path) == 2
    assert f"{tmp_path} has no metrics.jsonl: expected a folder that training wrote" in error()
    assert call(run, "--trace", tmp_path / "none.json") == 2
    assert "there is no such file" in error()
    (run / trace.TRACE).write_text("{}")
    assert call(run) == 2
    assert "trace.json is not a trace of all ranks" in error()
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / metrics.METRICS).write_text("")
    assert call(empty) == 2
    assert "has no step yet" in error()
    (empty / metrics.METRICS).write_text("nonsense\n{}\n")
    assert call(empty) == 2
    assert "is not JSON: restore it, or resume the run" in error()


@pytest.mark.long
def test_the_page_in_a_browser_has_all_pictures_without_network(run, chromium):
    assert call(run, "--page-alone") in (0, None)
    chromium.get_log("browser")  # of pages before
    chromium.get(f"file://{run / plots.PAGE}")
    script = (
        "return [...document.querySelectorAll('section svg[role=img]')].map((svg) => svg.getAttribute('aria-label'))"
    )
    assert chromium.execute_script(script) == ["Loss", "Learning rate", "Throughput", "Gradient norm", "timeline"]
    assert chromium.execute_script("return document.querySelectorAll('rect.forward').length") == 3
    assert [entry["message"] for entry in chromium.get_log("browser")] == []
