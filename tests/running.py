"""Requests that a worker runs or a scheduler has, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm import PoolingParams, SamplingParams
from vllm.v1.request import Request

from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.step import CPU, StepContext


def running_requests(
    switch: dict[str, Any], loop: Any = None, prefix_caching: bool = False, **of_loop: Any
) -> RunningRequests:
    """Of an engine with this switch; `of_loop` is what its loop has if that is a fake."""
    stats = SimpleNamespace(weights_differ=False)
    fake = SimpleNamespace(kv=ExactKV(), tightened=lambda: None, stats=stats, **of_loop)
    config: Any = SimpleNamespace(
        additional_config={"adainfer": switch},
        cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching),
        model_config=SimpleNamespace(logprobs_mode="raw_logprobs", return_sampling_mask=False),
        structured_outputs_config=SimpleNamespace(reasoning_parser="", backend="auto"),
        lora_config=None,
    )
    return RunningRequests(config, fake if loop is None else loop)


def new_request(params: Any, prompt: list[int], name: str = "a") -> Any:
    """What vLLM tells the worker of a request."""
    pools = isinstance(params, PoolingParams)
    return SimpleNamespace(
        req_id=name,
        sampling_params=None if pools else params,
        pooling_params=params if pools else None,
        prompt_token_ids=prompt,
        lora_request=None,
    )


def step_of_one(running: RunningRequests, computed: int, rows: int, ends: bool) -> StepContext:
    """The request `a` runs `rows` after those that are `computed`; `ends`: it yields a token."""
    return running.describe(["a"], np.array([rows]), np.array([computed]), np.array([ends]), CPU)


def vllm_request(name: str = "id", params: Any = None, **changes: Any) -> Request:
    """A request as vLLM's scheduler has it, by default for one greedy token."""
    pools = isinstance(params, PoolingParams)
    greedy = params or SamplingParams(temperature=0, max_tokens=1)
    given = {
        "request_id": name,
        "prompt_token_ids": [3, 1, 4],
        "sampling_params": None if pools else greedy,
        "pooling_params": params if pools else None,
        **changes,
    }
    return Request(**given)
