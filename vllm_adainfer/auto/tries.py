"""The tries to certify a policy for a kind, at so many recorded rows: the content of a file.

Tries go on while a policy serves: one that saves more takes its place. The tries of a *course* are
made from its own rows; another course begins where the traffic has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

TRIES = (1_000, 2_000, 4_000)
MOST_ROWS = TRIES[-1]  # after which a kind is not recorded any more
MORE = 0.01  # of the layers, which a policy must save beyond that of an earlier try
RECORDING, CERTIFIED, GIVEN_UP = "recording", "certified", "given up"


@dataclass(frozen=True)
class Try:
    """A try to certify a policy.

    Attributes:
        number: the policy's, from 1.
        fingerprint: the weights that the rows are of.
        rows: rows of the kind at the time.
        newest: the number of the newest file of rows.
        begun: how many trainers have begun it.
        outcome: `CERTIFIED`, or why there is no policy or the one before serves on; None before it
            ends.
        course: the course that it is part of, from 0.
        layers_saved: the share of the layers that a certified policy saves on the held-out rows.

    """

    number: int
    fingerprint: str
    rows: int
    newest: int
    begun: int = 0
    outcome: str | None = None
    course: int = 0
    layers_saved: float = 0.0


@dataclass(frozen=True)
class State:
    """The state of a kind: what its rows are kept for, and its tries, the latest last."""

    status: str = RECORDING
    tries: tuple[Try, ...] = ()

    @classmethod
    def of(cls, content: Any) -> State:
        """The state in a file; a fresh one if there is none or it is damaged."""
        try:
            state = cls(content["status"], tuple(Try(**one) for one in content["tries"]))
        except (KeyError, TypeError):
            return cls()
        return state if state.tries or state.status == RECORDING else cls()

    @property
    def certified(self) -> int | None:
        """The number of the policy to serve, which was certified last; None for none."""
        best = self.best()
        return None if best is None else best.number

    @property
    def course(self) -> int:
        """The course of the latest try; 0 before any."""
        return self.tries[-1].course if self.tries else 0

    def best(self, course: int | None = None) -> Try | None:
        """The try that certified the latest policy, of a course or of all; None for none."""
        found = [
            one for one in self.tries if one.outcome == CERTIFIED and course in (None, one.course)
        ]
        return max(found, key=lambda one: one.number, default=None)

    def with_latest(self, latest: Try) -> State:
        """The same with the latest try replaced, or added if it is a new one."""
        others = [one for one in self.tries if one.number != latest.number]
        return State(RECORDING, (*others, latest))

    def ended(self, outcome: str, last: bool, layers_saved: float = 0.0) -> State:
        """The same once the latest try has ended; after the last one its course has no other."""
        latest = replace(self.tries[-1], outcome=outcome, layers_saved=layers_saved)
        state = self.with_latest(latest)
        if not last:
            return state
        return State(CERTIFIED if state.best(latest.course) else GIVEN_UP, state.tries)
