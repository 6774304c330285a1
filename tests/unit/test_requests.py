from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_adainfer.config import ROW_ARG
from vllm_adainfer.engine.requests import RunningRequests
from vllm_adainfer.exits.batch import StackShape
from vllm_adainfer.exits.recorder import Recorder
from vllm_adainfer.exits.recording_loop import RecordingLoop

WINDOW, ROW = 8, 3


def test_recording_keeps_the_tokens_beyond_a_sliding_window():
    """No rows wait there, so none needs the blocks that vLLM frees beyond the window."""
    config = SimpleNamespace(
        additional_config={"adainfer": {"record": [2, 6]}},
        cache_config=SimpleNamespace(enable_prefix_caching=False),
        model_config=SimpleNamespace(logprobs_mode="raw_logprobs"),
        lora_config=None,
    )
    shape = StackShape(segment_layers=(2, 4, 0), head_size=1)
    running = RunningRequests(config, RecordingLoop(shape, Recorder((2, 6), lens=None)))
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
            lens=np.array([1]),
            computed=np.array([computed]),
            sampled=np.array([True]),
            device=torch.device("cpu"),
        )
        assert step.tags.tolist() == [ROW]
