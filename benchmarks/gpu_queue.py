"""Host and device as two queues: what a repeated step takes when the host may run ahead.

The host enqueues and goes on; the device does what is enqueued, in order. Only a read makes the
host wait. As in vLLM's asynchronous scheduling, the host prepares a step while the device runs the
one before it, but not while two others are unfinished. So the host's time is hidden behind a slower
device, and a read within the step takes that away: what the host does after it, up to the next
launch, the device mostly waits for.
"""

from __future__ import annotations

from collections.abc import Callable

AHEAD = 2  # unfinished steps at most, when the host begins another one
STEPS = 24  # that are simulated, of which the first half is not counted


class Queues:
    """When host and device have done all that they were given, in seconds.

    Attributes:
        host: the host's time.
        device: when the device has run all that is enqueued.
        idle: how long it had nothing to do so far.
        delay: seconds from a launch on the host until the device can begin it.
        slower: what the host's times are multiplied with.

    """

    def __init__(self, delay: float = 0.0, slower: float = 1.0) -> None:
        """Both begin at 0."""
        self.host = self.device = self.idle = 0.0
        self.delay, self.slower = delay, slower
        self._ended: list[float] = []

    def work(self, seconds: float) -> None:
        """Work of the host."""
        self.host += self.slower * seconds

    def launch(self, seconds: float, host: float = 0.0) -> None:
        """Device work that takes `seconds`, and `host` seconds to enqueue piece by piece."""
        begins = max(self.device, self.host + self.delay)
        self.work(host)
        ends = max(begins + seconds, self.host + self.delay)
        self.idle += ends - self.device - seconds
        self.device = ends

    def read(self, seconds: float) -> None:
        """Wait until all that is enqueued has run; the copy to the host takes `seconds`."""
        self.host = max(self.host, self.device) + seconds

    def step(self, step: Callable[[Queues], None]) -> None:
        """Run a step, once few enough are unfinished."""
        if len(self._ended) >= AHEAD:
            self.host = max(self.host, self._ended[-AHEAD])
        step(self)
        self._ended.append(self.device)


def steady(step: Callable[[Queues], None], delay: float = 0.0, slower: float = 1.0) -> float:
    """Seconds of `step` where it follows many like it; see `Queues`."""
    queues = Queues(delay, slower)
    for _ in range(STEPS // 2):
        queues.step(step)
    begins = queues.device
    for _ in range(STEPS // 2):
        queues.step(step)
    return (queues.device - begins) / (STEPS // 2)
