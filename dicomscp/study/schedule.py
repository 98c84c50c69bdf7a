"""Which studies are due, told the time.

A study is due once it was quiet for *quiet_seconds*, or once its oldest unpublished arrival has
waited for its patience.  Patience grows with what a publish costs: a study whose last publish took
c seconds waits at least c / SHARE between publishes, so that republishing while it keeps arriving
never takes more than about SHARE of the time.
"""

from dataclasses import dataclass

SHARE = 0.05
"""Of the time, what republishing one arriving study may take."""


@dataclass(slots=True)
class _Waiting:
    first: float
    last: float
    seq: int


class Schedule:
    """The studies that wait to be published.  Times are seconds on any one rising clock."""

    def __init__(self, *, quiet_seconds: float, patience_seconds: float) -> None:
        """Both in seconds; zero patience means quiet alone decides never, every look publishes."""
        self._quiet = quiet_seconds
        self._patience = patience_seconds
        self._waiting: dict[str, _Waiting] = {}
        self._cost: dict[str, float] = {}
        self._asked: set[str] = set()

    def __len__(self) -> int:
        """How many studies wait."""
        return len(self._waiting)

    def arrived(self, study_uid: str, seq: int, now: float) -> None:
        """Something of the study arrived; *seq* rises with every arrival."""
        waiting = self._waiting.get(study_uid)
        if waiting is None:
            self._waiting[study_uid] = _Waiting(first=now, last=now, seq=seq)
        else:
            waiting.last = max(waiting.last, now)
            waiting.seq = max(waiting.seq, seq)

    def asked(self, study_uid: str) -> None:
        """Somebody waits for the study: if it waits to be published, it is due now."""
        if study_uid in self._waiting:
            self._asked.add(study_uid)

    def due(self, now: float) -> list[str]:
        """The studies to publish now, longest waiting first."""
        ripe = [
            (waiting.first, study_uid)
            for study_uid, waiting in self._waiting.items()
            if self._ripe_at(study_uid, waiting) <= now
        ]
        return [study_uid for _, study_uid in sorted(ripe)]

    def next_due(self) -> float | None:
        """When the next study becomes due if nothing more arrives, or None if none waits."""
        return min((self._ripe_at(uid, waiting) for uid, waiting in self._waiting.items()), default=None)

    def published(self, study_uid: str, upto: int, *, seconds: float = 0.0, now: float = 0.0) -> None:
        """The study was published (or set aside) with all arrivals up to *upto*, at a cost of *seconds*.

        What arrived during the compile stays due, its patience counted from *now*.
        """
        self._asked.discard(study_uid)
        waiting = self._waiting.get(study_uid)
        if waiting is None:
            return
        if waiting.seq <= upto:
            del self._waiting[study_uid]
            self._cost.pop(study_uid, None)
        else:
            waiting.first = max(waiting.first, now)
            self._cost[study_uid] = seconds

    def seq(self, study_uid: str) -> int:
        """The newest arrival known of a waiting study; zero if it does not wait."""
        waiting = self._waiting.get(study_uid)
        return waiting.seq if waiting else 0

    def _ripe_at(self, study_uid: str, waiting: _Waiting) -> float:
        if study_uid in self._asked:
            return waiting.first
        patience = max(self._patience, self._cost.get(study_uid, 0.0) / SHARE)
        return min(waiting.last + self._quiet, waiting.first + patience)
