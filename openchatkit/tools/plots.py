"""The command `tools/plot_training.py`: pictures of runs as PNG files, and one page with all of them.

Owns the PNG files; the page is that of `--monitor` (`training.run_curves`).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openchatkit import cli
from openchatkit.errors import UserError
from openchatkit.storage import atomic_path, storage_errors, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES, TIMELINE, PAGE = "curves.png", "timeline.png", "training.html"

_COLOURS = ("#2563c9", "#c2570c", "#0d8a5f", "#9333a8", "#b4233c", "#667085")
_SOFT, _GRID = "#626b77", "#e2e5ea"
_KINDS = {
    "Forward": ("forward", "#4f8fe6"),
    "Backward": ("backward", "#4bb083"),
    "Backward input": ("backward", "#4bb083"),
    "Backward weight": ("backward, weights", "#a4cf6a"),
    "Loss": ("loss", "#8f6fd6"),
    "Update": ("optimizer", "#e0a63a"),
}
_OTHER = ("sums over ranks", "#9aa3af")
_DPI = 110
# A curve of more points is drawn faintly, with its moving mean over about this share of them.
_MANY, _SHARE = 40, 1 / 40
_WIDEST_SPREAD = 50


def parser() -> cli.Parser:
    """Return the parser of the command's flags."""
    given = cli.Parser(
        prog="tools/plot_training.py",
        description="Draw loss, learning rate, throughput and gradient norm of a run, and the timeline of its "
        f"pipeline: {CURVES}, {TIMELINE} and the page {PAGE}, which needs no network.",
    )
    given.add_argument("run", type=Path, help="the folder that --checkpoint-path named")
    given.add_argument(
        "--compare", type=Path, nargs="+", default=[], metavar="OTHER", help="further runs to draw beside"
    )
    given.add_argument("--trace", type=Path, help="the trace to draw; trace.json of the run's folder if not given")
    given.add_argument("--out", type=Path, help="the folder to write to; the run's own if not given")
    given.add_argument("--page-alone", action="store_true", help="write no PNG files, which need matplotlib")
    return given


@cli.command
def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs, then write pictures and page, and print their paths."""
    given = parser().parse_args(argv)
    from openchatkit.formats import trace
    from openchatkit.training import run_curves

    runs = [run_curves.read_curves(folder).to_json() for folder in (given.run, *given.compare)]
    timeline = run_curves.read_timeline(given.trace or given.run / trace.TRACE)
    if given.trace and timeline is None:
        raise UserError(f"--trace {given.trace}: there is no such file, or it has no step; expected a merged trace")
    name_apart(runs, [given.run, *given.compare])
    if not given.page_alone:
        _check_matplotlib()
    out = given.out or given.run
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / PAGE, run_curves.render_page({"runs": runs, "timeline": timeline}))
        paths = [out / PAGE]
        if not given.page_alone:
            paths += _write_pictures(out, runs, timeline)
    for path in paths:
        print(path)


def name_apart(runs: Sequence[dict[str, Any]], folders: Sequence[Path]) -> None:
    """Give runs of one name the paths of their folders instead."""
    names = [run["name"] for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run["name"]) > 1:
            run["name"] = str(folder)


def draw_curves(runs: Sequence[dict[str, Any]]) -> "Figure":
    """Return a figure of loss, learning rate, throughput and gradient norm of some runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    loss, rate, speed, norm = figure.subplots(2, 2, sharex=True).flat
    for number, run in enumerate(runs):
        colour = _COLOURS[number % len(_COLOURS)]
        label = run["name"] if len(runs) > 1 else None
        _draw_noisy(loss, run, "loss", colour, label)
        _draw_evaluation(loss, run, colour if label else _COLOURS[1], "evaluation" if number == 0 else None)
        rate.plot(run["steps"], _with_gaps(run["lr"]), color=colour, linewidth=1.6)
        _draw_noisy(speed, run, "tokens_per_second", colour)
        _draw_noisy(norm, run, "grad_norm", colour)
    norms = [value for run in runs for value in run["grad_norm"] if value]
    if norms and max(norms) > _WIDEST_SPREAD * min(norms):
        norm.set_yscale("log")
    else:
        norm.set_ylim(bottom=0)
    rate.set_ylim(bottom=0)
    speed.set_ylim(bottom=0)
    titles = {loss: "Loss", rate: "Learning rate", speed: "Throughput", norm: "Gradient norm"}
    units = {loss: "mean over trained tokens", rate: "", speed: "tokens a second", norm: "before clipping"}
    for axes, title in titles.items():
        _dress(axes, title, units[axes])
    for axes in (speed, norm):
        axes.set_xlabel("step", color=_SOFT)
    loss.legend(frameon=False, labelcolor=_SOFT)
    return figure


def draw_timeline(timeline: dict[str, Any]) -> "Figure":
    """Return a figure of what the ranks of a pipeline did in one step; the rest of each row is waiting."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    rows, whole = timeline["rows"], timeline["milliseconds"]
    figure = Figure(figsize=(11, 1.5 + 0.34 * len(rows)), layout="constrained")
    axes = figure.subplots()
    used: dict[str, str] = {}
    for number, row in enumerate(rows):
        axes.broken_barh([(0, whole)], (number - 0.4, 0.8), color=_GRID)
        for kind, micro_batch, _, start, end in row["boxes"]:
            name, colour = _KINDS.get(kind, _OTHER)
            used[name] = colour
            axes.broken_barh(
                [(start, end - start)], (number - 0.4, 0.8), color=colour, edgecolor="white", linewidth=0.4
            )
            if micro_batch is not None and end - start > whole / 60:
                middle = (start + end) / 2
                axes.text(middle, number, str(micro_batch), ha="center", va="center", color="white", fontsize=8)
    axes.set_xlim(0, whole)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [f"rank {row['rank']}, waits {row['waits']:.0%}" for row in rows])
    axes.set_xlabel("milliseconds", color=_SOFT)
    order = [*dict.fromkeys(name for name, _ in (*_KINDS.values(), _OTHER)), "waiting"]
    handles = [
        Patch(color=(used | {"waiting": _GRID})[name], label=name)
        for name in order
        if name in used or name == order[-1]
    ]
    _dress(axes, f"Step {timeline['step']:,} on the ranks of a pipeline; numbers are micro-batches", "")
    axes.grid(visible=False)
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, labelcolor=_SOFT)
    return figure


def _draw_noisy(axes: "Axes", run: dict[str, Any], key: str, colour: str, label: str | None = None) -> None:
    """Draw a curve, if it has many points faintly and below its moving mean."""
    steps, values = run["steps"], _with_gaps(run[key])
    many = len(steps) > _MANY
    axes.plot(steps, values, color=colour, linewidth=1.0 if many else 1.6, alpha=0.3 if many else 1.0)
    axes.plot(
        steps,
        _smooth(values) if many else values,
        color=colour,
        linewidth=1.6,
        label=label or ("training, moving mean" if many else "training") if key == "loss" else None,
    )


def _draw_evaluation(axes: "Axes", run: dict[str, Any], colour: str, label: str | None) -> None:
    if run["evaluation_steps"]:
        axes.plot(
            run["evaluation_steps"],
            run["evaluation_loss"],
            "o",
            color=colour,
            markerfacecolor="white",
            markersize=5,
            label=label,
        )


def _with_gaps(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _smooth(values: Sequence[float]) -> list[float]:
    """Return the moving mean in which points count the less the further they lie back, without bias at its start."""
    keep = 1 - 1 / max(4.0, len(values) * _SHARE)
    mean = weight = 0.0
    smoothed = []
    for value in values:
        if value == value:
            mean, weight = keep * mean + (1 - keep) * value, keep * weight + 1 - keep
        smoothed.append(mean / weight if value == value else value)
    return smoothed


def _dress(axes: "Axes", title: str, unit: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(unit, color=_SOFT)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GRID)


def _write_pictures(out: Path, runs: Sequence[dict[str, Any]], timeline: dict[str, Any] | None) -> list[Path]:
    figures = {CURVES: draw_curves(runs)}
    if timeline is not None:
        figures[TIMELINE] = draw_timeline(timeline)
    for name, figure in figures.items():
        with atomic_path(out / name) as temporary:
            figure.savefig(temporary, dpi=_DPI, format="png")
    return [out / name for name in figures]


def _check_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(
            "PNG files need matplotlib, which is not installed: pip install -e '.[plots]', or give --page-alone"
        ) from error
