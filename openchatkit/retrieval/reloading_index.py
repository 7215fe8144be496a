"""An index that a chat or a server searches for long: what is written meanwhile is taken up between questions."""

import threading

from loguru import logger

from openchatkit.errors import UserError
from openchatkit.formats import retrieval_index as layout
from openchatkit.retrieval.index import Index
from openchatkit.retrieval.passage import Hit


class ReloadingIndex:
    """The newest snapshot of the index that `index` has opened; a `Searcher`, for several threads at once.

    The encoder stays the one that is loaded. A snapshot that cannot be opened, or has another encoder, is warned of,
    once, and tried again at the next question; meanwhile the one before answers. A search ends in the snapshot that
    it began with. A snapshot is let go of, its files with it, by the last search in it: it must not be closed.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._seen: object = None  # of the manifest that the index is of; none yet, since it may have changed by now
        self._told = ""
        self._one_at_a_time = threading.Lock()

    def search(self, query: str, k: int) -> list[Hit]:
        """See `Index.search`."""
        return self.newest().search(query, k)

    def newest(self) -> Index:
        """The newest snapshot that can be had. One thread opens it; others go on with the one before meanwhile."""
        changed = self._seen is None or layout.stamp(self._index.folder) != self._seen
        if changed and self._one_at_a_time.acquire(blocking=False):
            try:
                self._take_up()
            finally:
                self._one_at_a_time.release()
        return self._index

    def _take_up(self) -> None:
        seen, old = layout.stamp(self._index.folder), self._index
        try:
            record = layout.read(old.folder)[0]
            if record != old.record:
                self._index = self._opened(old, record)
        # RuntimeError: what faiss raises.
        except (UserError, OSError, RuntimeError) as error:
            if str(error) != self._told:
                logger.warning(f"{old.folder} was changed, and is searched as it was before: {error}")
            self._told = str(error)
        else:
            self._seen, self._told = seen, ""

    @staticmethod
    def _opened(old: Index, record: layout.IndexRecord) -> Index:
        before, now = old.record.encoder, record.encoder
        if (before and before.digest) != (now and now.digest):
            raise UserError("it has another encoder now, which is loaded when this program is started again")
        index = Index.open(old.folder, old.encoder if now else None, device=old.device)
        index.to_gpus()
        return index
