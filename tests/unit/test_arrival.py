"""The scheduler hears of a request in the thread that receives it, not between steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.core import EngineCore, EngineCoreProc

from vllm_adainfer.engine.compat.scheduler import tell_scheduler_of_arrivals


@pytest.fixture
def told(monkeypatch) -> list[Any]:
    """What `EngineCore` passes on, with its own part of the work taken out."""
    monkeypatch.setattr(
        EngineCore, "preprocess_add_request", lambda core, request: (f"built {request}", 7)
    )
    tell_scheduler_of_arrivals()
    tell_scheduler_of_arrivals()  # as a second engine of the process does
    return []


def test_our_scheduler_gets_each_request_as_vllm_built_it_and_only_once(told):
    core = SimpleNamespace(scheduler=SimpleNamespace(request_arrived=told.append))
    assert EngineCore.preprocess_add_request(core, "a") == ("built a", 7)
    assert told == ["built a"]


def test_another_scheduler_in_the_process_is_left_alone(told):
    core = SimpleNamespace(scheduler=SimpleNamespace())
    assert EngineCore.preprocess_add_request(core, "a") == ("built a", 7)


def test_vllm_calls_it_in_the_thread_that_receives_requests_and_not_in_the_one_that_runs_steps():
    called = EngineCore.preprocess_add_request.__name__
    assert called in EngineCoreProc.process_input_sockets.__code__.co_names
    for between_steps in (EngineCoreProc._handle_client_request, EngineCore.add_request):
        assert called not in between_steps.__code__.co_names
