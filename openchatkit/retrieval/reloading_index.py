"""An index that a chat or a server searches for long: new snapshots are picked up between questions."""

import threading

from loguru import logger

from openchatkit.errors import UserError
from openchatkit.formats import retrieval_index as layout
from openchatkit.retrieval.index import Index
from openchatkit.retrieval.passage import Hit


class ReloadingIndex:
    """A `Searcher` of the newest snapshot of the index that `index` has opened, for several threads at once.

    The loaded encoder stays. A snapshot that cannot be opened, or has another encoder, is warned of once and tried
    again at the next question; until then the previous one answers. A search ends in the snapshot that it began with.
    The last search in a snapshot releases it and its files, so it must not be closed.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        self._seen: object = None  # stamp of the manifest read
        self._last_warning = ""
        self._one_at_a_time = threading.Lock()

    def search(self, query: str, k: int) -> list[Hit]:
        """See `Index.search`."""
        return self.newest().search(query, k)

    def newest(self) -> Index:
        """Return the newest snapshot that can be opened. One thread opens it while others use the previous one."""
        changed = self._seen is None or layout.stamp(self._index.folder) != self._seen
        if changed and self._one_at_a_time.acquire(blocking=False):
            try:
                self._reload()
            finally:
                self._one_at_a_time.release()
        return self._index

    def _reload(self) -> None:
        seen, old = layout.stamp(self._index.folder), self._index
        try:
            record = layout.read(old.folder)[0]
            if record != old.record:
                self._index = self._open(old, record)
        # RuntimeError: what faiss raises.
        except (UserError, OSError, RuntimeError) as error:
            if str(error) != self._last_warning:
                logger.warning(f"{old.folder} was changed, and is searched as it was before: {error}")
            self._last_warning = str(error)
        else:
            self._seen, self._last_warning = seen, ""

    @staticmethod
    def _open(old: Index, record: layout.IndexRecord) -> Index:
        before, now = old.record.encoder, record.encoder
        if (before and before.digest) != (now and now.digest):
            raise UserError("it has another encoder now, which is loaded when this program is started again")
        index = Index.open(old.folder, old.encoder if now else None, device=old.device)
        index.to_gpus()
        return index
