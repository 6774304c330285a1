"""Kinds are counted by what their requests run, in a file that survives the server."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request, RequestStatus

from tests.objects import SCHEMA, two_fields
from tests.running import vllm_request
from tests.waiting import wait_for
from vllm_adainfer.auto.directory import AutoDirectory, read_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import RECURS
from vllm_adainfer.engine.scheduler import kinds
from vllm_adainfer.engine.scheduler.kinds import KindCounts
from vllm_adainfer.engine.scheduler.observer import Step


def step(**rows: int) -> Step:
    return Step(
        rows=rows,
        requests={},
        note=None,
        choosing=lambda: [],
        append=lambda *_: None,
        scores=lambda _: None,
    )


def request(name: str, **params: Any) -> Request:
    return vllm_request(name, SamplingParams(temperature=0, **{"max_tokens": 1, **params}))


@pytest.fixture
def counts(tmp_path) -> Any:
    return KindCounts(str(tmp_path / "auto"), "raw_logprobs", model="m", tokenizer="t")


def counted(counts: KindCounts) -> dict[str, Any]:
    counts.close()
    found: dict[str, Any] = read_json(counts._directory.kinds)
    return found


def test_rows_are_those_of_the_kind_of_each_request_until_it_has_ended(counts):
    label, text = {"allowed_token_ids": [7, 11]}, {"max_tokens": 9}
    for number in range(RECURS):
        one = request(f"a{number}", **label)
        counts.arrived(one)
        counts.stepped(step(**{one.request_id: 3}))
        counts.ended(one, "stop")
        counts.stepped(step(**{one.request_id: 50}))  # nobody's
    counts.arrived(request("b", **text))
    counts.stepped(step(b=3))
    found = counted(counts)
    [(_, kind)] = found["kinds"].items()
    assert Kind.of_dict(kind["kind"]) == Kind("label", (7, 11))
    assert (kind["requests"], kind["tokens"]) == (RECURS, 3 * RECURS)
    assert (found["requests"], found["tokens"]) == (RECURS + 1, 53 * RECURS + 3)


def test_objects_are_counted_by_schema_with_the_fields_that_people_know_them_by(counts):
    asked = StructuredOutputsParams(json=SCHEMA)
    for number in range(RECURS):
        one = request(f"a{number}", structured_outputs=asked, max_tokens=99)
        assert one.sampling_params is not None
        one.sampling_params._eos_token_id = 2  # as vLLM's frontend sets it
        counts.arrived(one)
    [(_, kind)] = counted(counts)["kinds"].items()
    assert kind["kind"]["reads"] == "object"
    assert kind["kind"]["schema"] == two_fields().schema_digest
    assert kind["kind"]["paths"] == ["mood", "seen"]


def test_the_end_of_a_request_is_not_that_of_another_one_with_its_name(counts):
    first, second = request("a"), request("a")
    counts.arrived(first)
    counts.arrived(second)
    counts.ended(first, "abort")
    counts.stepped(step(a=4))
    counts.close()
    assert counts._table.no_kind.tokens == 4


def test_what_came_is_reported_now_and_then_and_once_no_work_is_left(counts, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(kinds.time, "monotonic", lambda: now[0])
    one = request("a")

    def come(rows: int) -> Any:
        counts.stepped(step(a=rows))
        return [count for kind, *_, count in counts.report().get("added", ())]

    counts.arrived(one)
    assert come(3) == [1, 3]
    assert come(1) == []
    now[0] += kinds.REPORT_SECONDS
    assert come(1) == [2]
    one.status = RequestStatus.FINISHED_STOPPED
    assert come(1) == [1]
    counts.close()


def counting(directory: AutoDirectory) -> KindCounts:
    return KindCounts(str(directory.root), "raw_logprobs", model="m")


def test_two_servers_in_one_directory_do_not_overwrite_each_others_counts(directory, monkeypatch):
    monkeypatch.setattr(kinds, "WRITE_SECONDS", 0.01)
    first = counting(directory)
    first.arrived(request("a", max_tokens=9))
    wait_for(directory.kinds.exists)
    second = counting(directory)
    for _ in range(9):
        second.arrived(request("a", max_tokens=9))
    second.close()
    first.close()
    assert read_json(directory.kinds)["requests"] == 1
    third = counting(directory)
    third.arrived(request("a", max_tokens=9))
    third.close()
    assert read_json(directory.kinds)["requests"] == 2


def test_a_disk_that_is_full_stops_nothing_and_is_said_once(directory, monkeypatch, caplog_vllm):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kinds, "write_json", full)
    monkeypatch.setattr(kinds, "WRITE_SECONDS", 0.01)
    counts = counting(directory)
    for _ in range(5):
        counts.arrived(request("a", max_tokens=9))
        counts._closed.wait(0.03)
    counts.close()
    assert caplog_vllm.text.count("No space left on device") == 1
