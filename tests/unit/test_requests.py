from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from tests.tiny import tiny_config
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.exits.recording.recorder import Recorder
from vllm_adainfer.exits.recording.recording_loop import RecordingLoop
from vllm_adainfer.settings.instruments import ROW_ARG

WINDOW, ROW = 8, 3
CERTIFIED = 3  # tokens
CONFIG = SimpleNamespace(
    additional_config={"adainfer": {"record": [2, 6]}},
    cache_config=SimpleNamespace(enable_prefix_caching=False),
    model_config=SimpleNamespace(logprobs_mode="raw_logprobs"),
    lora_config=None,
)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_row_waits_at_most_as_long_as_the_smallest_window_keeps_its_blocks(wrapped):
    """Wrapped as by vLLM where layers of one type differ in their heads, as Gemma 4's do."""
    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    windows = [SlidingWindowSpec(**shape, sliding_window=n) for n in (2 * WINDOW, WINDOW)]
    specs = [*windows, FullAttentionSpec(**shape)]
    if wrapped:
        specs = [UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"0": s}) for s in specs]
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    running = RunningRequests(CONFIG, SimpleNamespace(kv=ExactKV()))
    running.use_kv_cache(SimpleNamespace(kv_cache_groups=groups))
    assert running.window == WINDOW


def test_recording_keeps_the_tokens_beyond_a_sliding_window():
    """No rows wait there, so none needs the blocks that vLLM frees beyond the window."""
    shape = StackShape(segment_layers=(2, 4, 0), head_size=1)
    running = RunningRequests(CONFIG, RecordingLoop(shape, Recorder((2, 6), lens=None)))
    spec = SlidingWindowSpec(
        block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=WINDOW
    )
    running.use_kv_cache(SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]))
    params = SamplingParams(temperature=0, max_tokens=20, extra_args={ROW_ARG: ROW})
    prompt = SimpleNamespace(
        req_id="a", sampling_params=params, prompt_token_ids=[5] * 4, lora_request=None
    )
    running.add(prompt)
    for computed in (4, 2 * WINDOW):
        step = running.describe(
            request_ids=["a"],
            query_lens=np.array([1]),
            computed=np.array([computed]),
            yields_token=np.array([True]),
            device=torch.device("cpu"),
        )
        assert step.record_rows.tolist() == [ROW]


@pytest.fixture(scope="module")
def text_policy(tiny_model, tmp_path_factory) -> str:
    """A policy for generated text, calibrated on `CERTIFIED` tokens of each."""
    config = tiny_config(
        tiny_model, probe="logit-lens", candidates="full", labels=(), max_tokens=CERTIFIED
    )
    tensors = {"thresholds": torch.zeros(len(config.levels), len(config.exit_points))}
    tensors |= {f"exit.{layer}.classifier": torch.zeros(3) for layer in config.exit_points}
    directory = tmp_path_factory.mktemp("text") / "policy"
    save_artifact(directory, config, tensors, {}, "card\n")
    return str(directory)


@pytest.mark.parametrize(
    ("number", "exits"), [(1, True), (CERTIFIED, True), (CERTIFIED + 1, False)]
)
def test_only_as_many_tokens_exit_as_calibration_generated(text_policy, number, exits, tmp_path):
    """`number` counts the tokens of a text from 1; an audit says why the others do not."""
    config = SimpleNamespace(
        additional_config={
            "adainfer": {
                "artifact": text_policy,
                "finish_choices": False,
                "audit": {"directory": str(tmp_path)},
            }
        },
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        model_config=SimpleNamespace(logprobs_mode="raw_logprobs"),
        lora_config=None,
    )
    stats = SimpleNamespace(weights_differ=False)
    loop: Any = SimpleNamespace(kv=ExactKV(), tightened=lambda: None, stats=stats)
    running = RunningRequests(config, loop)
    prompt = SimpleNamespace(
        req_id="a",
        sampling_params=SamplingParams(temperature=0, max_tokens=20),
        prompt_token_ids=[5] * 4,
        lora_request=None,
    )
    running.add(prompt)
    step = running.describe(
        request_ids=["a"],
        query_lens=np.array([4 if number == 1 else 1]),
        computed=np.array([0 if number == 1 else 4 + number - 2]),
        yields_token=np.array([True]),
        device=torch.device("cpu"),
    )
    assert (step.threshold_rows[0] != FULL_DEPTH) == exits
    assert running._why == ({} if exits else {0: "beyond_bound"})
