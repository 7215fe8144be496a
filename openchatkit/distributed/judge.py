"""The verdict on a run that must end: which rank is at fault, from the beats of all, in one line.

Owns no socket and no clock; `distributed.beat_server` feeds it. Times are seconds of rank 0's `time.monotonic()`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from openchatkit.distributed.activity import Position
from openchatkit.errors import RESUMABLE

# Of a lost connection, its cause may be known a moment later: another rank's end, or its own words.
_CAUSE_SECONDS = 1.0
# A rank that fails is given this long to end by itself before the others do, so that it is known to be the first.
_END_SECONDS = 2.0


@dataclass(frozen=True)
class RunVerdict:
    """Why a run ends: the line for the user, and the exit status of every rank."""

    message: str
    status: int


@dataclass
class _Watched:
    name: str
    position: Position
    heard: float
    left: bool = False
    gone: bool = False


@dataclass
class _Report:
    """The end of one rank in its own words, or a connection that it lost."""

    rank: int
    when: float
    words: str
    status: int = RESUMABLE


@dataclass
class Judge:
    """Beats and ends of all ranks, and the verdict on the first that ends a run. `names` describe ranks for messages.

    `silence`: seconds without a beat until a rank counts as frozen or cut off.
    """

    names: Sequence[str]
    silence: float
    started: float
    verdict: RunVerdict | None = None
    _failures: list[_Report] = field(default_factory=list)
    _losses: list[_Report] = field(default_factory=list)
    _timed_out: bool = False

    def __post_init__(self) -> None:
        self._ranks = [_Watched(name, Position("start", since=self.started), self.started) for name in self.names]

    @property
    def all_left(self) -> bool:
        """Whether every rank but 0 has left in good order or ended."""
        return all(rank.left or rank.gone for rank in self._ranks[1:])

    def position(self, rank: int) -> Position:
        """Return where a rank was at its last beat."""
        return self._ranks[rank].position

    def hear(self, rank: int, position: Position, now: float) -> None:
        """Take a beat of a rank."""
        self._ranks[rank].position, self._ranks[rank].heard = position, now

    def forgive(self, seconds: float) -> None:
        """Leave out a time in which rank 0 itself was frozen, and heard nobody."""
        for rank in self._ranks:
            rank.heard += seconds

    def note_leaving(self, rank: int) -> None:
        """Note that a rank ends in good order."""
        self._ranks[rank].left = True

    def note_failure(self, rank: int, words: str, status: int, now: float) -> None:
        """Note that a rank ends by an error of its own."""
        self._failures.append(_Report(rank, now, words, status))

    def note_loss(self, rank: int, reason: str, now: float, *, timed_out: bool) -> None:
        """Note that a rank lost another, or waited in vain for it; by itself it cannot know for which, nor why."""
        self._losses.append(_Report(rank, now, reason))
        self._timed_out |= timed_out

    def note_disconnection(self, rank: int) -> None:
        """Note that a rank's connection has ended, as it does with its process."""
        self._ranks[rank].gone = True

    def decide(self, now: float) -> RunVerdict | None:
        """Return the verdict, once there is one; the first stays."""
        if self.verdict is None:
            self.verdict = self._find_failure(now) or self._find_dead() or self._find_silent(now)
        if self.verdict is None and self._losses and not self._failures:
            loss = self._losses[0]
            if now - loss.when >= _CAUSE_SECONDS:
                self.verdict = self._find_late(now) if self._timed_out else self._explain_loss(loss)
        return self.verdict

    def _find_failure(self, now: float) -> RunVerdict | None:
        for failure in self._failures:
            if failure.rank == 0 or self._ranks[failure.rank].gone or now - failure.when >= _END_SECONDS:
                return RunVerdict(f"{self._ranks[failure.rank].name}: {failure.words}", failure.status)
        return None

    def _find_dead(self) -> RunVerdict | None:
        failed = {failure.rank for failure in self._failures}
        for number, rank in enumerate(self._ranks):
            if rank.gone and not rank.left and number not in failed:
                return RunVerdict(describe_death(rank.name, rank.position), RESUMABLE)
        return None

    def _find_silent(self, now: float) -> RunVerdict | None:
        silent = [rank for rank in self._ranks if not rank.left and now - rank.heard > self.silence]
        if not silent:
            return None
        return RunVerdict(
            describe_silence(silent[0].name, silent[0].position, self.silence, len(silent) - 1), RESUMABLE
        )

    def _find_late(self, now: float) -> RunVerdict:
        """Name those for whom the others waited too long: at work where others wait, in the earliest step."""
        present = [rank for rank in self._ranks if not rank.left]
        first = min((rank.position.waits, rank.position.step or 0) for rank in present)
        late = [rank for rank in present if (rank.position.waits, rank.position.step or 0) == first]
        words = [f"{rank.name}, for {now - rank.position.since:.0f} s in {rank.position.describe()}" for rank in late]
        reason = self._losses[0].words
        return RunVerdict(f"others waited too long ({reason}) for {' or '.join(words)}", RESUMABLE)

    def _explain_loss(self, loss: _Report) -> RunVerdict:
        rank = self._ranks[loss.rank]
        return RunVerdict(f"{rank.name} lost a peer ({loss.words}) in {rank.position.describe()}", RESUMABLE)


def describe_death(name: str, position: Position) -> str:
    """Return the line on a rank whose process ended without a word."""
    return f"{name} died in {position.describe()}: it was killed (likely out of memory), or it crashed"


def describe_silence(name: str, position: Position, seconds: float, others: int = 0) -> str:
    """Return the line on a rank that gives no sign of life, and on how many others give none either."""
    also = f" (nor did {others} other{'s' if others > 1 else ''})" if others else ""
    return (
        f"{name} gave no sign of life for {seconds:.0f} s after {position.describe()}{also}: it is frozen, or its "
        "network is down"
    )
