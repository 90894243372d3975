"""How long something would take, from trials that are much smaller. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# A trial that takes longer is the last one; each is four times as large as the one before.
LONG_ENOUGH: Final = 0.2
GROWTH: Final = 4


def seconds_at(run: Callable[[int], object], size: int) -> float:
    """About how many seconds ``run(size)`` takes.

    Small trials come first; from one that is long enough, time is taken as proportional to the size.

    Args:
        run: does the work for a size of 1 or more, and returns when it is done (a GPU is waited for).
        size: the one wanted.
    """
    tried = 1
    run(tried)  # the first call of anything is slow
    while True:
        began = time.perf_counter()
        run(tried)
        seconds = time.perf_counter() - began
        if tried >= size or seconds > LONG_ENOUGH:
            return seconds * size / tried
        tried = min(size, tried * GROWTH)
