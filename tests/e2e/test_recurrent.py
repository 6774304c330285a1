"""Layers with a recurrent state: nobody reads a state that is not their own, or not complete."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.conftest import tiny_engine
from tests.delta_net import allow_fp32
from tests.e2e.asking import ask
from tests.e2e.oracle import continuation, same, token_after
from tests.e2e.patterns import Request, drive, wrong
from tests.e2e.scripted import EXIT_AT, FULL, drawn, parts, scripted
from tests.e2e.test_families import SMALL, SWITCH, transformers_model
from tests.families import tiny_checkpoint
from tests.full import needed
from tests.tiny import FROM_ZERO, LAYERS
from tests.triton_on_cpu import IS_V2

REUSES = 100 if IS_V2 else 1000  # of slots; a step takes 0.2 s in Triton's interpreter


@dataclass
class Served:
    """The tiny model, in an engine with exits and a few blocks, and in transformers.

    The engine keeps the state at the end of each block, where by default it keeps that of few.
    """

    directory: Path
    llm: Any
    reference: Any

    @property
    def block_size(self) -> int:
        """Tokens of a block, at whose end the prefix cache keeps a state."""
        size: int = self.llm.llm_engine.vllm_config.cache_config.block_size
        return size


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    allow_fp32()
    directory = tiny_checkpoint("qwen3.5", tmp_path_factory.mktemp("recurrent") / "model")
    llm = tiny_engine(directory, SWITCH, **SMALL, prefix_cache_retention_interval=None)
    return Served(directory, llm, transformers_model(directory))


def recurrent_layers(llm: Any) -> list[Any]:
    model, _, _ = parts(llm)
    return [layer.linear_attn for layer in model.model.layers if hasattr(layer, "linear_attn")]


def spoil_states(llm: Any) -> None:
    """Whoever reads what nobody has written gets no number."""
    for layer in recurrent_layers(llm):
        for state in layer.kv_cache:
            state.fill_(torch.nan)


def prompts_of(generator: np.random.Generator, lengths: list[int]) -> list[list[int]]:
    return [generator.integers(5, 1000, length).tolist() for length in lengths]


def test_slots_reused_many_times_leave_no_trace(served):
    """Requests that left early leave states behind that lack rows; the next ones start from zero.

    Prompts of one token begin as later tokens look.
    """
    generator = np.random.default_rng(0)
    prompts = prompts_of(generator, [1, 1, 2, 3, 9, 17, 33])
    depths = [*FROM_ZERO, LAYERS]
    expected = {
        (number, at): token_after(served.reference, prompt, depths[at])
        for number, prompt in enumerate(prompts)
        for at in range(FULL, len(FROM_ZERO))
    }
    drawn_cases = [
        (int(generator.integers(len(prompts))), int(generator.integers(FULL, len(FROM_ZERO))))
        for _ in range(REUSES)
    ]
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=3 if at == FULL and number % 2 else 1,
            ignore_eos=True,
            extra_args={EXIT_AT: at},
        )
        for number, at in drawn_cases
    ]
    with scripted(served.llm) as stats:
        spoil_states(served.llm)
        found = ask(served.llm, [prompts[number] for number, _ in drawn_cases], params)
    for (number, at), output in zip(drawn_cases, found, strict=True):
        assert same(list(output.token_ids)[:1], [expected[number, at]])
    assert stats.layers_run < 0.8 * stats.layers_possible


def test_a_shared_prefix_is_hit_and_only_the_rest_leaves_early(served):
    """Its state at the end of a block is that of full depth, whoever came first."""
    generator, size = np.random.default_rng(1), served.block_size
    [prefix], own = prompts_of(generator, [size]), prompts_of(generator, [30] * 6)
    with scripted(served.llm) as stats:
        spoil_states(served.llm)
        cached = []
        for rest in own:
            prompt = {"prompt_token_ids": [*prefix, *rest]}
            params = SamplingParams(temperature=0, max_tokens=1, extra_args={EXIT_AT: 0})
            [output] = served.llm.generate([prompt], params, use_tqdm=False)
            cached.append(output.num_cached_tokens)
            expected = token_after(served.reference, [*prefix, *rest], FROM_ZERO[0])
            assert same(list(output.outputs[0].token_ids), [expected])
        whole = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        [output] = ask(served.llm, [[*prefix, *own[0]]], [whole])
    assert cached == [0] + [size] * 5
    assert stats.layers_run == size * LAYERS + 6 * 30 * FROM_ZERO[0] + (30 + 3) * LAYERS
    expected = continuation(served.reference, [*prefix, *own[0]], 4, LAYERS)
    assert same(list(output.token_ids), expected)


@pytest.mark.parametrize("seed", needed(1, of=range(2)))
def test_texts_with_exits_hit_prefixes_and_have_the_states_of_full_depth(served, seed):
    """Over block ends, with rows that wait, a few or many; the next turn asks for what was said."""
    generator, size = np.random.default_rng(seed), served.block_size
    [shared] = prompts_of(generator, [size + 10])
    requests = [
        Request(
            prompt=[*shared, *rest],
            max_tokens=int(generator.choice([1, 20, 40])),
            seed=int(generator.integers(1000)) if number % 4 else FULL,
            arrives=int(generator.integers(0, 12)),
            next_turn=Request(rest[:5], 8, int(generator.integers(1000))),
        )
        for number, rest in enumerate(prompts_of(generator, [3, 20, 40, 50, 60, 70]))
    ]
    capacity = (5, 10_000)[seed]
    with drawn(served.llm, capacity=capacity) as ran:
        pattern = drive(served.llm, requests)
    assert wrong(served.reference, pattern, ran) == []
    assert any(part.layers < LAYERS for parts_ran in ran.values() for part in parts_ran)
    assert any(parts_ran[0].first >= size for parts_ran in ran.values())


@pytest.mark.parametrize("deep_from", needed([0], of=range(-2, 3)))
def test_a_state_that_lacks_rows_at_the_end_of_a_block_is_not_hit(served, deep_from):
    """Rows wait until some place near that end; the next turn asks for the block."""
    generator, size = np.random.default_rng(3), served.block_size
    [prompt] = prompts_of(generator, [size - 20])
    request = Request(prompt, 40, seed=size + deep_from, next_turn=Request([7, 8, 9], 4, FULL))
    assert wrong_after(served, [request]) == []


def test_rows_that_waited_over_the_end_of_a_block_catch_up_with_the_state_of_their_request(served):
    """Too many to join the step. One prompt comes after the other, a chunk in each step."""
    generator, size = np.random.default_rng(4), served.block_size
    requests = [
        Request(prompt, 60, seed=size + 10 - number)
        for number, prompt in enumerate(prompts_of(generator, [120] * 4))
    ]
    assert wrong_after(served, requests) == []


@pytest.mark.skipif(not IS_V2, reason="Model Runner V1 profiles without metadata")
def test_a_profiling_pass_without_recurrent_layers_spoils_no_batch_that_exits_made(served):
    """On GPUs vLLM warms up so (`kernel_warmup.py`), before the first request comes."""
    _, runner, _ = parts(served.llm)
    with torch.inference_mode():
        runner.model_state.initialize_kv_cache(runner.kv_cache_config, runner.block_tables)
        runner._dummy_run(num_tokens=8, is_profile=True)
    generator = np.random.default_rng(5)
    requests = [
        Request(prompt, 8, seed) for seed, prompt in enumerate(prompts_of(generator, [9, 20, 40]))
    ]
    with drawn(served.llm) as ran:
        pattern = drive(served.llm, requests)
    assert wrong(served.reference, pattern, ran) == []


def wrong_after(served: Served, requests: list[Request]) -> list[object]:
    """What is not as at full depth if a request leaves early up to the position `seed`."""

    def until(seed: int, position: int, _points: int) -> int:
        return 0 if position < seed else FULL

    with drawn(served.llm, draw=until) as ran:
        spoil_states(served.llm)
        pattern = drive(served.llm, requests)
    return wrong(served.reference, pattern, ran)


def test_vllms_kernels_in_bfloat16_give_nothing_that_nobody_wrote(served):
    """The same with the kernels that are served, whose rounding fp32 can only be close to."""
    llm = tiny_engine(served.directory, SWITCH, dtype="bfloat16", **SMALL)
    generator = np.random.default_rng(2)
    prompts = prompts_of(generator, [1, 2, 9, 33, 64, 100] * 10)
    exits = [int(at) for at in generator.integers(FULL, len(FROM_ZERO), len(prompts))]
    params = [
        SamplingParams(temperature=0, max_tokens=2 if at == FULL else 1, extra_args={EXIT_AT: at})
        for at in exits
    ]
    with scripted(llm):
        spoil_states(llm)
        found = ask(llm, prompts, params)
    right = [
        output.token_ids[0]
        == token_after(served.reference, prompt, LAYERS if at == FULL else FROM_ZERO[at])
        for prompt, at, output in zip(prompts, exits, found, strict=True)
    ]
    assert np.mean(right) > 0.8
