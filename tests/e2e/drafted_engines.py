"""Engines that draft structured answers, beside those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from tests.conftest import tiny_engine
from tests.e2e.drafted_traffic import (
    Ask,
    Drafted,
    Got,
    assert_same,
    counted_drafts,
    scheduler_of,
    served,
)
from vllm_adainfer.drafts.step_costs import StepCosts
from vllm_adainfer.engine.scheduler.drafts import ROWS_PER_STEP_ON_CPU, Drafts

ENGINE: dict[str, Any] = {"max_model_len": 256, "kv_cache_memory_bytes": 32 << 20}
# Stock runs whole prompts at once: on a CPU it crashes where a request with a seed runs in chunks.
WHOLE_PROMPTS = {"max_num_batched_tokens": 2048}


class FixedCosts(StepCosts):
    """Costs that stay as they are."""

    @override
    def add(self, rows: int, seconds: float) -> None:
        pass


def backend(name: str, **more: Any) -> dict[str, Any]:
    return {"structured_outputs_config": {"backend": name, **more}}


def stock_engine(model: Path, **settings: Any) -> Any:
    """Stock vLLM."""
    return tiny_engine(model, None, **{**ENGINE, **WHOLE_PROMPTS, **settings})


def drafting(model: Path, **settings: Any) -> Any:
    """Stock vLLM, but for drafts."""
    llm = tiny_engine(model, {"draft_structure": True}, **{**ENGINE, **settings})
    assert [type(one) for one in scheduler_of(llm).observers] == [Drafts]
    return llm


def assert_stocks(ours: Any, stock: Any, asks: list[Ask]) -> tuple[list[Got], Drafted]:
    """Both engines give the same answers; those, and what was drafted for them.

    What a row costs is not measured, so that the same is drafted on any machine.
    """
    theirs = served(stock, asks)
    drafts = scheduler_of(ours).drafts
    with counted_drafts(ours) as counted, pytest.MonkeyPatch.context() as patch:
        if drafts is not None:
            patch.setattr(drafts, "_costs", FixedCosts(ROWS_PER_STEP_ON_CPU))
        found = served(ours, asks)
    assert_same(found, theirs, asks)
    return found, counted
