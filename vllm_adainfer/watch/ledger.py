"""The ledger of a kind: how many answers were changed, at any moment and for any traffic.

Each request that is under a policy runs to full depth with probability q, by a private coin S, and
is then compared: its answer is that of full depth. L is 1 if the policy would change its answer, so
L (1 - S) is 1 if it did. With fixed c and lambda = -ln(1 - (1 - e^-c) / q), which needs
q > 1 - e^-c,

    exp(c sum L - sum lambda S L)  =  exp(c sum L (1 - S) - sum (lambda - c) S L)

is a martingale that begins at 1, whoever chooses the requests and policies, if both are chosen
before the coin. By Ville's inequality, for J values of c together, with confidence 1 - alpha,

    changed = sum L (1 - S)  <=  min over c of (ln(J / alpha) + sum (lambda - c) S L) / c

at every moment. It bounds the past. It says nothing about the next hour, a subgroup, or accuracy.

So that the claim stays within the budget whatever a step brings, a step's requests are let in only
as far as the claim could bear it if all of them were misses. No rule that keeps this promise can
let in many more: were all misses, so many answers would be changed. Hence the budget must hold more
than a step before whole steps exit, and more of it is kept where steps are large.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Floats
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.watch.evidence import Evidence, log_factors

# Large ones begin with a small bound and soon need a high rate, small ones go with low rates.
GRID = (0.2, 0.12, 0.06, 0.025)
LOWER_RATES = (0.12, 0.08, 0.045)
# The changed answers that good times may leave for bad ones: so many, or so many largest steps.
MOST_UNUSED, MOST_UNUSED_STEPS = 100.0, 3
# What closes a kind bets that so many times epsilon is missed, and is rarely wrong. Other gamblers
# begin after so many requests under a policy.
TIMES, BLOCK, ERROR_RATE = np.array([2, 5, 20]), 1000, 0.01
# The rate falls where so many more misses would fit, and all that a step compares, if misses as
# frequent as before use at most this share of what requests earn.
ROOM, CALM = 2, 0.8


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
        largest_step: the most requests of the kind in one step.
        allowed: the budget, in changed answers: what requests have earned, unless it lay idle.
        why_closed: a sentence while the kind is closed; None while its requests may exit.
        closings: how often it has been closed.

    """

    def __init__(self, epsilon: float, alpha: float, rate: float) -> None:
        """Open a ledger without requests; `rate` is the highest of its rates.

        An AdaInferError if the rate is too low to bound anything.
        """
        if growth(GRID[-1], rate) == math.inf:
            raise AdaInferError(
                f"additional_config: adainfer.auto.full_depth_rate: {rate:g} is too low to bound "
                f"anything: take at least {1 - math.exp(-GRID[-1]) + 0.005:.2f}"
            )
        self.epsilon, self.alpha = epsilon, alpha
        self.requests = self.decided = self.misses = self.largest_step = self.closings = 0
        self.allowed = 0.0
        self.why_closed: str | None = None
        self._bounds = first_bounds(alpha)  # by c, infinite once out
        self._weighed = 0.0  # misses over their rates: about all misses, compared or not
        self._evidence = self._new_evidence()
        self._take_rates(rate)

    def _new_evidence(self) -> Evidence:
        """Evidence without a bet; the error rates of all that there ever are add up to one."""
        share = 1 / ((self.closings + 1) * (self.closings + 2))
        return Evidence(len(TIMES), BLOCK, share * ERROR_RATE)

    def open_again(self) -> None:
        """Let requests of a closed kind exit under a new policy; what is spent stays spent.

        Nothing is evidence against the new policy yet.
        """
        self._evidence, self.why_closed = self._new_evidence(), None

    def use_rate(self, rate: float) -> None:
        """Go on with another highest rate, if it is another."""
        if rate != self.rates[0]:
            self._take_rates(rate)

    def _take_rates(self, highest: float) -> None:
        self.rates = (highest, *(lower for lower in LOWER_RATES if lower < highest))
        self._go_to(highest)

    def _go_to(self, rate: float) -> None:
        """Toss further coins with `rate`, and give up the bounds that it cannot carry on."""
        self.rate = rate
        for index, c in enumerate(GRID):
            if growth(c, rate) == math.inf:
                self._bounds[index] = math.inf

    @property
    def changed_at_most(self) -> float:
        """The claim: with confidence 1 - alpha, no more answers were changed."""
        return min(self._bounds)

    @property
    def is_closed(self) -> bool:
        """Whether no request may be under the policy that serves now."""
        return self.why_closed is not None

    def decidable(self, compared: Sequence[bool]) -> int:
        """How many of a step's requests, from the first on, may be under the policy.

        `compared` are their coins, in order. Were every compared one of them a miss, the claim
        would still be within the budget. A request is let in or not before its own coin is looked
        at: only coins of earlier ones count against it, as the martingale needs.
        """
        room, count = self.spare(len(compared)), 0
        for coin in compared:
            if room == 0:
                break
            count += 1
            room -= coin
        return count

    def add(self, requests: int, decided: int, misses: int) -> None:
        """Count a step, and set the rate for the next one.

        Of its `requests`, `decided` were under a policy, the compared ones included; of these, the
        policy would have changed `misses`.
        """
        self.requests += requests
        self.decided += decided
        self.largest_step = max(self.largest_step, requests)
        self._count(misses)
        most_unused = max(MOST_UNUSED, MOST_UNUSED_STEPS * self.largest_step)
        earned = self.allowed + self.epsilon * requests
        # Beyond the bound that the lowest rate goes on with: below it, that rate would never fit.
        self.allowed = min(earned, self._bounds[-1] + most_unused)
        self._judge(decided, misses)
        self._set_rate()

    def _count(self, misses: int) -> None:
        self.misses += misses
        self._weighed += misses / self.rate
        for index, c in enumerate(GRID):
            if self._bounds[index] < math.inf:
                self._bounds[index] += misses * growth(c, self.rate)

    def spare(self, most: int) -> int:
        """How many further misses the budget allows for, at most `most`."""
        return 0 if self.is_closed else min(most, self._room(self.rate))

    def _judge(self, decided: int, misses: int) -> None:
        """Close the kind once it is evident that its policy changes too much."""
        if self.is_closed or not decided:
            return
        self._evidence.add(miss_factors(self.epsilon, self.rate, decided, misses), decided)
        if self._evidence.is_enough:
            self.closings += 1
            self.why_closed = (
                f"its policy changes more than {self.epsilon:g} of the answers, by evidence that "
                f"is wrong for {ERROR_RATE:.0%} of kinds at most: the traffic has changed"
            )

    def _set_rate(self) -> None:
        """Go down a rate where whole steps would exit there, or up where half of one would not."""
        place = self.rates.index(self.rate)
        if self._room(self.rate) < max(1, self.rate * self.largest_step / 2):
            self._go_to(self.rates[max(0, place - 1)])
        elif place + 1 < len(self.rates) and self._has_room(self.rates[place + 1]):
            self._go_to(self.rates[place + 1])

    def _has_room(self, rate: float) -> bool:
        """Whether whole steps would exit at this rate for long, by all misses and one more."""
        if not self.decided:
            return False
        share = (self._weighed + 1 / self.rate) / self.decided
        room = self._room(rate, CALM * self.epsilon / (rate * share))
        return room >= max(ROOM, rate * self.largest_step)

    def _room(self, rate: float, most: float = math.inf) -> int:
        """How many misses fit into the budget at this rate, where one adds at most `most`."""
        steps = [growth(c, rate) for c in GRID]
        rooms = [
            int((self.allowed - bound) / each)
            for bound, each in zip(self._bounds, steps, strict=True)
            if bound <= self.allowed and each <= most and each < math.inf
        ]
        return max(rooms, default=0)

    def as_dict(self, reserved: int = 0) -> dict[str, Any]:
        """The whole state, for a JSON file; `reserved` misses will count as if they had happened.

        ``changed_at_most`` and ``closed`` are for who reads the file.
        """
        return {
            "epsilon": self.epsilon,
            "alpha": self.alpha,
            "rates": list(self.rates),
            "rate": self.rate,
            "requests": self.requests,
            "decided": self.decided,
            "misses": self.misses,
            "largest_step": self.largest_step,
            "allowed": self.allowed,
            "bounds": [bound if bound < math.inf else None for bound in self._bounds],
            "weighed": self._weighed,
            "evidence": self._evidence.as_dict(),
            "why_closed": self.why_closed,
            "closings": self.closings,
            "reserved": reserved,
            "changed_at_most": self.changed_at_most if self.decided else 0.0,
            "closed": self.is_closed,
        }

    @classmethod
    def of_dict(cls, state: Any) -> Ledger | None:
        """The ledger that `as_dict` described, to go on exactly; None if that is damaged.

        A damaged one begins anew, without its requests: what they earned may be spent. One that an
        earlier version wrote has bounds on all misses, which are above those on changed answers,
        and no evidence yet; its rate may be none of today's, and the next higher one is taken.
        """
        try:
            ledger = cls(float(state["epsilon"]), float(state["alpha"]), float(state["rates"][0]))
            rate = float(state["rate"])
            ledger._go_to(min(one for one in ledger.rates if one >= rate))
            ledger.requests = int(state["requests"])
            ledger.decided, ledger.misses = int(state["decided"]), int(state["misses"])
            ledger.allowed, ledger._weighed = float(state["allowed"]), float(state["weighed"])
            bounds = [math.inf if one is None else float(one) for one in state["bounds"]]
            ledger._bounds = [max(pair) for pair in zip(bounds, ledger._bounds, strict=True)]
            ledger.largest_step = int(state.get("largest_step", 0))
            ledger.why_closed = None if state["why_closed"] is None else str(state["why_closed"])
            ledger.closings = int(state.get("closings", ledger.is_closed))
            ledger._evidence = ledger._new_evidence()
            if "evidence" in state:
                ledger._evidence.restore(state["evidence"])
            # They are no evidence against the policy, as they may not have happened.
            ledger._count(int(state.get("reserved", 0)))
        except (AdaInferError, ArithmeticError, KeyError, TypeError, ValueError):
            return None
        return ledger


def first_bounds(alpha: float) -> list[float]:
    """By c, the bound before any miss; all of them hold together with confidence 1 - `alpha`."""
    return [math.log(len(GRID) / alpha) / c for c in GRID]


@functools.cache
def growth(c: float, rate: float) -> float:
    """The growth of the bound by `c` with a compared miss; infinite if the rate is too low.

    It was answered at full depth itself; others that no coin compared were not.
    """
    share = (1 - math.exp(-c)) / rate
    return -math.log(1 - share) / c - 1 if share < 1 else math.inf


def miss_factors(epsilon: float, rate: float, decided: int, misses: int) -> Floats:
    """[bets], the `log_factors` of a step's requests that are under a policy.

    Each is a compared miss with probability rate p, where p is that of a miss given the past. The
    bets are on several p above `epsilon`.
    """
    bound = rate * epsilon
    stakes = (rate * np.minimum(1, TIMES * epsilon) - bound) / (1 - bound)
    hits = (decided - misses) * log_factors(stakes, bound, 0)
    factors: Floats = misses * log_factors(stakes, bound, 1) + hits
    return factors
