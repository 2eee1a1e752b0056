"""How long a training has run, over all its interruptions, and when its time is up."""
import time

STARTED = time.monotonic()  # import this module first: the slow imports count too


class Clock:
    """`before`: seconds that earlier, interrupted runs of this training took. `limit`: seconds; 0 is none.

    `each`: the time of how many iterations an evaluation is thought to take, until one has been measured.
    """

    def __init__(self, before, limit, each=0.0):
        self.before, self.limit, self.each, self.reserve = before, limit, each, None
        self.since, self.count = None, 0  # the time of the first iteration since an evaluation, and how many there were

    def elapsed(self):
        return self.before + time.monotonic() - STARTED

    def over(self):
        """After an iteration: whether the time is up, with enough of it left for one more, to evaluate, and to save."""
        now = self.elapsed()
        self.since, self.count = self.since or now, self.count + 1  # the first may have been compiled, so it does not count
        one = (now - self.since) / max(1, self.count - 1)
        reserve = 6 + self.each * one if self.reserve is None else self.reserve
        return bool(self.limit) and now + one + reserve >= self.limit

    def measure(self, began):
        """Remember how long an evaluation took that began at `began` seconds: the last one, and the exit, must fit."""
        self.reserve, self.since, self.count = 1.5 * (self.elapsed() - began) + 2, None, 0
