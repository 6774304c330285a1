"""Observers hear of a request in one order, whatever ends it, and of whole steps alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request, RequestStatus

from tests.running import vllm_request
from vllm_adainfer.engine.compat.runner import attach_note
from vllm_adainfer.engine.compat.scheduler import wait_for_token
from vllm_adainfer.engine.compat.stats import take_report
from vllm_adainfer.engine.scheduler import observers as observers_module
from vllm_adainfer.engine.scheduler import scheduler as scheduler_module
from vllm_adainfer.engine.scheduler.audit import Audit
from vllm_adainfer.engine.scheduler.observer import Observer, Step
from vllm_adainfer.engine.scheduler.observers import observers_of
from vllm_adainfer.engine.scheduler.scheduler import (
    AdaInferAsyncScheduler,
    AdaInferScheduler,
    ObservedScheduler,
    build_scheduler,
)
from vllm_adainfer.exits.accounting.report import Provenance, StepNote
from vllm_adainfer.settings.engine import Audit as AuditSettings
from vllm_adainfer.settings.engine import read_settings


class Log(Observer):
    """Writes down what it is told."""

    def __init__(self, name: str = "log") -> None:
        self.told: list[str] = []
        self._name = name

    def arrived(self, request: Request) -> None:
        self.told.append(f"{request.request_id} arrived")

    def stepped(self, step: Step) -> None:
        self.told.append(f"stepped {' '.join(step.rows)}, of which count {' '.join(step.requests)}")

    def ended(self, request: Request, why: str | None) -> None:
        self.told.append(f"{request.request_id} ended: {why}")

    def report(self) -> Mapping[str, Any]:
        return {"added": [(self._name, 1)], self._name: len(self.told)} if self.told else {}

    def close(self) -> None:
        self.told.append("closed")


class Stock:
    """As much of vLLM's scheduler as ours goes through: a step runs all requests for one token."""

    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.requests: dict[str, Request] = {}

    def add_request(self, request: Request) -> None:
        self.requests.setdefault(request.request_id, request)

    def schedule(self) -> Any:
        rows = dict.fromkeys(self.requests, 1)
        return SimpleNamespace(num_scheduled_tokens=rows, scheduled_spec_decode_tokens={})

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> None:
        ends = [one for one in model_runner_output.ends if one in self.requests]
        Stock.finish_requests(self, ends, RequestStatus.FINISHED_STOPPED)

    def finish_requests(self, request_ids: list[str], status: RequestStatus) -> list[Request]:
        ended = [self.requests.pop(one) for one in request_ids]
        for request in ended:
            request.status = status
        return ended

    def make_stats(self) -> Any:
        return SimpleNamespace(kv_connector_stats=None)

    def shutdown(self) -> None:
        pass


class Observed(ObservedScheduler, Stock):  # type: ignore[misc]
    """Ours, over that."""


@pytest.fixture
def observers() -> list[Any]:
    return [Log("first"), Log("second")]


@pytest.fixture
def config(tmp_path) -> Any:
    switch = {"finish_choices": True}
    return SimpleNamespace(additional_config={"adainfer": switch}, kv_transfer_config=None)


@pytest.fixture
def scheduler(config, observers, monkeypatch) -> Any:
    monkeypatch.setattr(scheduler_module, "observers_of", lambda *_: observers)
    return Observed(config)


def output(*ends: str, decided: tuple[Provenance, ...] = ()) -> Any:
    """What a step gave; the requests that it ends, and where tokens came from."""
    found = SimpleNamespace(ends=ends, pooler_output=None)
    attach_note(found, StepNote(None, None, decided))
    return found


def test_a_request_arrives_is_stepped_with_each_step_and_ends(scheduler, observers):
    scheduler.add_request(vllm_request("a"))
    scheduler.update_from_output(scheduler.schedule(), output())
    scheduler.add_request(vllm_request("b"))
    scheduler.update_from_output(scheduler.schedule(), output("a"))
    scheduler.finish_requests(["b"], RequestStatus.FINISHED_ABORTED)
    scheduler.shutdown()
    for observer in observers:
        assert observer.told == [
            "a arrived",
            "stepped a, of which count a",
            "b arrived",
            "stepped a b, of which count a b",
            "a ended: stop",
            "b ended: abort",
            "closed",
        ]


def test_a_request_that_is_ended_while_its_steps_run_ends_after_the_last_of_them(
    scheduler, observers
):
    for name in "ab":
        scheduler.add_request(vllm_request(name))
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    third = scheduler.schedule()
    for step in first, second, third:
        scheduler.update_from_output(step, output())
    assert observers[0].told[2:] == [
        "stepped a b, of which count a b",
        "stepped a b, of which count a b",
        "a ended: abort",
        "stepped b, of which count b",
    ]


def test_a_request_that_its_token_ends_is_in_no_later_step_that_runs_already(scheduler, observers):
    scheduler.add_request(vllm_request("a"))
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.update_from_output(first, output("a"))
    scheduler.update_from_output(second, output())
    assert observers[0].told[1:] == [
        "stepped a, of which count a",
        "a ended: stop",
        "stepped a, of which count ",
    ]


def test_a_request_whose_step_never_comes_back_ends_when_the_engine_stops(scheduler, observers):
    scheduler.add_request(vllm_request("a"))
    scheduler.schedule()
    scheduler.finish_requests(["a"], RequestStatus.FINISHED_ABORTED)
    assert observers[0].told == ["a arrived"]
    scheduler.shutdown()
    assert observers[0].told == ["a arrived", "a ended: abort", "closed"]


def test_a_prompt_that_is_sent_in_parts_arrives_once(scheduler, observers):
    for _ in range(3):
        scheduler.add_request(vllm_request("a", resumable=True))
    assert observers[0].told == ["a arrived"]


@pytest.mark.parametrize("drop", [False, True])
def test_a_token_counts_unless_vllm_drops_it_after_a_preemption(scheduler, observers, drop):
    """It delivers what was in flight when memory ran out; a reset of the cache drops it."""
    preempted = vllm_request("a")
    scheduler.add_request(preempted)
    step = scheduler.schedule()
    preempted.status = RequestStatus.PREEMPTED
    preempted.num_stale_output_tokens, preempted.drop_stale_output = 1, drop
    scheduler.update_from_output(step, output("a"))
    counts = "" if drop else "a"
    assert observers[0].told[1] == f"stepped a, of which count {counts}"


@pytest.mark.parametrize("connector", [None, "some"])
def test_frontends_are_told_all_reports_unless_a_connector_uses_their_channel(
    scheduler, config, connector
):
    config.kv_transfer_config = connector
    assert take_report(scheduler.make_stats()) is None, "nothing has come"
    scheduler.add_request(vllm_request("a"))
    told = {"added": [("first", 1), ("second", 1)], "first": 1, "second": 1}
    assert take_report(scheduler.make_stats()) == (None if connector else told)


def provenance(name: str) -> Provenance:
    return Provenance(name, "mood", "0123", 0.02, 16, "early")


def test_the_audit_has_a_line_of_each_request_once_it_has_ended(scheduler, observers, tmp_path):
    observers[:] = [Audit(AuditSettings(directory=str(tmp_path)), 0, 30)]
    for name in "abc":
        scheduler.add_request(vllm_request(name))
    first, second = scheduler.schedule(), scheduler.schedule()
    scheduler.finish_requests(["b"], RequestStatus.FINISHED_ABORTED)
    decided = tuple(map(provenance, "abc"))
    scheduler.update_from_output(first, output("a", decided=decided))
    scheduler.update_from_output(second, output("c", decided=decided))
    scheduler.shutdown()
    [file] = tmp_path.iterdir()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = {line["request"]: (line["outcomes"], line["ended"]) for line in lines}
    assert found == {
        "a": ({"early": 1}, "stop"),
        "c": ({"early": 2}, "stop"),
        "b": ({"early": 2}, "abort"),
    }


SCRIPT = {"exit_script": [2]}
WATCHES: list[tuple[dict[str, Any], list[str]]] = [
    (SCRIPT, ["Counters", "Drafts", "RestOfAnswer"]),
    ({**SCRIPT, "finish_choices": False, "draft_structure": False}, ["Counters"]),
    ({"finish_choices": True}, ["RestOfAnswer"]),
    ({"draft_structure": True}, ["Drafts"]),
    ({"capture": {}}, ["Capture"]),
    ({"artifact": "policy", "audit": {}}, ["Counters", "Drafts", "RestOfAnswer", "Audit"]),
    ({"auto": {"watch": True}, "capture": {}}, ["KindCounts", "Capture"]),
]


@pytest.mark.parametrize(("switch", "names"), WATCHES)
def test_the_switch_says_who_watches(tmp_path, monkeypatch, switch, names):
    monkeypatch.setattr(observers_module, "served_configs", lambda *_: {})
    monkeypatch.setattr(observers_module, "why_nothing_is_drafted", lambda _: None)
    model = SimpleNamespace(
        served_model_name="name",
        tokenizer="tokenizer",
        logprobs_mode="raw_logprobs",
        return_sampling_mask=False,
        hf_text_config=SimpleNamespace(num_hidden_layers=4),
        get_vocab_size=lambda: 1000,
    )
    switch = {
        key: {"directory": str(tmp_path / key), **one} if isinstance(one, dict) else one
        for key, one in switch.items()
    }
    config: Any = SimpleNamespace(
        model_config=model,
        parallel_config=SimpleNamespace(data_parallel_index=0),
        additional_config={"adainfer": switch},
    )
    settings = read_settings(config.additional_config)
    assert settings is not None
    manager = SimpleNamespace(tokenizer=None)
    scheduler: Any = SimpleNamespace(
        structured_output_manager=manager,
        max_model_len=9,
        vllm_config=config,
        admission=None,
    )
    watching = observers_of(config, settings, scheduler)
    assert [type(one).__name__ for one in watching] == names
    for one in watching:
        one.close()
    model.return_sampling_mask = True
    masked = [type(one).__name__ for one in observers_of(config, settings, scheduler)]
    assert masked == [one for one in names if one != "RestOfAnswer"], "they have no mask"


@pytest.mark.parametrize("is_async", [False, True])
def test_the_scheduler_is_over_the_one_that_vllm_would_take(monkeypatch, is_async):
    config: Any = SimpleNamespace(
        additional_config={"adainfer": {"finish_choices": True}},
        scheduler_config=SimpleNamespace(async_scheduling=is_async),
    )
    monkeypatch.setattr(ObservedScheduler, "__init__", lambda _, vllm_config: None)
    found = build_scheduler(config)
    assert type(found) is (AdaInferAsyncScheduler if is_async else AdaInferScheduler)


def test_a_request_waits_one_step_for_its_token():
    waiting: Any = vllm_request("a")
    scheduler: Any = SimpleNamespace(current_step=7)
    wait_for_token(scheduler, waiting)
    assert waiting.next_decode_eligible_step == 9  # steps count up first: 8 is without it
    assert "next_decode_eligible_step" in AsyncScheduler.schedule.__code__.co_names
