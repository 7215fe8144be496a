"""Saves of a run beside its steps: a copy of the weights, files made of it in a thread, a name once all ranks are done.

Steps wait for the copy alone, and it goes into memory that is kept for the next save. Which checkpoints there are is as
if they waited for all: one appears under its name when every file was written, synced and read back, or never, and
holds what was true after the step that it is called by. Threads exchange nothing with other ranks: steps say whether
some rank is still writing, and the end of a save is a matter of all ranks' main threads.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from loguru import logger
from torch import Tensor

from openchatkit.errors import UserError
from openchatkit.formats import checkpoint
from openchatkit.formats.manifest import FileRecord
from openchatkit.loading import hardware
from openchatkit.storage import FullDiskError, format_bytes
from openchatkit.training.rank_weights import OptimizerState, RankWeights

T = TypeVar("T")
_Gathered = Mapping[str, tuple[Tensor, OptimizerState]]  # of one shard, by the parameter's name

# A shard is copied if free main memory is so many times its size: other ranks of a host look at the same moment.
_ROOM = 16


class Saver:
    """Writes the checkpoints of a run to `root`, from all ranks together.

    `in_background`: beside the steps that follow. `on_full_disk` is "stop" or "continue": whether a save that finds no
    room ends the run. `published` is called, on all ranks, with the step of each checkpoint that has its name.
    """

    def __init__(
        self,
        root: Path,
        weights: RankWeights,
        *,
        raw_config: dict[str, Any],
        tokenizer_from: Path,
        in_background: bool,
        on_full_disk: str,
        published: Callable[[int], None],
    ) -> None:
        self._root, self._weights, self._layout = root, weights, weights.layout
        self._raw_config, self._tokenizer_from = raw_config, tokenizer_from
        self._in_background, self._goes_on = in_background, on_full_disk == "continue"
        self._published = published
        self._copies = _Copies()
        self._save: _Save | None = None
        self._bytes = 0  # of the last checkpoint
        self.has_begun = False  # a save, from which on this process has more memory than steps need

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._save is not None and self._save.thread.is_alive()

    def save(self, step: int, state: dict[str, Any], *, last: bool = False) -> None:
        """Begin to save what is true after `step`; all ranks call this, once the save before is finished.

        `state` is that of `checkpoint.finish`. The `last` save of a run is finished here: nothing follows to hide it.
        UserError on all ranks if it fails on one.
        """
        assert self._save is None, f"the save of step {self._save.step} is not finished"
        started = time.perf_counter()
        self.has_begun = True
        self._layout.activity.begin("saving")
        save = _Save(step, state, checkpoint.temporary_path(self._root, step), last=last)
        if self._agree(save, lambda: self._begin(save) if self._leads else None) is None:
            return
        self._save = save
        self._copy_or_write(save)
        save.thread.start()
        save.waited = time.perf_counter() - started
        if last or not self._in_background:
            self.finish()

    def finish(self) -> None:
        """Wait until all ranks have written the save that was begun, if there is one, and give it its name.

        All ranks call this. UserError as `save`.
        """
        save, self._save = self._save, None
        if save is None:
            return
        started = time.perf_counter()
        self._layout.activity.begin("saving")
        shares = self._agree(save, save.result)
        if shares is None:
            return
        records = [record for share in shares for record in share.records]
        if self._agree(save, lambda: self._publish(save, records) if self._leads else None) is None:
            return
        self._bytes = sum(record.size for record in records)
        self._published(save.step)
        if self._leads:
            self._report(save, shares, save.waited + time.perf_counter() - started)

    def close(self) -> None:
        """Stop this rank's thread after the file that it is at; a save that was not finished leaves no checkpoint."""
        if self._save is not None:
            self._save.stopped.set()
            if self._save.thread.is_alive():  # not yet, where a rank was lost while it was copied
                self._save.thread.join()

    @property
    def _leads(self) -> bool:
        return self._layout.rank == 0

    def _begin(self, save: "_Save") -> None:
        checkpoint.begin(self._root, save.step, needed=self._bytes)

    def _copy_or_write(self, save: "_Save") -> None:
        """Copy what this rank is to write, or write it where that is not to be, and hand the others theirs."""
        for shard in self._weights.stages.shards:
            gathered = self._weights.gather(shard)
            if gathered is None or save.problem is not None:
                continue  # The other ranks wait for what this one has of further shards.
            copy = self._copies.take(shard, gathered) if self._in_background and not save.last else None
            if copy is not None:
                save.shards[shard] = copy
                continue
            try:
                save.records += _write_shard(save.temporary, shard, gathered)
            except UserError as error:
                save.problem = error
            save.written_at_once += 1

    def _publish(self, save: "_Save", records: list[FileRecord]) -> None:
        checkpoint.finish(
            save.temporary,
            self._root,
            save.step,
            state=save.state,
            records=records,
            raw_config=self._raw_config,
            tokenizer_from=self._tokenizer_from,
        )

    def _agree(self, save: "_Save", action: Callable[[], T]) -> list[T] | None:
        """Return the results of `action` on all ranks; None where some disk is full and the run goes on without it.

        Any other failure is a UserError on all ranks. They are done with the files by then, which are removed.
        """
        results, errors = self._layout.attempt(action)
        if not errors:
            return results
        if self._leads:
            checkpoint.discard(save.temporary)
        if self._goes_on and not save.last and all(isinstance(error, FullDiskError) for error in errors):
            if self._leads:
                logger.warning("{}; the run goes on, and step {} is not saved", errors[0], save.step)
            return None
        raise UserError(str(errors[0])) from errors[0]

    def _report(self, save: "_Save", shares: list["_Share"], waited: float) -> None:
        path, size = checkpoint.checkpoint_path(self._root, save.step), format_bytes(self._bytes)
        if save.last or not self._in_background:
            logger.info("saved {} ({}) in {:.2f} s", path, size, waited)
            return
        beside = max(share.seconds for share in shares)
        logger.info("saved {} ({}): steps waited {:.2f} s; files took {:.2f} s beside them", path, size, waited, beside)
        if at_once := sum(share.written_at_once for share in shares):
            logger.warning("steps waited for the files of {} shards, for whose copies main memory has no room", at_once)


@dataclass(frozen=True)
class _Share:
    """A rank's files of a checkpoint, the seconds of its thread, and the number of shards that were not left to it."""

    records: list[FileRecord]
    seconds: float
    written_at_once: int


@dataclass
class _Save:
    """One save of this rank: `shards` are the copies that its thread writes to the folder `temporary`."""

    step: int
    state: dict[str, Any]
    temporary: Path
    last: bool
    shards: dict[str, _Gathered] = field(default_factory=dict)
    records: list[FileRecord] = field(default_factory=list)
    written_at_once: int = 0
    problem: Exception | None = None
    seconds: float = 0.0
    waited: float = 0.0
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._write, name=f"save {self.step}", daemon=True)

    def result(self) -> _Share:
        """Return this rank's share once it is written; raises what kept it from that."""
        self.thread.join()
        if self.problem is not None:
            raise self.problem
        return _Share(self.records, self.seconds, self.written_at_once)

    def _write(self) -> None:
        started = time.perf_counter()
        try:
            for shard, gathered in self.shards.items():
                if self.stopped.is_set() or self.problem is not None:
                    return
                self.records += _write_shard(self.temporary, shard, gathered)
        except Exception as error:  # for the main thread, which raises it in `result`
            self.problem = error
        self.seconds = time.perf_counter() - started


class _Copies:
    """Memory for copies of shards, kept from save to save: new memory is filled with zeros first, page by page."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, str, str], Tensor] = {}

    def take(self, shard: str, gathered: _Gathered) -> _Gathered | None:
        """Return a copy of a shard's tensors; None if it needs more memory than there is to spare."""
        tensors = {
            (shard, name, key): value
            for name, (weight, state) in gathered.items()
            for key, value in {"": weight, **state}.items()
            if isinstance(value, Tensor)
        }
        new = {place: tensor for place, tensor in tensors.items() if not self._fits(place, tensor)}
        needed = sum(tensor.nbytes for tensor in new.values())
        available = hardware.available_memory() if needed else 0
        if needed and 0 < available < _ROOM * needed:
            return None
        for place, tensor in new.items():
            self._kept[place] = torch.empty(tensor.shape, dtype=tensor.dtype)
        for place, tensor in tensors.items():
            self._kept[place].copy_(tensor)
        return {
            name: (
                self._kept[shard, name, ""],
                {key: self._kept.get((shard, name, key), value) for key, value in state.items()},
            )
            for name, (_, state) in gathered.items()
        }

    def _fits(self, place: tuple[str, str, str], tensor: Tensor) -> bool:
        kept = self._kept.get(place)
        return kept is not None and kept.shape == tensor.shape and kept.dtype == tensor.dtype


def _write_shard(temporary: Path, shard: str, gathered: _Gathered) -> list[FileRecord]:
    """Write the two files of a shard and read them back; UserError if the disk refuses or alters them."""
    weights = {name: weight for name, (weight, _) in gathered.items()}
    state = {name: entry for name, (_, entry) in gathered.items()}
    records = [
        checkpoint.write_weights(temporary, shard, weights),
        checkpoint.write_optimizer(temporary, shard, state),
    ]
    checkpoint.reread(temporary, records)
    return records
