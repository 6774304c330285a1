"""Three calibrated tasks, for the tests that serve several at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import adainfer_kernels.backend
import pytest
from vllm import envs

from tests.e2e.scripted import parts
from tests.e2e.tasks import saved, three_tasks
from vllm_adainfer.engine.model.batch import Execution


@pytest.fixture(scope="module")
def tasks(tiny_model, reference) -> Any:
    return three_tasks(tiny_model, reference)


@pytest.fixture(scope="module")
def sources(tasks, tmp_path_factory) -> dict[str, str]:
    """The value of the switch's ``artifact``; a module's own, which it may overwrite."""
    return saved(tasks, tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def ranks_on_cores(all_cores: list[int], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without memory nodes for each rank vLLM wants to be told where they run."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{all_cores[0]}|{all_cores[-1]}")
    envs.disable_envs_cache()  # an engine that ran in this process has frozen vLLM's view
    yield
    monkeypatch.undo()
    envs.disable_envs_cache()


@pytest.fixture
def tested(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An engine, by the name of its fixture, which later tests find as it was."""
    llm = request.getfixturevalue(request.param)
    model, _, _ = parts(llm)
    graphs, core = model.graphs, llm.llm_engine.engine_core.engine_core
    while core.scheduler.has_requests():  # that have ended, which a worker hears with the next step
        core.step_fn()
    monkeypatch.setattr(adainfer_kernels.backend, "_auto_is_torch", False)
    yield llm
    model.graphs, model.exits_off, model.execution = graphs, False, Execution.SEGMENT_GRAPHS
    model.loop.stats.failed_parts, model.loop.stats.not_tested = (), ""
