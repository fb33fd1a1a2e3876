"""The budget of repeated calls, one for the whole process, so that a busy store is not asked more and more."""

import random
import threading
import time
from dataclasses import dataclass, field

CAPACITY = 20.0
"""Repeated calls that may follow each other at once."""
PER_SECOND = 1.0
"""Repeated calls that are earned each second."""
PER_SUCCESS = 0.1
"""And with each call that succeeds: a store that answers again is asked as before."""
DEEPEST_DEBT = 60.0
"""Repeated calls that are owed at most: after a minute a store that answers again is asked as before, by any number."""
LONGEST_FACTOR = 8.0
"""A spent budget makes a pause longer by this factor at most."""


@dataclass
class RetryBudget:
    """A token bucket. A thousand workers of sixteen readers that all repeat their calls would keep a store busy."""

    tokens: float = CAPACITY
    last: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def succeeded(self) -> None:
        """A call succeeded."""
        with self.lock:
            self.tokens = min(CAPACITY, self.tokens + PER_SUCCESS)

    def seconds_to_wait(self, pause: float) -> float:
        """Takes a token; returns the seconds before the call may be repeated.

        These are its pause, spread so that readers do not come back together, or longer where the budget is spent.
        """
        with self.lock:
            now = time.monotonic()
            earned = min(CAPACITY, self.tokens + (now - self.last) * PER_SECOND)
            self.tokens = max(-DEEPEST_DEBT, earned - 1)
            self.last = now
            missing = -self.tokens / PER_SECOND
        return max(random.uniform(0.5, 1.0) * pause, min(missing, LONGEST_FACTOR * pause))


BUDGET = RetryBudget()
"""Of this process."""
