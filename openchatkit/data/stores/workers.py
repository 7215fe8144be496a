"""Worker processes: a function applied to batches on all cores, results in order, and no process left running.

The processes are spawned, so they share no memory and no lock with this one, and they do not run the main script again:
it may lack a guard, or not be a file. Ctrl-C reaches this process only; when it dies, in any way, they end.
`ProcessPoolExecutor` has no option for either, so while a process starts, `__main__` is an empty module and SIGINT is
blocked.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from loguru import logger

from openchatkit.errors import Interrupted

_Kept = TypeVar("_Kept")
_Sent = TypeVar("_Sent")
Result = TypeVar("Result")

_WINDOW = 3  # batches read ahead for each worker


def cores() -> int:
    """Return how many cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # only on Linux
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def in_order(
    batches: Iterable[tuple[_Kept, _Sent]],
    *,
    processes: int,
    make: Callable[..., Callable[[_Sent], Result]],
    arguments: tuple[object, ...] = (),
    here: Callable[[_Sent], Result],
) -> Generator[tuple[_Kept, Result], None, None]:
    """Yield what is kept here of each batch, with the result of what was sent, in order; a few batches a worker a time.

    `make(*arguments)`, called once in each worker, gives the function that is applied; it is a function of a module.
    `here` is applied in this process instead where `processes` is 0 or none can start. Interrupted: a worker was
    killed.
    """
    if not (processes and can_start()):
        for kept, sent in batches:
            yield kept, here(sent)
        return
    pending: deque[tuple[_Kept, Future[Result]]] = deque()
    pool = ProcessPoolExecutor(processes, _Context(), _prepare, (make, arguments))
    try:
        for kept, sent in batches:
            pending.append((kept, pool.submit(_apply, sent)))
            if len(pending) > _WINDOW * processes:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    except BrokenProcessPool as error:
        raise Interrupted(
            "a worker process was killed, most likely for lack of memory: free some, or allow fewer cores (taskset), "
            "and run the same command again, it continues where it stopped"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def can_start() -> bool:
    """Return whether this process may have workers: it must not be daemonic, and must have shared memory for locks.

    Some containers have no writable /dev/shm; that is logged.
    """
    if multiprocessing.current_process().daemon:
        return False
    try:
        multiprocessing.Lock()
    except OSError as error:
        logger.warning(
            "one process does all the work, since the system gives no shared memory (/dev/shm: {}): mount it for speed",
            error.strerror or error,
        )
        return False
    return True


# In a worker, the function applied to each batch: a pool has no other way to keep anything from batch to batch.
_function: Callable[[Any], Any] | None = None


def _prepare(make: Callable[..., Callable[[Any], Any]], arguments: tuple[object, ...]) -> None:
    global _function
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _function = make(*arguments)


def _apply(sent: Any) -> Any:
    assert _function is not None
    return _function(sent)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


class _Process(SpawnProcess):
    def start(self) -> None:
        with _without_main(), _without_interrupts():
            super().start()


class _Context(SpawnContext):
    Process = _Process


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Let processes that are started inside find no main script to run again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Let processes that are started inside never get Ctrl-C, from their first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
