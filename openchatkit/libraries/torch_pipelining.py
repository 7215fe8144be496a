"""Methods by which torch's pipeline schedules run a stage, and which torch does not document."""

import contextlib
from typing import Any, Protocol

from torch.distributed.pipelining import PipelineStage


class StageObserver(Protocol):
    """An observer of a stage. Kinds of passes are "forward", "backward", and its halves, "input" and "weight"."""

    def during_pass(self, kind: str, stage: int, micro_batch: int) -> contextlib.AbstractContextManager[None]:
        """Return a context that a pass runs in."""

    def at_receive(self, stage: int, micro_batch: int, *, backward: bool) -> None:
        """Take note that a message is asked for."""

    def at_send(self, stage: int, micro_batch: int, *, backward: bool) -> None:
        """Take note that a message is handed over."""


class ObservedStage(PipelineStage):
    """A stage whose passes and messages an observer sees.

    A schedule of another torch, which calls other methods, runs as well, and is only observed less.
    """

    def __init__(self, observer: StageObserver, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._observer = observer

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        with self._observer.during_pass("forward", self.stage_index, fwd_chunk_id):
            return super().forward_one_chunk(fwd_chunk_id, *arguments, **options)

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        kind = "backward" if options.get("full_backward", True) else "input"
        with self._observer.during_pass(kind, self.stage_index, bwd_chunk_id):
            return super().backward_one_chunk(bwd_chunk_id, *arguments, **options)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **options: Any) -> Any:
        with self._observer.during_pass("weight", self.stage_index, bwd_chunk_id):
            return super().backward_weight_one_chunk(bwd_chunk_id, *arguments, **options)

    # The ends of a pipeline have no messages in one direction.

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        if messages := super().get_fwd_recv_ops(fwd_chunk_id):
            self._observer.at_receive(self.stage_index, fwd_chunk_id, backward=False)
        return messages

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if messages := super().get_bwd_recv_ops(bwd_chunk_id):
            self._observer.at_receive(self.stage_index, bwd_chunk_id, backward=True)
        return messages

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        if messages := super().get_fwd_send_ops(fwd_chunk_id):
            self._observer.at_send(self.stage_index, fwd_chunk_id, backward=False)
        return messages

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        if messages := super().get_bwd_send_ops(bwd_chunk_id):
            self._observer.at_send(self.stage_index, bwd_chunk_id, backward=True)
        return messages
