"""Requests that leave early at every token reproduce the oracle, whatever the scheduler does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from tests.e2e.oracle import Sequence, hidden_states
from tests.e2e.scripted import EXIT_AT, Ran, drawn, parts

BLOCK = 32
CLOSE = 2e-3  # largest difference of normed states of about 1: fp32 sums in another order


@pytest.fixture(scope="module")
def small(tiny_model, tiny_policy) -> Iterator[Any]:
    """An engine with a cache of 16 blocks, so that requests preempt each other."""
    from vllm import LLM

    llm = LLM(
        model=str(tiny_model),
        dtype="float32",
        enforce_eager=True,
        max_model_len=320,
        max_num_batched_tokens=128,
        max_num_seqs=16,
        block_size=BLOCK,
        num_gpu_blocks_override=16,
        kv_cache_memory_bytes=8 << 20,
        additional_config={"adainfer": {"artifact": str(tiny_policy), "kv": "propagate"}},
    )
    yield llm
    llm.llm_engine.engine_core.shutdown()


@dataclass
class Request:
    """A prompt, its parameters, when it comes and (if it does) when it is aborted."""

    prompt: list[int]
    max_tokens: int
    seed: int
    arrives: int = 0
    aborted: int | None = None

    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0, max_tokens=self.max_tokens, extra_args={EXIT_AT: self.seed}
        )


def drive(llm: Any, requests: list[Request]) -> tuple[list[list[int]], int]:
    """Step the engine until all have ended: the tokens of each, and how many preemptions."""
    engine, (_, _, scheduler) = llm.llm_engine, parts(llm)
    produced: list[list[int]] = [[] for _ in requests]
    preempted = set()
    step = 0
    while step <= max(request.arrives for request in requests) or engine.has_unfinished_requests():
        for name, request in enumerate(requests):
            if request.arrives == step:
                engine.add_request(
                    str(name), {"prompt_token_ids": request.prompt}, request.params()
                )
            if request.aborted == step:
                engine.abort_request([str(name)])
        for output in engine.step():
            produced[int(output.request_id)] = list(output.outputs[0].token_ids)
        preempted |= {
            (known.request_id, known.num_preemptions)
            for known in scheduler.requests.values()
            if known.num_preemptions
        }
        step += 1
    assert scheduler.kv_cache_manager.usage == 0
    return produced, len(preempted)


def random_requests(generator: np.random.Generator) -> list[Request]:
    """Prompts of many lengths, some with a common start; some come later, some are aborted."""
    shared = generator.integers(5, 1000, 80).tolist()
    requests = []
    for _ in range(int(generator.integers(3, 15))):
        length = int(generator.choice([1, 2, 9, 31, 33, 64, 100, 170]))
        prompt = generator.integers(5, 1000, length).tolist()
        if generator.random() < 0.4:
            prompt = shared + prompt
        arrives = int(generator.integers(0, 8))
        requests.append(
            Request(
                prompt,
                max_tokens=int(generator.choice([1, 2, 7, 30, 70])),
                seed=int(generator.integers(0, 1000)),
                arrives=arrives,
                aborted=arrives + int(generator.integers(1, 20))
                if generator.random() < 0.15
                else None,
            )
        )
    return requests


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() < CLOSE)


def check_exact(model: Any, sequence: list[int], ran: list[Ran]) -> None:
    """Every token was read off the state that full depth would have had at its exit point."""
    states = hidden_states(model, sequence)
    for part in ran:
        last = part.first + part.rows - 1
        if last >= len(sequence):
            continue  # it was aborted before the token came
        with torch.inference_mode():
            assert close(part.state, model.model.norm(states[part.layers][last]))


def check_propagated(model: Any, sequence: list[int], ran: list[Ran]) -> None:
    """Every token was read off the state that its sequence had, with what exits had left in it."""
    oracle = Sequence(model)
    oracle.restart([])
    length = 0
    for part in ran:
        if part.first != length:  # preempted, or a prefix was hit: complete blocks only
            oracle.restart(sequence[: part.first])
        length = part.first + part.rows
        if length > len(sequence):
            break
        state = oracle.run(sequence[part.first : length], part.layers)
        assert close(part.state, state)


@pytest.mark.parametrize("kv", ["exact", "propagate"])
@pytest.mark.parametrize("seed", range(100))
def test_drawn_exits_at_every_token_reproduce_the_oracle(small, reference, kv, seed):
    generator = np.random.default_rng(seed)
    requests = random_requests(generator)
    _, _, scheduler = parts(small)
    before = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = int(generator.choice([16, 40, 128]))
    capacity = int(generator.choice([5, 50, 10_000]))
    try:
        with drawn(small, kv, capacity=capacity) as ran:
            produced, _ = drive(small, requests)
    finally:
        scheduler.max_num_scheduled_tokens = before
    for name, (request, tokens) in enumerate(zip(requests, produced, strict=True)):
        if request.aborted is None:
            assert len(tokens) == request.max_tokens
        sequence = request.prompt + tokens
        check = check_exact if kv == "exact" else check_propagated
        check(reference, sequence, ran.get(str(name), []))
        check_tokens(reference, sequence, ran.get(str(name), []))


@torch.inference_mode()
def check_tokens(model: Any, sequence: list[int], ran: list[Ran]) -> None:
    """Each token is the one that the LM head reads off the state of its step."""
    for part in ran:
        last = part.first + part.rows - 1
        if part.sampled and last < len(sequence) - 1:
            scores = model.lm_head(part.state)
            assert scores.max() - scores[sequence[last + 1]] < CLOSE
