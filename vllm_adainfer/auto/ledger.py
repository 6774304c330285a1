"""The ledger of a kind: how many answers may have been changed, at any moment and for any traffic.

Each request that is under a policy runs to full depth with probability q, by a private coin S, and
is then compared. L is 1 if the policy would change its answer. With fixed c and
lambda = -ln(1 - (1 - e^-c) / q), which needs q > 1 - e^-c,

    exp(c sum L - sum lambda S L)

is a martingale that begins at 1, whoever chooses the requests and policies, if both are chosen
before the coin. By Ville's inequality, for J values of c together, with confidence 1 - alpha,

    changed = sum L  <=  min over c of (ln(J / alpha) + sum lambda S L) / c     at every moment.

It bounds the past. It says nothing about the next hour, a subgroup, or accuracy.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from vllm_adainfer.errors import AdaInferError

# Large ones begin with a small bound and soon need a high rate, small ones go with low rates.
GRID = (0.2, 0.12, 0.06, 0.025)
LOWER_RATES = (0.12, 0.05)
MOST_UNUSED = 100.0  # changed answers that good times may leave for bad ones
# The rate falls where so many more misses would fit, if misses as frequent as before use at most
# this share of what requests earn.
ROOM, CALM = 2, 0.8
# So many misses in a row show whether a policy is worth it: a bound that rises more than twice as
# fast as requests earn would leave the kind under its policy less than half of the time.
JUDGED_BY, MOST_GROWTH = 24, 2


class Ledger:
    """Decides how many requests may be under a policy, and counts what they may have changed.

    In each step call `decidable`, then `add`. Coins are tossed with `rate` as it is in between.

    Attributes:
        epsilon: the share of a kind's requests that may be changed.
        alpha: the probability that the bound ever fails.
        rate: the probability of the coins.
        requests: all requests of the kind.
        decided: those that were under a policy.
        misses: the compared ones of these whose answer the policy would have changed.
        allowed: the budget, in changed answers: what requests have earned, unless it lay idle.
        why_closed: a sentence, once the kind is closed for good; None before.

    """

    def __init__(self, epsilon: float, alpha: float, rate: float) -> None:
        """Open a ledger without requests; `rate` is the highest of its rates.

        Raises:
            AdaInferError: the rate is too low to bound anything.

        """
        if growth(GRID[-1], rate) == math.inf:
            raise AdaInferError(
                f"additional_config: adainfer.auto.full_depth_rate: {rate:g} is too low to bound "
                f"anything: take at least {1 - math.exp(-GRID[-1]) + 0.005:.2f}"
            )
        self.epsilon, self.alpha = epsilon, alpha
        self.rates = (rate, *(lower for lower in LOWER_RATES if lower < rate))
        self.rate = rate
        self.requests = self.decided = self.misses = 0
        self.allowed = 0.0
        self.why_closed: str | None = None
        self._bounds = [math.log(len(GRID) / alpha) / c for c in GRID]  # by c, infinite once out
        self._weighed = 0.0  # misses over their rates: about all misses, compared or not
        # Requests decided, and the claim, before each of the last misses.
        self._latest: deque[tuple[int, float]] = deque(maxlen=JUDGED_BY)

    def use_rate(self, rate: float) -> None:
        """Go on with another highest rate, if it is another."""
        if rate != self.rates[0]:
            self.rates = (rate, *(lower for lower in LOWER_RATES if lower < rate))
            self.rate = rate

    @property
    def changed_at_most(self) -> float:
        """The claim: with confidence 1 - alpha, no more answers would have been changed."""
        return min(self._bounds)

    @property
    def is_closed(self) -> bool:
        """Whether no request will ever be under a policy again."""
        return self.why_closed is not None

    def decidable(self, compared: Sequence[bool]) -> int:
        """How many of a step's requests, from the first on, may be under the policy.

        `compared` are their coins, in order. Were every compared one of them a miss, the claim
        would still be within the budget. A request is let in or not before its own coin is looked
        at: only coins of earlier ones count against it, as the martingale needs.
        """
        room = 0 if self.is_closed else self._room(self.rate)
        count = 0
        for coin in compared:
            if room == 0:
                break
            count += 1
            room -= coin
        return count

    def add(self, requests: int, decided: int, misses: int) -> None:
        """Count a step, and set the rate for the next one.

        Args:
            requests: all requests of the kind in this step.
            decided: how many of them were under a policy, the compared ones included.
            misses: how many of the compared ones the policy would have changed.

        """
        self._latest += [(self.decided, self.changed_at_most)] * misses
        self.requests += requests
        self.decided += decided
        self.misses += misses
        self._weighed += misses / self.rate
        if decided:
            for index, c in enumerate(GRID):
                each = growth(c, self.rate)  # infinite: no multiple of the misses is a bound
                self._bounds[index] += misses * each if each < math.inf else math.inf
        earned = self.allowed + self.epsilon * requests
        self.allowed = min(earned, self.changed_at_most + MOST_UNUSED)
        self._judge()
        self._set_rate()

    def _judge(self) -> None:
        """Close the kind for good if its policy costs much more than its requests earn."""
        if self.is_closed or len(self._latest) < JUDGED_BY:
            return
        decided, claim = self._latest[0]
        since, spent = self.decided - decided, self.changed_at_most - claim
        if spent > MOST_GROWTH * self.epsilon * since:
            self.why_closed = (
                f"the policy would have changed {JUDGED_BY} compared answers of its last {since} "
                f"requests, which raises the bound by {spent:.0f}, and {self.epsilon:g} of these "
                f"requests are {self.epsilon * since:.0f}: the traffic has changed"
            )

    def _set_rate(self) -> None:
        """Go down a rate where the budget has room there, or up where it has none here."""
        place = self.rates.index(self.rate)
        if self._room(self.rate) == 0:
            self.rate = self.rates[max(0, place - 1)]
        elif place + 1 < len(self.rates) and self._has_room(self.rates[place + 1]):
            self.rate = self.rates[place + 1]

    def _has_room(self, rate: float) -> bool:
        """Whether the budget would last at this rate, by the misses seen so far and one more."""
        if not self.decided:
            return False
        share = (self._weighed + 1 / self.rate) / self.decided
        return self._room(rate, CALM * self.epsilon / (rate * share)) >= ROOM

    def _room(self, rate: float, most: float = math.inf) -> int:
        """How many misses fit into the budget at this rate, where one adds at most `most`."""
        steps = [growth(c, rate) for c in GRID]
        rooms = [
            int((self.allowed - bound) / each)
            for bound, each in zip(self._bounds, steps, strict=True)
            if bound <= self.allowed and each <= most and each < math.inf
        ]
        return max(rooms, default=0)

    def as_dict(self) -> dict[str, Any]:
        """The whole state, for a JSON file."""
        return {
            "epsilon": self.epsilon,
            "alpha": self.alpha,
            "rates": list(self.rates),
            "rate": self.rate,
            "requests": self.requests,
            "decided": self.decided,
            "misses": self.misses,
            "allowed": self.allowed,
            "bounds": [bound if bound < math.inf else None for bound in self._bounds],
            "weighed": self._weighed,
            "latest": list(self._latest),
            "why_closed": self.why_closed,
        }

    @classmethod
    def of_dict(cls, state: Any) -> Ledger | None:
        """The ledger that `as_dict` described, to go on exactly; None if that is damaged.

        A damaged one begins anew, without its requests: what they earned may be spent.
        """
        try:
            ledger = cls(float(state["epsilon"]), float(state["alpha"]), float(state["rates"][0]))
            ledger.rate = ledger.rates[ledger.rates.index(state["rate"])]
            ledger.requests = int(state["requests"])
            ledger.decided, ledger.misses = int(state["decided"]), int(state["misses"])
            ledger.allowed, ledger._weighed = float(state["allowed"]), float(state["weighed"])
            bounds = [math.inf if one is None else float(one) for one in state["bounds"]]
            ledger._bounds = [max(pair) for pair in zip(bounds, ledger._bounds, strict=True)]
            ledger._latest += [(int(decided), float(claim)) for decided, claim in state["latest"]]
            ledger.why_closed = None if state["why_closed"] is None else str(state["why_closed"])
        except (AdaInferError, ArithmeticError, KeyError, TypeError, ValueError):
            return None
        return ledger


@functools.cache
def growth(c: float, rate: float) -> float:
    """What a compared miss adds to the bound by `c`; infinite if the rate is too low for it."""
    share = (1 - math.exp(-c)) / rate
    return -math.log(1 - share) / c if share < 1 else math.inf
