"""Rested: what may be asked by many, and costs a bounded share of the machine all the same."""

import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

_RESTS = 20  # times what an answer took

_Answer = TypeVar("_Answer")


class Rested(Generic[_Answer]):
    """A question that is asked again only after a rest; until then the last answer is given."""

    def __init__(
        self,
        ask: Callable[[], _Answer],
        *,
        least_seconds: float = 0.0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """It rests twenty times as long as it took, *least_seconds* at least."""
        self._ask, self._least_seconds, self._now = ask, least_seconds, now
        self._lock = threading.Lock()
        self._again_at = float("-inf")
        self._answers: tuple[_Answer, ...] = ()  # the last, if there is one

    def __call__(self) -> _Answer:
        """The answer; of those who ask together one asks, and the others are given the last answer.

        Only while there is none yet do they wait for it: who asks many, or what is slow, holds one thread.
        """
        if not self._lock.acquire(blocking=not self._answers):
            return self._answers[0]
        try:
            began = self._now()
            if began >= self._again_at:
                self._answers = (self._ask(),)
                ended = self._now()
                self._again_at = ended + max(self._least_seconds, (ended - began) * _RESTS)
            return self._answers[0]
        finally:
            self._lock.release()
