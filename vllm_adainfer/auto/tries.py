"""The tries to certify a policy for a kind, at so many recorded rows: the content of a file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

TRIES = (1_500, 3_000, 6_000)
MOST_ROWS = TRIES[-1]  # after which a kind is not recorded any more
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
        outcome: `CERTIFIED`, or why it failed; None before it ends.

    """

    number: int
    fingerprint: str
    rows: int
    newest: int
    begun: int = 0
    outcome: str | None = None


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
        numbers = [one.number for one in self.tries if one.outcome == CERTIFIED]
        return max(numbers, default=None)

    def with_latest(self, latest: Try) -> State:
        """The same with the latest try replaced, or added if it is a new one."""
        others = [one for one in self.tries if one.number != latest.number]
        return State(RECORDING, (*others, latest))

    def ended(self, outcome: str, last: bool) -> State:
        """The same once the latest try has ended; after the last one there will be no other."""
        status = CERTIFIED if outcome == CERTIFIED else GIVEN_UP if last else RECORDING
        latest = replace(self.tries[-1], outcome=outcome)
        return State(status, self.with_latest(latest).tries)
