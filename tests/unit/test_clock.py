"""The clocks by which costs are known."""

from __future__ import annotations

import pytest
import torch

from vllm_adainfer.exits.accounting import clock
from vllm_adainfer.exits.accounting.clock import Clock, StepClock

GPU = torch.device("meta")  # any device that is not the host


class Queue:
    """A device that does what it was given only when `drain` is called."""

    def __init__(self) -> None:
        self.now, self.done, self.events = 0.0, 0, 0

    def event(self) -> Event:
        return Event(self)

    def drain(self) -> None:
        self.done = self.events


class Event:
    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def record(self) -> None:
        self.queue.events += 1
        self.number, self.at = self.queue.events, self.queue.now

    def query(self) -> bool:
        return self.number <= self.queue.done

    def elapsed_time(self, end: Event) -> float:
        assert end.query(), "reading it now would wait for the device"
        return 1e3 * (end.at - self.at)


def test_a_step_clock_counts_what_the_device_has_finished_and_never_waits_for_it():
    queue = Queue()
    steps = StepClock(GPU, queue.event)
    for work in (3, 5):
        with steps.timing(work):
            queue.now += work
    assert steps.steps == steps.work == 0
    queue.drain()
    with steps.timing(7):
        queue.now += 7
    assert (steps.seconds, steps.work, steps.steps) == (8.0, 8, 2)
    steps.reset()
    queue.drain()
    with steps.timing(1):
        pass
    assert (steps.seconds, steps.work, steps.steps) == (0.0, 0, 0), "what came before the reset"


def test_a_device_that_reports_nothing_keeps_no_more_than_so_many_events():
    queue = Queue()
    steps = StepClock(GPU, queue.event)
    for _ in range(2 * clock.MOST_PENDING):
        with steps.timing(1):
            pass
    queue.drain()
    with steps.timing(1):
        pass
    assert steps.steps == clock.MOST_PENDING


def test_a_step_clock_on_the_host_counts_at_once():
    steps = StepClock(torch.device("cpu"))
    with steps.timing(4):
        pass
    assert steps.work == 4
    assert steps.seconds > 0


def test_the_time_of_a_call_ends_when_the_device_has_finished_it(monkeypatch: pytest.MonkeyPatch):
    now = 0.0

    def drain(_: torch.device) -> None:
        nonlocal now
        now = max(now, queued)

    queued = 0.0

    def call() -> None:
        nonlocal queued
        queued = now + 2.0

    monkeypatch.setattr(torch.accelerator, "synchronize", drain)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    assert Clock(GPU).seconds_of(call, rounds=3) == 2.0
