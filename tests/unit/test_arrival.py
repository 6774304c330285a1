"""The scheduler hears of a request in the thread that receives it, not between steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.v1.engine.core import EngineCore

from vllm_adainfer.engine.compat.arrival import tell_scheduler_of_arrivals


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


def test_vllm_calls_it_where_it_receives_requests():
    """By its own words, beside the forward pass; see `compat/arrival.py`."""
    assert "in parallel with Model forward" in EngineCore.preprocess_add_request.__doc__
