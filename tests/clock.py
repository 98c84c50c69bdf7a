"""Time for what is told the time."""


class Clock:
    """Seconds that pass when they are told to: `clock.now += 1`."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
