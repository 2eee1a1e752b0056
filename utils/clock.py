"""How long a training has run, over all its interruptions, and when its time is up."""
import time

STARTED = time.monotonic()  # import this module first: the slow imports count too


class Clock:
    """`before`: seconds that earlier, interrupted runs of this training took. `limit`: seconds; 0 is none."""

    def __init__(self, before, limit):
        self.before, self.limit, self.reserve = before, limit, 6.0  # reserve: until an evaluation has been measured

    def elapsed(self):
        return self.before + time.monotonic() - STARTED

    def over(self):
        """Whether the time is up, with enough of it left to evaluate and save."""
        return bool(self.limit) and self.elapsed() + self.reserve >= self.limit

    def measure(self, began):
        """Remember how long an evaluation took that began at `began` seconds: the last one, and the exit, must fit."""
        self.reserve = 1.5 * (self.elapsed() - began) + 2
