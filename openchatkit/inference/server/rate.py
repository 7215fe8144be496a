"""How often one address may ask: a token bucket for each."""

import time
from collections import OrderedDict
from collections.abc import Callable

# The least recently seen address is forgotten first; it then starts with a full bucket, as a new one does.
MOST_ADDRESSES = 4096


class Rate:
    """At most `per_minute` requests a minute from one address; as many at once, if it was quiet before.

    Each address has a bucket that holds `per_minute` requests and fills steadily, at that rate.
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        assert per_minute > 0, per_minute
        self._size = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # address: requests left, and when

    def take(self, address: str) -> float:
        """Take a request out of an address's bucket: 0, or the seconds until there is one again."""
        now = self._clock()
        left, seen = self._buckets.pop(address, (float(self._size), now))
        left = min(self._size, left + (now - seen) * self._size / 60)
        wait = max(0.0, 1 - left) * 60 / self._size
        self._buckets[address] = (left if wait else left - 1, now)
        if len(self._buckets) > MOST_ADDRESSES:
            self._buckets.popitem(last=False)
        return wait
