"""Which studies are due, told the time.

A study is due once it was quiet for *quiet_seconds*, or once its oldest unpublished arrival has
waited for *patience_seconds*; but a study whose last publish took c seconds rests for c / SHARE after it,
so that republishing while it keeps arriving never takes more than about SHARE of the time.
"""

from dataclasses import dataclass

SHARE = 0.05
"""Of the time, what republishing one arriving study may take."""

_MOST_RESTING = 1000


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
        self._rests_until: dict[str, float] = {}
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

    def published(self, study_uid: str, upto: int, *, seconds: float = 0.0, now: float = 0.0) -> None:
        """The study was published (or set aside) with all arrivals up to *upto*, at a cost of *seconds*.

        What arrived during the compile stays due, its patience counted from *now*.
        """
        self._asked.discard(study_uid)
        self._rest(study_uid, seconds, now)
        waiting = self._waiting.get(study_uid)
        if waiting is None:
            return
        if waiting.seq <= upto:
            del self._waiting[study_uid]
        else:
            waiting.first = max(waiting.first, now)

    def _rest(self, study_uid: str, seconds: float, now: float) -> None:
        """Let the study rest for what its publish took; those that have rested are forgotten at times."""
        self._rests_until[study_uid] = now + seconds / SHARE
        if len(self._rests_until) > _MOST_RESTING + len(self._waiting):
            self._rests_until = {uid: until for uid, until in self._rests_until.items() if until > now}

    def _ripe_at(self, study_uid: str, waiting: _Waiting) -> float:
        if study_uid in self._asked:
            return waiting.first
        ripe = min(waiting.last + self._quiet, waiting.first + self._patience)
        return max(ripe, self._rests_until.get(study_uid, ripe))
