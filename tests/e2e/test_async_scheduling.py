"""Scheduling a step while the one before runs, vLLM's default on GPUs, changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm.platforms import current_platform

from tests.conftest import small_engine
from tests.e2e.patterns import drawn_pattern, wrong
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.runtime.scheduler import AdaInferAsyncScheduler

pytestmark = pytest.mark.skipif(not IS_V2, reason="Model Runner V1 is scheduled synchronously")


@pytest.fixture(scope="module")
def asynchronous(tiny_model: Path, tiny_policy: Path) -> Any:
    """An engine like `small`; on a CPU vLLM 0.32 turns asynchronous scheduling off."""
    cls = type(current_platform)
    check = cls.check_and_update_config

    def check_but_stay_asynchronous(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "check_and_update_config", staticmethod(check_but_stay_asynchronous))
        return small_engine(tiny_model, tiny_policy)


@pytest.mark.parametrize("kv", ["exact", "propagate"])
@pytest.mark.parametrize("seed", range(4))
def test_drawn_exits_reproduce_the_oracle(asynchronous, reference, kv, seed):
    core = asynchronous.llm_engine.engine_core.engine_core
    assert isinstance(core.scheduler, AdaInferAsyncScheduler)
    assert core.batch_queue_size == 2
    pattern, ran = drawn_pattern(asynchronous, kv, 2000 + seed)
    names = range(len(pattern.requests))
    assert [found for name in names for found in wrong(reference, kv, pattern, name, ran)] == []
