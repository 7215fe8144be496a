"""Progress of long work, as bars and as lines: shown on a terminal, silent elsewhere."""

import sys
from typing import Any

from tqdm import tqdm


def bar(total: int | None, description: str, *, unit: str = "it", initial: int = 0, **options: Any) -> tqdm:
    """Return a tqdm bar on stderr with rate and time left; nothing is drawn when stderr is not a terminal."""
    options.setdefault("disable", None)
    return tqdm(total=total, desc=description, unit=unit, initial=initial, dynamic_ncols=True, **options)


def write(text: str) -> None:
    """Print a line on stderr above the progress bar, if there is one."""
    tqdm.write(text, file=sys.stderr, end="")


def announce(text: str) -> None:
    """Print a line on stderr for a person who waits; nothing when stderr is not a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr, flush=True)
