"""The content of ``trainer.json``: the tries to certify a policy for a kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

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

    def with_latest(self, latest: Try) -> State:
        """The same with the latest try replaced, or added if it is a new one."""
        others = [one for one in self.tries if one.number != latest.number]
        return State(RECORDING, (*others, latest))

    def ended(self, outcome: str, last: bool) -> State:
        """The same once the latest try has ended; after the last one there will be no other."""
        status = CERTIFIED if outcome == CERTIFIED else GIVEN_UP if last else RECORDING
        latest = replace(self.tries[-1], outcome=outcome)
        return State(status, self.with_latest(latest).tries)


@dataclass(frozen=True)
class Due:
    """A try to make now.

    Attributes:
        state: the state; its latest try is the one to make.
        number: how many tries there are for these weights, this one included.
        since: rows of files up to this number were there at the try before; -1 for the first.
        last: whether there will be no other try.

    """

    state: State
    number: int
    since: int
    last: bool

    @property
    def latest(self) -> Try:
        """The try to make."""
        return self.state.tries[-1]

    @property
    def share_of_delta(self) -> float:
        """Its share; those of all tries add up to less than 1."""
        return 1 / (self.number * (self.number + 1))
