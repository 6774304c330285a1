"""The one claim over all kinds: that of a single ledger over all requests, whoever goes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from vllm_adainfer.auto.all_kinds import UNKNOWN, Counted, lost_of, note_lost, together
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.watch.ledger import Ledger

ALPHA, RATE = 0.1, 0.25


def ledger() -> Ledger:
    return Ledger(0.02, ALPHA, RATE)


def counted(*ledgers: Ledger) -> Counted:
    return together(Counted.of_ledger(json.loads(json.dumps(one.as_dict()))) for one in ledgers)


def test_at_one_rate_it_is_the_claim_of_one_ledger_over_all_requests():
    kinds, one = [ledger() for _ in range(4)], ledger()
    for number, kind in enumerate(kinds):
        for _ in range(number + 1):
            for each in (kind, one):
                each.add(0, 10, 1)
    both = counted(*kinds)
    assert both.changed_at_most(ALPHA) == pytest.approx(one.changed_at_most)
    assert both.changed_at_most(ALPHA) < sum(kind.changed_at_most for kind in kinds)
    assert both.kinds == 4


def test_it_is_wrong_as_rarely_as_was_promised_with_rates_that_fall_and_kinds_that_go(tmp_path):
    """Budgets that are never spent, so that every request is under a policy."""
    random, wrong, streams = np.random.default_rng(0), 0, 120
    for number in range(streams):
        place = AutoDirectory(tmp_path / str(number))
        place.create()
        kinds, changed, is_wrong = [ledger() for _ in range(3)], 0, False
        for step in range(400):
            kind = kinds[step % 3]
            kind.allowed = 1e6
            coins = random.random(40) < kind.rate
            is_miss = random.random(40) < 0.03
            changed += int((is_miss & ~coins).sum())
            kind.add(40, 40, int((is_miss & coins).sum()))
            if step == 200:
                note_lost(place, counted(kinds[0]))
                kinds[0] = ledger()
            most = together([lost_of(place), counted(*kinds)]).changed_at_most(ALPHA)
            is_wrong |= most is not None and changed > most
        wrong += is_wrong
    assert wrong <= ALPHA * streams


@pytest.mark.parametrize("content", ["", "{}", '{"kinds": 1, "requests": 2, "beyond": [1.0]}'])
def test_after_damage_nothing_is_claimed(tmp_path, content):
    place = AutoDirectory(tmp_path / "auto")
    place.create()
    assert lost_of(place) == Counted()
    place.lost.write_text(content)
    note_lost(place, counted(ledger()))
    assert lost_of(place).changed_at_most(ALPHA) is None
    assert UNKNOWN.changed_at_most(ALPHA) is None
