"""A policy that keeps its bound but saves far less than it did is made anew."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from vllm_adainfer.auto.admitted_kind import AdmittedKind
from vllm_adainfer.auto.directory import write_json
from vllm_adainfer.auto.tries import CERTIFIED, RECORDING, State, Try
from vllm_adainfer.engine.worker.self_calibration import SHRUNK_REQUESTS, SelfCalibration
from vllm_adainfer.watch.ledger import Ledger

CERTIFIED_SAVINGS, RATE = 0.4, 0.25


def wants_course(directory, periods: list[float], status: str = CERTIFIED, closed: bool = False):
    """Whether a kind wants one after so many periods, of which the savings are given."""
    kind = AdmittedKind("kind-1", Ledger(0.02, 0.1, RATE))
    if closed:
        kind.ledger.why_closed = "it is"
    state = State(status, (Try(1, "", 0, 0, 1, CERTIFIED, layers_saved=CERTIFIED_SAVINGS),))
    write_json(directory.trainer(kind.name), asdict(state))
    calibration = SelfCalibration.__new__(SelfCalibration)
    calibration._directory, calibration._saved = directory, {}
    skipped = possible = decided = 0
    calibration._look_at_savings(kind, skipped, possible, decided)
    for saved in periods:
        skipped += round(saved * 60_000)
        possible, decided = possible + 60_000, decided + SHRUNK_REQUESTS // 2
        calibration._look_at_savings(kind, skipped, possible, decided)
    return kind.wants_course


FULL = CERTIFIED_SAVINGS * (1 - RATE)


@pytest.mark.parametrize(
    ("periods", "expected"),
    [
        ([FULL] * 9, False),
        ([0.7 * FULL] * 9, False),
        ([0.5 * FULL] * 9, True),
        ([FULL] * 5 + [0.1 * FULL] * 4, True),
        ([0.1 * FULL], False),
    ],
    ids=["as certified", "somewhat less", "half", "later", "too few requests"],
)
def test_savings_of_the_latest_requests_are_compared_with_those_of_the_held_out_rows(
    directory, periods, expected
):
    assert wants_course(directory, periods) == expected


def test_while_a_better_policy_may_come_or_the_kind_is_closed_nothing_is_begun(directory):
    assert not wants_course(directory, [0.0] * 9, status=RECORDING)
    assert not wants_course(directory, [0.0] * 9, closed=True)
