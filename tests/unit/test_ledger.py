"""The ledger bounds changed answers whoever sends requests, and spends no more than it has."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.watch.ledger import GRID, LOWER_RATES, MOST_UNUSED, MOST_UNUSED_STEPS, Ledger

EPSILON, ALPHA, RATE = 0.02, 0.1, 0.25
STREAMS, STEPS = 200, 160  # of each adversary


@dataclass
class Stream:
    """A ledger, and what its adversary may know: the past.

    Attributes:
        ledger: the ledger.
        random: the coins, and the adversary's own whims.
        changed: answers that policies have changed so far: misses that no coin compared.
        exits: requests that policies have answered.
        violated: whether more answers were ever changed than the claim.

    """

    ledger: Ledger
    random: np.random.Generator
    changed: int = 0
    exits: int = 0
    violated: bool = False

    def step(self, misses: Callable[[int], np.ndarray], size: int, foreseen: bool = False) -> int:
        """Send requests; `misses` names those that a policy would change, before the coins.

        Returns how many could be under a policy. With `foreseen`, only those that no coin compares
        are misses.
        """
        ledger, coins = self.ledger, self.random.random(size) < self.ledger.rate
        decided = ledger.decidable(coins.tolist())
        coins = coins[:decided]
        missed = misses(size)[:decided]
        if foreseen:
            missed = missed & ~coins
        self.changed += int((missed & ~coins).sum())
        self.exits += int((~coins).sum())
        ledger.add(size, decided, int((missed & coins).sum()))
        self.violated |= self.changed > ledger.changed_at_most
        return decided


def record(ledger: Ledger, requests: int, size: int = 50) -> None:
    """Count requests before there is a policy."""
    for begun in range(0, requests, size):
        ledger.add(min(size, requests - begun), 0, 0)


def at(rate: float, stream: Stream) -> Callable[[int], np.ndarray]:
    return lambda size: stream.random.random(size) < rate


Adversary = Callable[[Stream, int], float]  # the share of misses of a step, by its number
ADVERSARIES: dict[str, Adversary] = {
    "constant": lambda stream, step: 0.015,
    "just above epsilon": lambda stream, step: 1.1 * stream.ledger.epsilon,
    "far above epsilon": lambda stream, step: 0.3,
    "bursts": lambda stream, step: 0.5 if step % 20 == 0 else 0.0,
    "all at the opening": lambda stream, step: float(stream.ledger.misses < 8),
    "stops when ahead": lambda stream, step: float(
        stream.changed < stream.ledger.changed_at_most - 1
    ),
    "goes on while lucky": lambda stream, step: float(
        stream.ledger.misses < 0.9 * RATE / (1 - RATE) * max(1, stream.changed)
    ),
    "another policy every ten steps": lambda stream, step: 0.2 * (step // 10 % 2),
    "waits for lower rates": lambda stream, step: float(stream.ledger.rate < RATE) or 0.002,
    "never": lambda stream, step: 0.0,
}


def violated(streams: int, share_of: Adversary | None) -> int:
    """How many streams of an adversary ever broke the claim; None is one who knows the coins."""
    count = 0
    for number in range(streams):
        random = np.random.default_rng([7, number])
        epsilon = float(random.choice([0.01, 0.02, 0.05]))
        stream = Stream(Ledger(epsilon, ALPHA, RATE), random)
        record(stream.ledger, round(40 / epsilon))
        for step in range(STEPS):
            if share_of is None:
                stream.step(lambda size: np.ones(size, dtype=bool), 50, foreseen=True)
            else:
                stream.step(at(share_of(stream, step), stream), int(random.integers(1, 120)))
        count += stream.violated
    return count


@pytest.mark.parametrize("adversary", ADVERSARIES)
def test_the_claim_fails_for_at_most_alpha_of_an_adversary_s_streams(adversary):
    deviation = math.sqrt(STREAMS * ALPHA * (1 - ALPHA))
    assert violated(STREAMS, ADVERSARIES[adversary]) <= ALPHA * STREAMS + 3 * deviation


def test_the_claim_would_fail_if_an_adversary_knew_the_coins():
    assert violated(50, None) > 2 * ALPHA * 50


@pytest.mark.parametrize("c", GRID)
@pytest.mark.parametrize("rate", [0.25, *LOWER_RATES, 0.9])
def test_a_compared_miss_makes_up_for_those_that_are_changed(c, rate):
    """The oracle is the expectation over the coin: the capital stays 1."""
    ledger = Ledger(EPSILON, ALPHA, rate)
    ledger.add(1, 1, 1)
    bound = ledger.as_dict()["bounds"][GRID.index(c)]
    if 1 - math.exp(-c) >= rate:
        assert bound is None
    else:
        weight = bound * c - math.log(len(GRID) / ALPHA)
        assert math.exp(c) * (1 - rate) + rate * math.exp(-weight) == pytest.approx(1)


def test_a_ledger_opens_once_requests_have_earned_what_a_miss_would_cost():
    ledger = Ledger(EPSILON, ALPHA, RATE)
    opened = next(n for n in range(10_000) if ledger.decidable([True]) or ledger.add(1, 0, 0))
    assert 1100 < opened < 1740
    assert ledger.changed_at_most == pytest.approx(math.log(len(GRID) / ALPHA) / max(GRID))
    record(ledger, 1740 - opened, 1)  # by hand, for c = 0.12: (30.7 + 4.0) / 0.02
    assert ledger.decidable([False, True, False, True, False]) >= 2


def test_a_request_is_let_in_whatever_its_own_coin_is():
    ledger = Ledger(EPSILON, ALPHA, RATE)
    record(ledger, 2200)
    for before in ([], [True], [False, True, True], [True] * 9):
        taken = [ledger.decidable([*before, coin]) for coin in (False, True)]
        assert taken[0] == taken[1]
    assert ledger.decidable([True] * 99) < ledger.decidable([False] * 99) == 99


@pytest.mark.parametrize("share", [0.01, 0.03, 1.0])
@pytest.mark.parametrize("size", [1, 7, 64, 512])
def test_the_claim_never_exceeds_the_budget_once_requests_leave(share, size):
    stream = Stream(Ledger(EPSILON, ALPHA, RATE), np.random.default_rng(3))
    for _ in range(max(15_000, 60 * size) // size):
        stream.step(at(share, stream), size)
        ledger = stream.ledger
        assert ledger.allowed <= EPSILON * ledger.requests + 1e-9
        if ledger.decided:
            assert ledger.changed_at_most <= ledger.allowed + 1e-9
        most_unused = max(MOST_UNUSED, MOST_UNUSED_STEPS * size)
        last = ledger.as_dict()["bounds"][-1]  # which the lowest rate goes on with
        assert ledger.allowed <= last + most_unused + 1e-9
    assert stream.ledger.decided


def after(requests: int, share: float, stream: Stream, size: int = 16) -> Stream:
    for _ in range(requests // size):
        stream.step(at(share, stream), size)
    return stream


def opened(share: float, requests: int, seed: int = 0, size: int = 16) -> Stream:
    stream = Stream(Ledger(EPSILON, ALPHA, RATE), np.random.default_rng(seed))
    record(stream.ledger, 1500, size)
    return after(requests, share, stream, size)


@pytest.mark.parametrize(
    ("size", "soon", "later"),
    [(16, 0.83, 0.88), (64, 0.80, 0.91), (256, 0.61, 0.92), (512, 0.46, 0.88)],
)
def test_so_large_a_share_of_requests_exits_however_many_come_in_a_step(size, soon, later):
    """`soon` of the first 40,000 and `later` of the next, where 0.8 % are misses."""
    stream = opened(0.008, 38_500, size=size)
    before = stream.exits
    after(40_000, 0.008, stream, size)
    assert before > soon * 38_500
    assert stream.exits - before > later * 40_000


@pytest.mark.parametrize(("share", "spent", "closed"), [(0.04, 5100, 24_000), (0.1, 1270, 5000)])
def test_a_kind_closes_when_its_traffic_changes(share, spent, closed):
    """`spent` is when a budget at its most is spent on average, by hand."""
    found = []
    for seed in range(5):
        stream = opened(0.002, 20_000, seed)
        ledger, changed_at = stream.ledger, stream.ledger.requests
        assert ledger.allowed > ledger.changed_at_most + 0.9 * MOST_UNUSED
        while ledger.decidable([True]):
            after(16, share, stream)
        found.append(ledger.requests - changed_at)
        while not ledger.is_closed:
            after(16, share, stream)
        assert ledger.requests - changed_at < closed
        assert "the traffic has changed" in str(ledger.why_closed)
        decided = ledger.decided
        after(2000, 0.0, stream)
        assert ledger.decided == decided
    assert np.mean(found) == pytest.approx(spent, rel=0.4)


def test_a_closed_kind_that_opens_again_keeps_what_is_spent_and_closes_on_new_evidence_alone():
    stream = opened(0.1, 20_000)
    ledger = stream.ledger
    assert ledger.closings == 1
    before = ledger.as_dict()
    ledger.open_again()
    assert not ledger.is_closed
    assert {**ledger.as_dict(), "evidence": 0} == {
        **before,
        "evidence": 0,
        "why_closed": None,
        "closed": False,
    }
    after(20_000, 0.5 * EPSILON, stream)
    assert not ledger.is_closed
    after(20_000, 0.3, stream)
    assert ledger.closings == 2
    again = Ledger.of_dict(json.loads(json.dumps(ledger.as_dict())))
    assert again is not None
    assert again.as_dict() == ledger.as_dict()


def test_a_kind_whose_traffic_stays_as_it_is_and_within_epsilon_stays_open():
    for seed in range(6):
        assert not opened(0.9 * EPSILON, 60_000, seed, size=64).ledger.is_closed


def test_the_rate_falls_where_the_budget_allows_it_and_rises_where_it_has_no_room():
    stream = opened(0.005, 1000)
    assert stream.ledger.rate == RATE
    falls = {}
    while stream.ledger.requests < 60_000:
        after(16, 0.005, stream)
        falls.setdefault(stream.ledger.rate, stream.ledger.requests)
    assert 3000 < falls[0.12] < 9000
    assert falls[0.12] < falls[LOWER_RATES[-1]] < 20_000
    lowest = stream.ledger.rate
    after(4000, 0.05, stream)
    assert stream.ledger.rate == RATE > lowest


def test_the_rate_falls_only_where_the_budget_holds_all_that_a_step_compares():
    stream = opened(0.005, 0, size=256)
    ledger, rate = stream.ledger, RATE
    while rate > LOWER_RATES[-1]:
        stream.step(at(0.005, stream), 256)
        if ledger.rate < rate:
            rate = ledger.rate
            compared = [True] * round(256 * rate)
            assert ledger.decidable(compared) == len(compared)


def test_a_lower_rate_gives_up_the_bounds_that_it_cannot_carry_on_at_once():
    """Requests that a crash forgets may have been decided at that rate."""
    stream = opened(0.0, 16)
    while stream.ledger.rate == RATE:
        after(16, 0.0, stream)
    assert stream.ledger.as_dict()["bounds"][0] is None


def test_a_restart_goes_on_exactly():
    stream = opened(0.01, 20_000)
    again = Ledger.of_dict(json.loads(json.dumps(stream.ledger.as_dict(), allow_nan=False)))
    assert again is not None
    copy = Stream(again, np.random.default_rng(1))
    stream.random = np.random.default_rng(1)
    for one in (stream, copy):
        after(5000, 0.05, one)
    assert again.as_dict() == stream.ledger.as_dict()


def test_a_ledger_that_an_earlier_version_wrote_goes_on_with_its_bounds():
    """They are on all misses of the policy, and so on those that are changed answers."""
    stream = opened(0.01, 5000)
    state = stream.ledger.as_dict()
    earlier = {**state, "latest": [[1600, 18.4]]}
    for key in "evidence", "largest_step", "closings":
        del earlier[key]
    ledger = Ledger.of_dict({**earlier, "rate": 0.05})  # none of today's
    assert ledger is not None
    assert ledger.rate == 0.08
    assert ledger.changed_at_most >= stream.ledger.changed_at_most
    assert ledger.as_dict()["bounds"][-1] == state["bounds"][-1]


@pytest.mark.parametrize(
    "damage", [None, {}, [], "text", {"rate": 0.3}, {"bounds": [1.0]}, {"evidence": {}}]
)
def test_a_damaged_state_gives_no_ledger(damage):
    whole = Ledger(EPSILON, ALPHA, RATE).as_dict()
    spoilt = {**whole, **damage} if isinstance(damage, dict) and damage else damage
    assert Ledger.of_dict(spoilt) is None


def test_a_rate_that_bounds_nothing_is_refused():
    with pytest.raises(AdaInferError, match=r"full_depth_rate: 0\.01 is too low .* at least 0\.03"):
        Ledger(EPSILON, ALPHA, 0.01)
