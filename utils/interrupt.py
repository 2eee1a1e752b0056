"""Ctrl-C and SIGTERM, answered between two iterations instead of in the middle of one."""
import signal

from utils import ranks


class Interrupt:
    """Within `with Interrupt() as interrupt:` the first signal only sets `interrupt.asked`; a second one ends at once.

    An exception raised half-way through an optimizer step would leave weights that belong to no iteration.
    """
    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def _note(self, number, frame):
        if self.asked and ranks.world() == 1:  # torchrun may send one more
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)
