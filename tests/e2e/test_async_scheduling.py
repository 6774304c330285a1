"""Scheduling a step while the one before runs, vLLM's default on GPUs, changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig
from vllm.platforms import current_platform

from tests.conftest import small_engine, tiny_engine
from tests.e2e.oracle import hidden_states
from tests.e2e.patterns import drawn_pattern, wrong
from tests.e2e.policies import artifact_of
from tests.e2e.test_shadow import NEVER, admitted, random_prompts, run, watched
from tests.full import needed
from tests.tiny import EXIT_POINTS, LAYERS
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.engine.scheduler.scheduler import AdaInferAsyncScheduler
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.collect import Plan, record
from vllm_adainfer.transfers import HostCopy

pytestmark = pytest.mark.skipif(not IS_V2, reason="Model Runner V1 is scheduled synchronously")


ENDS = range(5, 1000, 9)  # tokens that end a text


@contextmanager
def asynchronous_scheduling() -> Iterator[None]:
    """On a CPU vLLM 0.32 turns it off."""
    cls = type(current_platform)
    check = cls.check_and_update_config

    def check_but_stay_asynchronous(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cls, "check_and_update_config", staticmethod(check_but_stay_asynchronous))
        yield


@pytest.fixture(scope="module")
def asynchronous(tiny_model: Path, policy_from_zero: Path) -> Any:
    """An engine like `small`."""
    with asynchronous_scheduling():
        return small_engine(tiny_model, policy_from_zero)


@pytest.mark.parametrize("seed", needed(1, of=range(4)))
def test_drawn_exits_reproduce_the_oracle(asynchronous, reference, seed):
    core = asynchronous.llm_engine.engine_core.engine_core
    assert isinstance(core.scheduler, AdaInferAsyncScheduler)
    assert core.batch_queue_size == 2
    pattern, ran = drawn_pattern(asynchronous, 2000 + seed)
    assert wrong(reference, pattern, ran) == []


def test_answers_of_shadows_leave_once_they_are_counted_though_the_device_compares_them_late(
    asynchronous, tiny_model, reference, monkeypatch
):
    """Nothing has arrived until somebody waits for it."""
    tensor, waited = HostCopy.tensor, set[int]()

    def arrives(copy: HostCopy) -> Any:
        waited.add(id(copy))
        return tensor(copy)

    monkeypatch.setattr(HostCopy, "has_arrived", property(lambda copy: id(copy) in waited))
    monkeypatch.setattr(HostCopy, "tensor", arrives)
    artifact = artifact_of(tiny_model, reference, "label-head", "labels", 0.2, "threshold")
    prompts = random_prompts(40, seed=6)
    with watched(asynchronous, artifact, rate=1, alpha=NEVER) as (stats, _):
        run(asynchronous, prompts, admitted(artifact))
        [reading] = [one for one in stats.as_dict()["shadow"].values() if one["checked"]]
    assert len(waited) > 1
    assert reading["checked"] == len(prompts)


def test_of_texts_that_end_while_the_next_step_runs_each_token_is_recorded_with_its_own_state(
    tiny_model, reference, tmp_path
):
    """That step has a row too many; without a look at positions all rows after it were shifted."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    ends = GenerationConfig(eos_token_id=list(ENDS))
    ends.save_pretrained(model)
    with asynchronous_scheduling():
        engine = tiny_engine(
            model,
            {"record": [*EXIT_POINTS, LAYERS]},
            max_model_len=64,
            kv_cache_memory_bytes=8 << 20,
        )
    generator = np.random.default_rng(4)
    prompts = [generator.integers(5, 1000, n).tolist() for n in (3, 9, 1, 5, 12, 7)]
    examples = [Example(f"line {n}", "", prompt, None) for n, prompt in enumerate(prompts)]
    recording = record(engine, examples, Plan(EXIT_POINTS, max_tokens=12))
    lengths = np.bincount(recording.prompts)
    assert lengths.min() < 12, "some texts have to end by themselves"
    texts = np.split(recording.tokens, np.cumsum(lengths)[:-1])
    states = [
        hidden_states(reference, [*prompt, *text.tolist()])
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    for layer in EXIT_POINTS:
        right = torch.cat(
            [
                state[layer][len(prompt) - 1 : len(prompt) - 1 + len(text)]
                for prompt, text, state in zip(prompts, texts, states, strict=True)
            ]
        )
        torch.testing.assert_close(recording.states[layer], right, rtol=1e-3, atol=1e-3)
