"""Which kinds a server that calibrates itself records, and what its ledgers are told."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest

from vllm_adainfer.auto import admitted_kind
from vllm_adainfer.auto.admitted_kind import RESERVED, AdmittedKind
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.auto.table import RECURS
from vllm_adainfer.engine.admission.running import Running
from vllm_adainfer.engine.runner import admitted_kinds
from vllm_adainfer.engine.runner.admitted_kinds import (
    MOST_COUNTED,
    MOST_KINDS,
    MOST_RECORDED,
    YOUNG_SECONDS,
    AdmittedKinds,
)
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.settings.engine import Auto
from vllm_adainfer.watch import ledger

UNDER_POLICY = 0


def request(number: int) -> Running:
    """A request of the kind `number`."""
    return Running(max_tokens=1, kind=f"kind-{number}", prompt=(1, 2), threshold_row=UNDER_POLICY)


@pytest.fixture
def kinds(directory: AutoDirectory) -> AdmittedKinds:
    return AdmittedKinds(Auto(directory=str(directory.root)), directory)


def step(kinds: AdmittedKinds, admitted: list[Running], rows: int = UNDER_POLICY, misses: int = 0):
    """Run a step; the places of those recorded, of those compared, and of those at full depth."""
    threshold_rows = np.full(len(admitted), rows)
    everyone = np.arange(len(admitted))
    threshold_rows, compared, recorded, _ = kinds.admit(
        admitted, everyone, everyone + 1, threshold_rows
    )
    names = {one.kind for one in admitted}
    kinds.step_ended(kinds.take_decided(), dict.fromkeys(names, misses))
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
    shared = replace(shared, force_full_depth_prefill=True)
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


def test_compared_requests_are_recorded_too_while_a_better_policy_may_come(kinds):
    step(kinds, [request(1)] * RECURS)
    [own] = kinds.kinds.values()
    own.state, own.ledger.allowed = "served", 1e6
    kinds._toss = iter([0.0, 0.9] * 50).__next__
    recorded, compared, full = step(kinds, [request(1)] * 10)
    assert recorded == compared.tolist() == [0, 2, 4, 6, 8]
    assert not full.size
    own.records = False
    assert step(kinds, [request(1)] * 10)[0] == []


def test_a_kind_with_a_policy_gives_up_its_rows_for_one_without(kinds, clock):
    for number in range(MOST_RECORDED):
        step(kinds, [request(number)] * RECURS)
    own = kinds.kinds["kind-3"]
    step(kinds, [request(900)] * RECURS)
    assert "kind-900" not in kinds.kinds, "all are young and have no policy"
    own.state = "served"
    step(kinds, [request(900)])
    assert "kind-900" in kinds.kinds
    assert own.has_grown
    assert not own.records


def test_a_closed_kind_begins_a_course_and_waits_longer_each_time(kinds, directory):
    step(kinds, [request(1)] * RECURS)
    [own] = kinds.kinds.values()
    waits = []
    for course in range(1, 4):
        own.ledger.allowed = 1e9
        while not own.ledger.is_closed:
            step(kinds, [request(1)] * 10, misses=10)
            own.ledger.allowed = 1e9
        assert own.course == course
        waits.append(own.begins_at - own.ledger.requests)
        kinds.came_into_service([own.name])
        assert not own.ledger.is_closed
    assert waits == [0, 4000, 8000]
    kinds.save()
    again = AdmittedKind.read(own.name, directory.ledger(own.name))
    assert (again.course, again.begins_at) == (3, own.begins_at)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(admitted_kinds.time, "time", lambda: clock.now)
    return clock


class Clock:
    """Seconds since 1970, as a test sets them."""

    now = 1.8e9


def fill(kinds: AdmittedKinds, clock: Clock, count: int, requests: int) -> list[str]:
    """Give places to `count` kinds with so many requests each, of which no rows are left."""
    for number in range(count):
        clock.now += 1
        step(kinds, [request(number)] * requests)
        if count > MOST_RECORDED:
            kinds.kinds[f"kind-{number}"].state = "served"
            kinds.kinds[f"kind-{number}"].records = False
    assert len(kinds.kinds) == count
    return list(kinds.kinds)


PLACES = [
    pytest.param(MOST_RECORDED, id="while rows are kept"),
    pytest.param(MOST_KINDS, id="in all"),
]


@pytest.mark.parametrize("most", PLACES)
def test_a_kind_without_a_place_gets_that_of_one_that_comes_half_as_often(kinds, clock, most):
    before = fill(kinds, clock, most, 2 * RECURS)
    clock.now += 2 * YOUNG_SECONDS
    step(kinds, [request(number) for number in range(1, most)] * RECURS)
    for requests, has_a_place in ((3 * RECURS, False), (RECURS, True)):
        clock.now += 1
        step(kinds, [request(900)] * requests)
        assert ("kind-900" in kinds.kinds) == has_a_place
    lost = [name for name in before if name not in kinds.kinds]
    assert [one.name for one in kinds.take_lost()] == ["kind-0"] == lost
    assert kinds.take_lost() == []


@pytest.mark.parametrize("most", PLACES)
def test_nobody_takes_the_place_of_a_kind_of_this_hour_or_of_this_step(kinds, clock, most):
    before = fill(kinds, clock, most, RECURS)
    clock.now += 1
    step(kinds, [request(900)] * 100 * RECURS)
    assert list(kinds.kinds) == before, "they are new themselves"
    clock.now += 2 * YOUNG_SECONDS
    step(kinds, [request(900), *map(request, range(most))])
    assert list(kinds.kinds) == before, "all of them have come just now"


@pytest.mark.parametrize("most", PLACES)
def test_no_kind_holds_a_place_without_requests(kinds, clock, most):
    """Whoever has sent many and has gone loses it in days."""
    fill(kinds, clock, most, 50 * RECURS)
    clock.now += 5 * 24 * 3600
    step(kinds, [request(900)] * RECURS)
    assert "kind-900" in kinds.kinds


@pytest.mark.parametrize("end", ["closed", "given up"])
def test_a_kind_that_will_never_exit_makes_room_at_once(kinds, clock, end):
    fill(kinds, clock, MOST_KINDS, 100 * RECURS)
    clock.now += 1
    own = kinds.kinds["kind-7"]
    if end == "closed":
        own.ledger.why_closed = "the traffic has changed"
        assert kinds.closed == ["kind-7"]
    else:
        own.state = end
    step(kinds, [request(900)] * RECURS)
    assert [one.name for one in kinds.take_lost()] == ["kind-7"]
    assert not kinds.closed


def test_a_kind_whose_rows_wait_for_the_trainer_keeps_its_place(kinds, clock):
    """Its rows still lie on the disk: with others beside them, there would be no limit."""
    fill(kinds, clock, MOST_RECORDED, RECURS)
    for own in kinds.kinds.values():
        own.state = "recorded"
    clock.now += 1
    step(kinds, [request(900)] * RECURS)
    assert "kind-900" not in kinds.kinds
    kinds.kinds["kind-3"].state = "served"
    step(kinds, [request(900)])
    assert "kind-900" in kinds.kinds


def test_who_came_how_often_is_known_after_a_restart(kinds, clock, directory):
    fill(kinds, clock, 2, 3 * RECURS)
    kinds.save()
    clock.now += 60
    again = AdmittedKinds(Auto(directory=str(directory.root)), directory)
    assert {name: own.recent for name, own in again.kinds.items()} == {
        name: own.recent for name, own in kinds.kinds.items()
    }


def test_policies_that_lose_their_place_are_limited_because_each_leaves_counters(
    kinds, clock, monkeypatch
):
    monkeypatch.setattr(admitted_kinds, "MOST_RETIRED", 2)
    fill(kinds, clock, MOST_KINDS, RECURS)
    for number in range(900, 905):
        clock.now += 2 * YOUNG_SECONDS
        step(kinds, [request(number)] * 100 * RECURS)
        for own in kinds.kinds.values():
            own.state = "served"
    assert len(kinds.take_lost()) == 2


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
    kinds._toss = lambda: 0.9
    recorded, compared, full_depth = step(kinds, [request(1)] * 2)
    assert recorded == full_depth.tolist() == compared.tolist() == []


def test_other_weights_of_an_adapter_begin_a_course(kinds, directory):
    def under(weights: str) -> list[Running]:
        return [replace(request(1), weights=weights)]

    step(kinds, under("a") * RECURS)
    [own] = kinds.kinds.values()
    assert (own.weights, own.course) == ("a", 0)
    step(kinds, under("b"))
    step(kinds, under("b"))
    assert (own.weights, own.course) == ("b", 1)
    kinds.save()
    assert AdmittedKind.read(own.name, directory.ledger(own.name)).weights == "b"


@pytest.mark.parametrize(
    "content",
    [
        None,
        "not JSON",
        {},
        {"since": "x"},
        {"since": None},
        {"recent": [1]},
        {"recent": {"requests": "x"}},
        {"allowed": "x"},
    ],
)
def test_a_kind_with_a_damaged_ledger_begins_anew_without_its_policy(
    kinds, directory, content, caplog_vllm
):
    """What it has spent is unknown, and its policy may have been closed."""
    step(kinds, [request(1)] * RECURS)
    kinds.save()
    path = directory.ledger("kind-1")
    if isinstance(content, dict):
        write_json(path, {**read_json(path), **content} if content else {})
    elif content is None:
        path.unlink()
    else:
        path.write_text(content)
    directory.policy("kind-1", 1).mkdir()
    again = AdmittedKinds(Auto(directory=str(directory.root)), directory)
    assert not again.kinds
    assert directory.known() == []
    assert "kind-1 has no readable ledger" in caplog_vllm.text


def test_a_ledger_of_an_earlier_version_goes_on(kinds, directory):
    step(kinds, [request(1)] * RECURS)
    kinds.save()
    content = read_json(directory.ledger("kind-1"))
    del content["recent"]
    write_json(directory.ledger("kind-1"), content)
    again = AdmittedKinds(Auto(directory=str(directory.root)), directory)
    assert again.kinds["kind-1"].ledger.requests == RECURS


def test_a_kill_forgets_no_miss(kinds, directory):
    """A child runs steps with a miss each, and tells after each; it is killed at any moment."""
    step(kinds, [request(1)] * RECURS)
    kinds.kinds["kind-1"].ledger.allowed = 1e6
    kinds._toss = lambda: 0.1
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            while True:
                step(kinds, [request(1)] * 2, misses=1)
                os.write(write, b".")
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb", buffering=0) as told:
        seen = sum(len(told.read(1)) for _ in range(20))
        os.kill(child, signal.SIGKILL)
        while part := told.read(4096):
            seen += len(part)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    again = AdmittedKinds(Auto(directory=str(directory.root)), directory)
    assert seen <= again.kinds["kind-1"].ledger.misses <= seen + 1 + RESERVED


@pytest.fixture
def missing(kinds, monkeypatch) -> AdmittedKind:
    """A kind that no evidence closes, with a large budget, whose requests are all compared."""
    monkeypatch.setattr(ledger, "ERROR_RATE", 1e-300)
    step(kinds, [request(1)] * RECURS)
    [own] = kinds.kinds.values()
    own.ledger.allowed = 1000.0
    kinds._toss = lambda: 0.1
    return own


def read(directory: AutoDirectory) -> AdmittedKind:
    own = AdmittedKind.read("kind-1", directory.ledger("kind-1"))
    assert own is not None
    return own


def test_misses_are_on_disk_when_their_step_has_ended_as_they_are_allowed_for_ahead(
    kinds, directory, missing, monkeypatch
):
    written = []
    monkeypatch.setattr(
        admitted_kind, "write_json", lambda *file: written.append(write_json(*file))
    )
    for misses, writes in ((1, 1), (RESERVED, 1), (1, 2), (1, 2), (RESERVED, 3)):
        step(kinds, [request(1)] * 3, misses=misses)
        assert len(written) == writes
        assert missing.ledger.misses <= read(directory).ledger.misses
    step(kinds, [request(1)] * 3)
    kinds.save()  # as a thread does every second
    assert len(written) == 4
    step(kinds, [request(1)] * 3, misses=RESERVED)
    assert len(written) == 4


def test_after_a_crash_misses_that_were_allowed_for_count_and_are_no_evidence(
    kinds, directory, missing
):
    step(kinds, [request(1)] * 3, misses=1)
    after = read(directory)
    assert after.ledger.misses == missing.ledger.misses + RESERVED
    assert missing.ledger.changed_at_most < after.ledger.changed_at_most <= after.ledger.allowed
    assert after.ledger.as_dict()["evidence"] == missing.ledger.as_dict()["evidence"]
    after.save(directory.ledger("kind-1"))
    assert read(directory).ledger.misses == after.ledger.misses, "a crash without steps adds none"


@pytest.mark.parametrize("allowed", [0.0, 25.0])
def test_no_more_misses_are_allowed_for_than_the_budget_has_room_for(
    kinds, directory, missing, allowed
):
    missing.ledger.allowed = allowed
    step(kinds, [request(1)])
    kinds.save()
    assert read_json(directory.ledger("kind-1"))["reserved"] == missing.ledger.spare(RESERVED) < 2


def test_a_kind_may_be_written_while_the_step_that_gives_it_a_place_runs(kinds, directory):
    asked = [request(1)] * RECURS
    kinds.admit(asked, np.arange(RECURS), np.ones(RECURS), np.zeros(RECURS))
    kinds.save()
    assert read(directory).ledger.requests == 0


def test_a_server_that_ends_leaves_its_ledgers_as_they_are_and_goes_on_exactly(
    kinds, directory, missing
):
    step(kinds, [request(1)] * 3, misses=2)
    kinds.save(is_last=True)
    assert read(directory).ledger.as_dict() == missing.ledger.as_dict()


def test_a_step_that_the_file_does_not_allow_for_waits_for_a_thread_that_writes_it(
    kinds, directory, missing, monkeypatch
):
    """What the thread took is older, and would be on disk last."""
    step(kinds, [request(1)] * 3, misses=1)
    step(kinds, [request(1)] * 3)
    steps = Thread(target=step, args=(kinds, [request(1)] * 3), kwargs={"misses": 1})

    def write(path: Path, content: Any) -> None:
        monkeypatch.undo()
        steps.start()
        steps.join(0.2)
        assert steps.is_alive()
        write_json(path, content)

    monkeypatch.setattr(admitted_kind, "write_json", write)
    kinds.save()
    steps.join()
    assert read(directory).ledger.misses >= missing.ledger.misses == 2


def test_a_lower_rate_is_on_disk_before_a_coin_is_tossed_with_it(kinds, directory):
    step(kinds, [request(1)] * RECURS)
    [(name, own)] = kinds.kinds.items()
    own.ledger.allowed = 1000.0
    kinds._toss = lambda: 0.9
    before = own.ledger.rate
    while own.ledger.rate == before:
        step(kinds, [request(1)] * RECURS)
    saved = read_json(directory.ledger(name))
    assert {**saved, "reserved": 0} == {**own.content, "reserved": 0, "quarantined": {}}


def test_a_rate_that_the_switch_changes_is_on_disk_before_the_first_step(kinds, directory, missing):
    step(kinds, [request(1)])
    kinds.save(is_last=True)
    AdmittedKinds(Auto(directory=str(directory.root), full_depth_rate=0.5), directory)
    assert read(directory).ledger.rates[0] == 0.5
