"""Recent features of faiss: a limit on what it allocates while it opens a file, and threads that read lists ahead."""

import contextlib
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_OPENING = threading.Lock()  # the limit holds for the whole process


@contextlib.contextmanager
def byte_limit(faiss: ModuleType, size: int) -> Iterator[None]:
    """Keep faiss from allocating a vector of more than `size` bytes while it opens a file; one file at a time.

    A damaged file may claim any length. Without the limit faiss allocates until the system refuses.
    """
    get = getattr(faiss, "get_deserialization_vector_byte_limit", None)
    put = getattr(faiss, "set_deserialization_vector_byte_limit", None)
    with _OPENING:
        if get is None or put is None:
            yield
            return
        before = get()
        put(size)
        try:
            yield
        finally:
            put(before)


def disable_prefetch(lists: Any) -> None:
    """Keep a search from starting threads that read lists ahead, which cost more than they gain."""
    if hasattr(lists, "prefetch_nthread"):
        lists.prefetch_nthread = 0
