"""Random patterns of requests, driven through an engine step by step, and what the oracle says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.e2e.oracle import head_inputs, nudged
from tests.e2e.scripted import EXIT_AT, FULL, Ran, drawn, parts

CLOSE = 2e-3  # largest difference of normed states of about 1: fp32 sums in another order
# In 16 bits: the share of a state's norm (0.13 was seen in bfloat16), and a score of about 10.
FAR, TIED = 0.25, 0.1
NUDGES = 16  # tries to have the oracle round as the engine did, where one state is further off
SHARED = np.random.default_rng(0).integers(5, 1000, 80).tolist()


@dataclass
class Request:
    """A prompt, its parameters, when it comes and (if it does) when it is aborted; its adapter.

    The prompt of a next turn follows this one's prompt and answer.
    """

    prompt: list[int]
    max_tokens: int
    seed: int
    arrives: int = 0
    aborted: int | None = None
    next_turn: Request | None = None
    adapter: LoRARequest | None = None

    def params(self) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=self.max_tokens,
            ignore_eos=True,
            extra_args={EXIT_AT: self.seed},
        )


@dataclass
class Pattern:
    """Requests in order of arrival, next turns added when they came, and what became of them."""

    requests: list[Request]
    produced: list[list[int]]
    preemptions: int = 0

    def sequence(self, name: int) -> list[int]:
        return self.requests[name].prompt + self.produced[name]


def drive(llm: Any, requests: list[Request]) -> Pattern:
    """Step the engine until all have ended."""
    engine, (_, _, scheduler) = llm.llm_engine, parts(llm)
    pattern = Pattern(list(requests), [[] for _ in requests])
    step = 0
    while step <= max(r.arrives for r in pattern.requests) or engine.has_unfinished_requests():
        for name, request in enumerate(pattern.requests):
            if request.arrives == step:
                prompt = {"prompt_token_ids": request.prompt}
                engine.add_request(
                    str(name), prompt, request.params(), lora_request=request.adapter
                )
            if request.aborted == step:
                engine.abort_request([str(name)])
        known = list(scheduler.requests.values())
        for output in engine.step():
            name = int(output.request_id)
            pattern.produced[name] = list(output.outputs[0].token_ids)
            turn = pattern.requests[name].next_turn
            if output.finished and turn is not None:
                prompt = pattern.sequence(name) + turn.prompt
                pattern.requests.append(replace(turn, prompt=prompt, arrives=step + 1))
                pattern.produced.append([])
        pattern.preemptions += sum(
            request.num_preemptions for request in known if request.is_finished()
        )
        step += 1
    return pattern


def random_requests(generator: np.random.Generator, count: int, within: int) -> list[Request]:
    """Some have a common start, come later, are aborted, have a next turn, or never exit."""

    def one() -> Request:
        prompt = generator.integers(5, 1000, generator.choice([1, 2, 9, 31, 33, 64, 100])).tolist()
        arrives = int(generator.integers(0, within))
        aborted = arrives + int(generator.integers(1, 20))
        turn = Request(generator.integers(5, 1000, 6).tolist(), 6, int(generator.integers(1000)))
        return Request(
            prompt=SHARED + prompt if generator.random() < 0.3 else prompt,
            max_tokens=int(generator.choice([1, 2, 7, 30, 60])),
            seed=int(generator.integers(1000)) if generator.random() < 0.85 else FULL,
            arrives=arrives,
            aborted=aborted if generator.random() < 0.15 else None,
            next_turn=turn if generator.random() < 0.3 else None,
        )

    return [one() for _ in range(count)]


def close(found: Tensor, expected: Tensor, in_16_bits: bool = False) -> bool:
    off = found - expected
    if in_16_bits:
        return bool(off.norm() < FAR * expected.norm())
    return bool(off.abs().max() < CLOSE)


def states_off(
    model: Any, sequence: list[int], ran: list[Ran], in_16_bits: bool = False
) -> list[Ran]:
    """Tokens that were not read off the state that full depth would have had at their exit."""
    came = [part for part in ran if part.last < len(sequence)]  # others were aborted before
    expected = {depth: head_inputs(model, sequence, depth) for depth in {p.layers for p in came}}
    return [
        part for part in came if not close(part.state, expected[part.layers][part.last], in_16_bits)
    ]


def wrong_states(
    model: Any, sequence: list[int], ran: list[Ran], in_16_bits: bool = False
) -> list[Ran]:
    """Tokens read off a state that is not the oracle's, however that may have rounded.

    Rounding alone moves a state far where it decides between experts that tie, in the engine or in
    the oracle, and then those of later tokens, which attend to it.
    """
    wrong = states_off(model, sequence, ran, in_16_bits)
    for seed in range(NUDGES):
        if not wrong:
            break
        with nudged(model, seed):
            still = {id(part) for part in states_off(model, sequence, ran, in_16_bits)}
        wrong = [part for part in wrong if id(part) in still]
    return wrong


@torch.inference_mode()
def wrong_tokens(
    model: Any, sequence: list[int], ran: list[Ran], in_16_bits: bool = False
) -> list[Ran]:
    """Tokens that are not what the LM head reads off the state of their step, but for a tie."""
    wrong = []
    for part in ran:
        if part.sampled and part.last < len(sequence) - 1:
            scores = model.lm_head(part.state.float())
            if not scores.max() - scores[sequence[part.last + 1]] < (TIED if in_16_bits else CLOSE):
                wrong.append(part)
    return wrong


def wrong_of(
    model: Any, pattern: Pattern, name: int, ran: dict[str, list[Ran]], in_16_bits: bool = False
) -> list[object]:
    """What of a request is not as the oracle has it."""
    request, sequence = pattern.requests[name], pattern.sequence(name)
    is_aborted, parts_ran = request.aborted is not None, ran.get(str(name))
    if parts_ran is None:
        return [] if is_aborted else [f"{name} never ran"]
    complete = len(sequence) == len(request.prompt) + request.max_tokens
    return [
        *([] if complete or is_aborted else [f"{name} is too short"]),
        *wrong_states(model, sequence, parts_ran, in_16_bits),
        *wrong_tokens(model, sequence, parts_ran, in_16_bits),
    ]


def wrong(model: Any, pattern: Pattern, ran: dict[str, list[Ran]], every: int = 1) -> list[object]:
    """The same of all requests whose number is a multiple of `every`."""
    names = range(0, len(pattern.requests), every)
    return [found for name in names for found in wrong_of(model, pattern, name, ran)]


def drawn_pattern(
    llm: Any,
    seed: int,
    min_rows_saved: int | None = 1,
    adapters: Sequence[LoRARequest | None] = (None,),
) -> tuple[Pattern, dict[str, list[Ran]]]:
    """A random pattern with steps of a random size; few rows may wait in some of them."""
    generator = np.random.default_rng(seed)
    requests = random_requests(generator, int(generator.integers(3, 15)), within=8)
    for request in requests:
        request.adapter = adapters[int(generator.integers(len(adapters)))]
        if request.next_turn is not None:
            request.next_turn.adapter = request.adapter
    _, _, scheduler = parts(llm)
    before = scheduler.max_num_scheduled_tokens
    scheduler.max_num_scheduled_tokens = int(generator.choice([16, 40, 128]))
    capacity = int(generator.choice([5, 50, 10_000]))
    try:
        with drawn(llm, min_rows_saved, capacity) as ran:
            return drive(llm, requests), ran
    finally:
        scheduler.max_num_scheduled_tokens = before
