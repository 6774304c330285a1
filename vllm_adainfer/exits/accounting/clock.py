"""The clocks by which costs are known: times that are added up come from the device that serves."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

MOST_PENDING = 64  # parts of steps whose end the device has not reported; others are not timed


@dataclass(frozen=True)
class Clock:
    """Times calls, and waits for the device to finish them.

    Attributes:
        device: the device that runs what is called.
        threads: the number of threads in the serving process.

    """

    device: torch.device
    threads: int = 1

    def now(self) -> float:
        """The time in seconds, once the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
            return time.perf_counter()
        # A thread's own time does not count what others run on its core meanwhile.
        return time.thread_time() if self.threads == 1 else time.perf_counter()

    def seconds_of(self, call: Callable[[], object], rounds: int) -> float:
        """The median time of a call."""
        before, times = torch.get_num_threads(), []
        torch.set_num_threads(self.threads)
        try:
            for _ in range(rounds):
                start = self.now()
                call()
                times.append(self.now() - start)
        finally:
            torch.set_num_threads(before)
        return statistics.median(times)


class StepClock:
    """Times a part of the steps of a running server, and never waits for the device.

    Attributes:
        seconds: time of the parts whose end is known.
        work: what they have done, in units of the caller.
        steps: their number.

    """

    def __init__(self, device: torch.device, event: Callable[[], Any] | None = None) -> None:
        """Time what `device` runs; `event` makes its events, those of torch by default."""
        self._is_host = device.type == "cpu"
        self._event = event or (lambda: torch.Event(device, enable_timing=True))
        self.reset()

    def reset(self) -> None:
        """Start over."""
        self.seconds, self.work, self.steps = 0.0, 0, 0
        self._pending: deque[tuple[Any, Any, int]] = deque()

    @contextmanager
    def timing(self, work: int) -> Iterator[None]:
        """Time what runs meanwhile, which does so much work."""
        if self._is_host:
            began = time.perf_counter()
            yield
            self._add(time.perf_counter() - began, work)
            return
        self._collect()
        if len(self._pending) == MOST_PENDING:
            yield
            return
        start, end = self._event(), self._event()
        start.record()
        yield
        end.record()
        self._pending.append((start, end, work))

    def _collect(self) -> None:
        """Count the parts that have ended, in order."""
        while self._pending and self._pending[0][1].query():
            start, end, work = self._pending.popleft()
            self._add(start.elapsed_time(end) / 1e3, work)

    def _add(self, seconds: float, work: int) -> None:
        self.seconds += seconds
        self.work += work
        self.steps += 1


class StepTimes:
    """What a trainer beside a running server needs to know of its speed.

    Attributes:
        layers: of the first segment with layers, by token-layers.
        means: of reading whole prompts that are recorded, by their token rows, at each exit point.

    """

    def __init__(self, device: torch.device) -> None:
        """Time what `device` runs."""
        self.layers, self.means = StepClock(device), StepClock(device)

    def reset(self) -> None:
        """Start over."""
        self.layers.reset()
        self.means.reset()
