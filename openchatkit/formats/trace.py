"""trace.json: the passes and messages of some steps on every rank, in the Chrome trace format.

chrome://tracing and https://ui.perfetto.dev read it, and so does the kit. Spans whose kind begins with Send or Receive
are messages: each receive lasts as long as its rank waited, and an arrow leads to it from the send. The format is that
of https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openchatkit.storage import write_text

TRACE = "trace.json"

# Kinds of messages begin so.
SEND, RECEIVE = "Send ", "Receive "

_THREADS = ("passes and waits", "sends", "host")
_SHORTEST = 1.0  # microseconds: what has no length cannot be seen


@dataclass(frozen=True)
class TraceSpan:
    """One span, in seconds of one clock; stage and micro-batch are None for parts of a step as a whole.

    Micro-batches are numbered through all batches of a step. `on_host` may overlap with what the rank's device does.
    """

    kind: str
    step: int
    start: float
    end: float
    stage: int | None = None
    micro_batch: int | None = None
    on_host: bool = False

    @property
    def name(self) -> str:
        """The kind, with the micro-batch if there is one: `Forward 3`."""
        return self.kind if self.micro_batch is None else f"{self.kind} {self.micro_batch}"


@dataclass(frozen=True)
class RankTrace:
    """The spans of one rank, and where it is in the layout."""

    rank: int
    replica: int = 0
    pipeline_rank: int = 0
    tensor_rank: int = 0
    spans: list[TraceSpan] = field(default_factory=list)


def write(path: Path, ranks: Sequence[RankTrace]) -> None:
    """Write the spans of some ranks, whole or not at all; their clocks must be one."""
    write_text(path, json.dumps(to_chrome(ranks)))


def read(path: Path) -> list[RankTrace]:
    """Return the ranks of a trace; ValueError for a file that `write` has not written, FileNotFoundError for none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        ranks = {place["rank"]: RankTrace(**place) for place in content["otherData"]["ranks"]}
        for event in content["traceEvents"]:
            if event["ph"] == "X":
                ranks[event["pid"]].spans.append(TraceSpan(**event["args"]))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a trace of all ranks, as --profiling tidy_profiling writes it") from error
    return list(ranks.values())


def to_chrome(ranks: Sequence[RankTrace]) -> dict[str, Any]:
    """Return the trace as JSON, with times from its first span on."""
    first = min((span.start for rank in ranks for span in rank.spans), default=0.0)
    places = [
        {key: getattr(rank, key) for key in ("rank", "replica", "pipeline_rank", "tensor_rank")} for rank in ranks
    ]
    events = [*_name_tracks(ranks), *_list_spans(ranks, first), *_connect(ranks, first)]
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"ranks": places}}


def _name_tracks(ranks: Sequence[RankTrace]) -> Iterator[dict[str, Any]]:
    for rank in ranks:
        of = f"replica {rank.replica}, pipeline rank {rank.pipeline_rank}, tensor rank {rank.tensor_rank}"
        yield _describe(rank, "process_name", name=f"rank {rank.rank} ({of})")
        yield _describe(rank, "process_sort_index", sort_index=rank.rank)
        for number, name in enumerate(_THREADS):
            yield _describe(rank, "thread_name", number, name=name)


def _describe(rank: RankTrace, what: str, thread: int = 0, **values: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": rank.rank, "tid": thread, "name": what, "args": values}


def _list_spans(ranks: Sequence[RankTrace], first: float) -> Iterator[dict[str, Any]]:
    for rank in ranks:
        for span in rank.spans:
            yield {
                "ph": "X",
                "name": span.name,
                "cat": span.kind,
                "pid": rank.rank,
                "tid": _find_thread(span),
                "ts": _microseconds(span.start - first),
                "dur": max(_microseconds(span.end - span.start), _SHORTEST),
                "args": vars(span) | {"start": round(span.start - first, 9), "end": round(span.end - first, 9)},
            }


def _connect(ranks: Sequence[RankTrace], first: float) -> Iterator[dict[str, Any]]:
    """Yield an arrow for each message that both its sender and its receiver have noted."""
    receives = {
        (rank.replica, rank.tensor_rank, span.step, span.kind.removeprefix(RECEIVE), span.stage, span.micro_batch): (
            rank,
            span,
        )
        for rank in ranks
        for span in rank.spans
        if span.kind.startswith(RECEIVE)
    }
    number = 0
    for rank in ranks:
        for span in rank.spans:
            if not span.kind.startswith(SEND) or span.stage is None:
                continue
            direction = span.kind.removeprefix(SEND)
            to = span.stage + (1 if direction == "forward" else -1)
            found = receives.get((rank.replica, rank.tensor_rank, span.step, direction, to, span.micro_batch))
            if found is None:
                continue
            number += 1
            receiver, receive = found
            arrow = {"name": direction, "cat": "message", "id": number}
            start = {"ph": "s", "pid": rank.rank, "tid": _find_thread(span), "ts": _microseconds(span.start - first)}
            ts = _microseconds(receive.end - first)
            end = {"ph": "f", "bp": "e", "pid": receiver.rank, "tid": _find_thread(receive), "ts": ts}
            yield arrow | start
            yield arrow | end


def _find_thread(span: TraceSpan) -> int:
    return 2 if span.on_host else int(span.kind.startswith(SEND))


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 3)
