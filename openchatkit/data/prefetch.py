"""Results that a thread makes ready while the one before is in use."""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

Key = TypeVar("Key")
Result = TypeVar("Result")


def make_thread(device: torch.device) -> ThreadPoolExecutor:
    """Return a pool of one thread, which ends with its last owner; memory that is pinned there is for `device`."""
    start = functools.partial(torch.cuda.set_device, device) if device.type == "cuda" else None
    return ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=start)


class Prefetcher(Generic[Key, Result]):
    """Results of `make`, all of which `thread` makes: of one thread, they never run at the same time.

    One result at most is made before it is asked for, and held.
    """

    def __init__(self, make: Callable[[Key], Result], thread: ThreadPoolExecutor) -> None:
        self._make, self._thread = make, thread
        self._next: tuple[Key, Future[Result]] | None = None

    def take(self, key: Key, *, following: Key | None) -> Result:
        """Return `make(key)`, or raise what it raises, and let the thread go on with `following`.

        An error of `following` is raised when that is asked for; if it never is, nobody sees it.
        """
        if self._next is not None and self._next[0] == key:
            future = self._next[1]
        else:
            if self._next is not None:
                self._next[1].cancel()
            future = self._thread.submit(self._make, key)
        self._next = None
        result = future.result()
        if following is not None:
            self._next = following, self._thread.submit(self._make, following)
        return result
