"""Where weights do not pass our model, or go without it, nothing is served that rests on them."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from vllm.v1.worker.gpu_worker import Worker

from vllm_adainfer.engine.runner.build_loop import build_loop
from vllm_adainfer.engine.runner.ranks import RANKS_DIFFER
from vllm_adainfer.engine.worker.gpu_worker import AdaInferGPUWorker
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings


@pytest.mark.parametrize("policies", [{}, {"a": "its artifact"}], ids=["script", "artifact"])
@pytest.mark.parametrize("load_format", ["sharded_state", "tensorizer"])
def test_weights_that_nobody_compared_with_the_calibration_are_refused(
    monkeypatch, policies, load_format
):
    """A script rests on no weights, and building goes on, here up to the ranks."""
    monkeypatch.setattr("vllm_adainfer.engine.runner.build_loop.same_on_all_ranks", lambda _: False)
    settings = Settings(exit_script=(2,))
    model = SimpleNamespace(settings=settings, artifacts=policies, fingerprint=None)
    config = SimpleNamespace(load_config=SimpleNamespace(load_format=load_format))
    reason = f"--load-format {load_format} does not pass" if policies else re.escape(RANKS_DIFFER)
    with pytest.raises(AdaInferError, match=reason):
        build_loop(model, config)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_a_gpu_does_not_sleep_so_deep_that_policies_are_lost(monkeypatch, level):
    slept = []
    monkeypatch.setattr(Worker, "sleep", lambda _, level: slept.append(level))
    worker = object.__new__(AdaInferGPUWorker)
    with nullcontext() if level < 2 else pytest.raises(AdaInferError, match="sleep at level 1"):
        worker.sleep(level)
    assert slept == ([level] if level < 2 else [])
