"""Comparisons of shadow requests, counted in the order of their steps without stopping a device.

A step asks the device for its comparisons and goes on. They are counted before the answers of the
step leave this worker, and before the next step decides by them: on whoever needs them first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple

from vllm_adainfer.engine.runner.admitted_kinds import AdmittedKinds, Decided
from vllm_adainfer.exits.loop.loop import Loop
from vllm_adainfer.exits.loop.shadow import Judgement


class EndedStep(NamedTuple):
    """A step that has run, and what is to be counted of it.

    Attributes:
        number: one more than that of the step before.
        judgements: the comparisons of its shadow requests.
        decided: what its ledgers count; None without ledgers.

    """

    number: int
    judgements: Sequence[Judgement]
    decided: Decided | None


class Judgements:
    """Counts the steps that have run in watches and ledgers.

    Attributes:
        lock: held while something is counted, by the thread of the steps or by the one that waits
            for answers.
        last: the number of the last step.

    """

    def __init__(self, loop: Loop) -> None:
        """Count comparisons of `loop`."""
        self.lock, self.last = Lock(), 0
        self._loop = loop
        self._waiting: deque[EndedStep] = deque()

    def step_ended(self, kinds: AdmittedKinds | None) -> None:
        """Keep what is to be counted of the step that has just run."""
        self.last += 1
        decided = None if kinds is None else kinds.take_decided()
        self._waiting.append(EndedStep(self.last, self._loop.take_judgements(), decided))

    @property
    def has_arrived(self) -> bool:
        """Whether `judge` would not wait for the device."""
        return all(one.has_arrived for step in self._waiting for one in step.judgements)

    def judge(self, kinds: AdmittedKinds | None, last: int | None = None) -> None:
        """Count all steps up to number `last`, by default all that have run."""
        with self.lock:
            while self._waiting and (last is None or self._waiting[0].number <= last):
                step = self._waiting.popleft()
                for one in step.judgements:
                    one.judge()
                if kinds is not None and step.decided is not None:
                    kinds.step_ended(step.decided, self._loop.take_misses())
                    self._loop.tighten(kinds.closed)
