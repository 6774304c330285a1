"""Which kinds a server that calibrates itself records, and what its ledgers are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vllm_adainfer.auto.directory import AutoDirectory, read_json
from vllm_adainfer.auto.ledger import Ledger
from vllm_adainfer.auto.table import RECURS
from vllm_adainfer.engine.admission.admitted import Admitted
from vllm_adainfer.engine.admission.resolved import Resolved
from vllm_adainfer.engine.admission.threshold_rows import FULL_DEPTH
from vllm_adainfer.engine.runner import own_kinds
from vllm_adainfer.engine.runner.own_kinds import MOST_COUNTED, MOST_RECORDED, OwnKinds
from vllm_adainfer.settings.engine import Auto
from vllm_adainfer.settings.request import RequestSettings

UNDER_POLICY = 0


def request(number: int) -> Admitted:
    """A request of the kind `number`."""
    resolved = Resolved(RequestSettings(), None, 1, False, kind=f"kind-{number}")
    return Admitted(resolved, UNDER_POLICY, -1, 1, False, -1, -1, (), (1, 2), None, -1)


@pytest.fixture
def directory(tmp_path: Path) -> AutoDirectory:
    directory = AutoDirectory(tmp_path / "auto")
    directory.create()
    return directory


@pytest.fixture
def kinds(directory: AutoDirectory) -> OwnKinds:
    return OwnKinds(Auto(directory=str(directory.root)), directory)


def step(kinds: OwnKinds, admitted: list[Admitted], rows: int = UNDER_POLICY, misses: int = 0):
    """Run a step; the places of those recorded, of those compared, and of those at full depth."""
    threshold_rows = np.full(len(admitted), rows)
    everyone = np.arange(len(admitted))
    compared, recorded = kinds.gate(admitted, everyone, everyone + 1, threshold_rows)
    names = {one.resolved.kind for one in admitted}
    kinds.step_ended(dict.fromkeys(names, misses))
    places = [] if recorded is None else recorded.places.tolist()
    return places, np.flatnonzero(compared), np.flatnonzero(threshold_rows == FULL_DEPTH)


def test_a_kind_is_recorded_once_it_recurs(kinds):
    for _ in range(RECURS - 1):
        assert step(kinds, [request(1)])[0] == []
    assert step(kinds, [request(2), request(1), request(1)])[0] == [1, 2]


def test_prompts_that_run_all_layers_for_a_shared_prefix_count_but_are_not_recorded(kinds):
    step(kinds, [request(1)] * RECURS)
    [own] = kinds.kinds.values()
    shared = request(1)
    shared = replace(shared, resolved=replace(shared.resolved, force_full_depth_prefill=True))
    assert step(kinds, [shared, request(1)])[0] == [1]
    assert own.ledger.requests == RECURS + 2


def test_what_a_policy_in_service_does_not_decide_earns_no_budget(kinds):
    step(kinds, [request(1)] * RECURS)
    [own] = kinds.kinds.values()
    own.state = "served"
    step(kinds, [request(1)] * 5, rows=FULL_DEPTH)
    assert own.ledger.requests == RECURS
    step(kinds, [request(1)] * 5)
    assert own.ledger.requests == RECURS + 5


def test_so_many_kinds_are_recorded_and_one_that_comes_too_seldom_makes_room(kinds):
    for number in range(MOST_RECORDED + 1):
        step(kinds, [request(10 * number)] * RECURS)
    assert len(kinds.kinds) == MOST_RECORDED
    first, *others = kinds.kinds.values()
    first.since -= 3 * own_kinds.HOUR
    for own in others:  # twice as often as need be
        own.since -= 3 * own_kinds.HOUR
        own.ledger.requests = 6 * RECURS
    first = next(iter(kinds.kinds))
    step(kinds, [request(900)] * RECURS)
    assert len(kinds.kinds) == MOST_RECORDED
    assert first not in kinds.kinds


def test_a_flood_of_lone_kinds_takes_no_more_memory(kinds):
    for number in range(3 * MOST_COUNTED):
        step(kinds, [request(10 * number)])
    assert len(kinds._counted) == MOST_COUNTED
    assert not kinds.kinds


def test_who_is_compared_is_the_coin_s_choice_and_who_exits_the_ledger_s(kinds):
    step(kinds, [request(1)] * RECURS)
    [own] = kinds.kinds.values()
    asked = [request(1)] * 5
    assert step(kinds, asked)[2].tolist() == [*range(5)], "the budget is still 0"
    own.ledger.allowed = 1000.0
    kinds._toss = iter([0.9, 0.1, 0.3, 0.2, 0.1]).__next__
    _, compared, full_depth = step(kinds, asked)
    assert compared.tolist() == [1, 3, 4], "below 0.25"
    assert full_depth.tolist() == []
    assert step(kinds, asked, rows=FULL_DEPTH)[1].tolist() == [], "no policy decides them"


def test_who_may_exit_is_not_recorded(kinds):
    """The policy of a kind may be in service before it is noted that it has one."""
    step(kinds, [request(1)] * RECURS)
    [own] = kinds.kinds.values()
    assert own.state == "recording"
    own.ledger.allowed = 1000.0
    recorded, _, full_depth = step(kinds, [request(1)] * 2)
    assert recorded == full_depth.tolist() == []


def test_a_miss_is_on_disk_when_its_step_has_ended_and_a_restart_goes_on(kinds, directory):
    step(kinds, [request(1)] * RECURS)
    [(name, own)] = kinds.kinds.items()
    own.ledger.allowed = 1000.0
    assert not directory.ledger(name).exists()
    kinds._toss = lambda: 0.1
    step(kinds, [request(1)] * 3, misses=2)
    assert read_json(directory.ledger(name))["misses"] == 2
    again = OwnKinds(Auto(directory=str(directory.root)), directory)
    assert again.kinds[name].ledger.as_dict() == own.ledger.as_dict()


def test_a_lower_rate_is_on_disk_before_a_coin_is_tossed_with_it(kinds, directory):
    step(kinds, [request(1)] * RECURS)
    [(name, own)] = kinds.kinds.items()
    own.ledger.allowed = 1000.0
    kinds._toss = lambda: 0.9
    before = own.ledger.rate
    while own.ledger.rate == before:
        step(kinds, [request(1)] * RECURS)
    saved = Ledger.of_dict(read_json(directory.ledger(name)))
    assert saved is not None
    assert saved.as_dict() == own.ledger.as_dict()
