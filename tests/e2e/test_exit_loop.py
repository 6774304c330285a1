"""The compacted forward gives what transformers gives under the same exit decisions."""

from __future__ import annotations

import platform
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn.functional import pad
from vllm import SamplingParams

from tests.e2e.asking import greedy
from tests.e2e.asking import tokens as tokens_of
from tests.e2e.oracle import continuation, same, token_after
from tests.e2e.patterns import Request, drive, wrong
from tests.e2e.scripted import EXIT_AT, FULL, drawn, parts, scripted
from tests.full import needed
from tests.tiny import EXIT_POINTS, FROM_ZERO, LAYERS
from vllm_adainfer.engine.compat.attention import NO_SLOT
from vllm_adainfer.exits.loop.forward_pass import COMPACTION_COST
from vllm_adainfer.exits.loop.schedule import DecodeTimes

POINTS = {"engine": EXIT_POINTS, "small": FROM_ZERO}  # of the shared engines


def depth_of(exit_at: int, points: tuple[int, ...] = EXIT_POINTS) -> int:
    return LAYERS if exit_at == FULL else points[exit_at]


def prompts_of(lengths: list[int], seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 1000, length).tolist() for length in lengths]


def one_token(exit_at: int) -> SamplingParams:
    extra = {} if exit_at == FULL else {EXIT_AT: exit_at}
    return greedy(extra_args=extra)


@contextmanager
def rows_through_layers(llm) -> Iterator[list[int]]:
    """Of each layer the rows that it ran, counted as it ran them."""
    model, _, _ = parts(llm)
    rows = [0] * LAYERS

    def count(index: int, _layer, args) -> None:
        rows[index] += len(args[1])

    with ExitStack() as hooks:
        for index, layer in enumerate(model.model.layers):
            hooks.callback(layer.register_forward_pre_hook(partial(count, index)).remove)
        yield rows


@pytest.mark.parametrize(
    ("name", "exits"),
    [
        pytest.param("engine", [FULL] * 6, id="none exits"),
        pytest.param("engine", [0] * 6, id="all exit at the first point"),
        pytest.param("small", [0] * 6, id="all exit before the first layer"),
        pytest.param("engine", [2] * 6, id="all exit at the last point"),
        pytest.param("small", [0, 1, 2, FULL, 0, 1], id="some exit at every point"),
        pytest.param("small", [0], id="one-row batch exits"),
        pytest.param("engine", [FULL], id="one-row batch stays"),
        pytest.param("small", [0, FULL], id="one of two"),
    ],
)
def test_each_request_gets_the_answer_of_its_depth_and_runs_no_more(
    request, reference, name, exits
):
    engine, points = request.getfixturevalue(name), POINTS[name]
    lengths = [1] if len(exits) == 1 else [7, 1, 23, 12, 40, 3][: len(exits)]
    prompts = prompts_of(lengths, seed=len(exits))
    with scripted(engine) as stats, rows_through_layers(engine) as rows:
        found = tokens_of(engine, prompts, [one_token(e) for e in exits])
    for prompt, exit_at, tokens in zip(prompts, exits, found, strict=True):
        assert same(tokens, [token_after(reference, prompt, depth_of(exit_at, points))])
    depths = [depth_of(e, points) for e in exits]
    deepest = max(depths)
    assert rows == [0] * LAYERS if not deepest else min(rows[:deepest]) > 0
    assert sum(rows[deepest:]) == 0
    assert stats.layers_run == sum(n * d for n, d in zip(lengths, depths, strict=True))
    assert stats.layers_possible == sum(lengths) * LAYERS
    assert stats.tokens_decided == len(exits)
    assert +stats.exit_histogram == {d: depths.count(d) for d in depths}


def test_requests_that_leave_before_the_first_layer_change_nothing_for_the_others(small):
    """The layers get the rows of the others alone: bit for bit what they are without company."""
    prompts, leaves = prompts_of([7, 30, 23, 12], seed=9), [True, False, True, False]

    def states(kept: list[bool]) -> list[list[torch.Tensor]]:
        requests = [
            Request(prompt, 4, seed=int(leaving))
            for prompt, leaving, keep in zip(prompts, leaves, kept, strict=True)
            if keep
        ]

        def draw(leaving: int, _position: int, _points: int) -> int:
            return 0 if leaving else FULL

        with drawn(small, draw=draw) as ran:
            drive(small, requests)
        return [
            [part.state for part in ran[str(place)]]
            for place, one in enumerate(requests)
            if not one.seed
        ]

    alone, in_company = states([not leaving for leaving in leaves]), states([True] * 4)
    for expected, found in zip(alone, in_company, strict=True):
        assert all(map(torch.equal, found, expected))


@contextmanager
def padded(llm, rows: int) -> Iterator[None]:
    """Give the loop so many rows more than there are, as vLLM does where graphs have sizes."""
    loop = parts(llm)[0].loop
    run = loop.run

    def run_padded(batch, input_ids, step):
        slots = {n: pad(s, (0, rows), value=NO_SLOT) for n, s in batch.context.slot_mapping.items()}
        context = replace(batch.context, slot_mapping=slots)
        padded = replace(batch, positions=pad(batch.positions, (0, rows)), context=context)
        return run(padded, pad(input_ids, (0, rows)), step)

    loop.run = run_padded
    try:
        yield
    finally:
        del loop.run


@pytest.mark.parametrize("tokens", [1, 4])
def test_rows_of_padding_change_nothing_and_are_not_counted(engine, reference, tokens):
    lengths, exits = [7, 1, 23, 90], [0, FULL, 2, FULL]
    prompts = prompts_of(lengths, seed=3)
    params = [
        SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, extra_args={EXIT_AT: e})
        for e in exits
    ]
    with scripted(engine) as stats, padded(engine, rows=5):
        found = tokens_of(engine, prompts, params)
    for prompt, exit_at, produced in zip(prompts, exits, found, strict=True):
        assert same(produced, continuation(reference, prompt, tokens, depth_of(exit_at)))
    assert stats.layers_possible == (sum(lengths) + 4 * (tokens - 1)) * LAYERS
    assert stats.layers_run < stats.layers_possible


@pytest.mark.parametrize("seed", needed(2, of=range(8)))
def test_random_decisions_in_mixed_batches_match_the_oracle(request, reference, seed):
    """One-token and generating requests, prompts longer than a step, several steps in flight.

    One engine's requests leave after some layers, the other's also before the first.
    """
    name = ["engine", "small"][seed % 2]
    engine, points = request.getfixturevalue(name), POINTS[name]
    generator = np.random.default_rng(seed)
    lengths = [int(n) for n in generator.choice([1, 2, 9, 31, 33, 64, 100, 170, 300], 14)]
    prompts = prompts_of(lengths, seed)
    exits = [int(e) for e in generator.integers(FULL, len(EXIT_POINTS), len(prompts))]
    tokens = [1 if e != FULL else int(generator.integers(1, 6)) for e in exits]
    params = [
        SamplingParams(temperature=0, max_tokens=n, extra_args={} if e == FULL else {EXIT_AT: e})
        for e, n in zip(exits, tokens, strict=True)
    ]
    with scripted(engine) as stats:
        found = tokens_of(engine, prompts, params)
    for prompt, exit_at, n, produced in zip(prompts, exits, tokens, found, strict=True):
        assert same(produced, continuation(reference, prompt, n, depth_of(exit_at, points)))
    assert stats.layers_run < stats.layers_possible
    assert stats.tokens_decided == sum(tokens)


def test_too_few_rows_to_leave_stay_in_and_get_the_answer_of_full_depth(engine, reference):
    prompts = prompts_of([8, 9, 10], seed=3)
    with scripted(engine, min_rows_saved=1000) as stats:
        found = tokens_of(engine, prompts, [one_token(0)] * 3)
    for prompt, tokens in zip(prompts, found, strict=True):
        assert same(tokens, [token_after(reference, prompt, LAYERS)])
    assert stats.layers_run == stats.layers_possible
    assert +stats.exit_histogram == {LAYERS: 3}


def test_a_settled_request_that_waits_for_company_leaves_with_the_answer_it_settled_on(
    engine, reference
):
    prompts = prompts_of([10, 10], seed=4)
    with scripted(engine, min_rows_saved=20) as stats:
        found = tokens_of(engine, prompts, [one_token(0), one_token(2)])
    assert same(found[0], [token_after(reference, prompts[0], EXIT_POINTS[0])])
    assert same(found[1], [token_after(reference, prompts[1], EXIT_POINTS[2])])
    assert +stats.exit_histogram == {EXIT_POINTS[2]: 2}
    assert stats.layers_run == 20 * EXIT_POINTS[2]


# Rows that gain at the first point what a cut takes.
ENOUGH = COMPACTION_COST // (LAYERS - EXIT_POINTS[0])


@pytest.mark.parametrize(
    ("lengths", "exits", "left"),
    [
        pytest.param([ENOUGH, 9], [0, FULL], 1, id="many leave"),
        pytest.param([ENOUGH - 1, 9], [0, FULL], 0, id="too few leave"),
        pytest.param([ENOUGH - 2, 1, 9], [0, 0, FULL], 0, id="too few leave together"),
        pytest.param([ENOUGH - 2, 2, 9], [0, 0, FULL], 2, id="many leave together"),
        pytest.param([1, 2], [0, 0], 2, id="all leave"),
    ],
)
def test_by_default_requests_leave_where_that_is_faster(engine, lengths, exits, left):
    with scripted(engine, min_rows_saved=None) as stats:
        tokens_of(engine, prompts_of(lengths, seed=5), [one_token(e) for e in exits])
    assert stats.exit_histogram[EXIT_POINTS[0]] == left


def test_a_request_with_a_seed_and_a_prompt_of_several_chunks_draws_what_it_draws_of_one(engine):
    """On a CPU stock vLLM 0.32 ends at its first chunk: it rewinds generators by their offset."""
    prompt = prompts_of([150], seed=6)[0]  # steps have 128 rows
    drawn = SamplingParams(temperature=1, seed=5, max_tokens=6, ignore_eos=True)
    [chunked] = tokens_of(engine, [prompt], [drawn])
    [at_once] = tokens_of(engine, [prompt], [drawn])  # all but the last block is cached
    beside = tokens_of(engine, [*prompts_of([100, 90], seed=7), prompt[::-1], prompt], [drawn] * 4)
    assert chunked == at_once == beside[-1]
    assert len(set(map(tuple, beside))) == len(beside)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_the_worker_on_a_cpu_keeps_the_memory_that_it_has_freed(engine):
    del engine  # it runs in this process
    torch.zeros(1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(1 << 24)  # 64 MiB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100


def test_decode_steps_that_ask_at_one_exit_point_reproduce_the_oracle(engine, reference):
    """As on a GPU: all would be settled at the second one, which steps find out by asking."""
    loop = parts(engine)[0].loop
    prompts = prompts_of([5, 20, 9], seed=9)
    with drawn(engine, draw=lambda *_: 1) as ran, pytest.MonkeyPatch.context() as patch:
        loop.policies.policies[0].any_exit_point = True
        times = DecodeTimes(layer=1e-3, rows=240, question=1e-5, between=0.0)
        patch.setattr(loop, "_decode_times", times)
        loop._schedules.clear()
        pattern = drive(engine, [Request(prompt, max_tokens=20, seed=0) for prompt in prompts])
        loop._schedules.clear()
    assert wrong(reference, pattern, ran) == []
    depths = [part.layers for own in ran.values() for part in own if part.rows == 1]
    assert {LAYERS, EXIT_POINTS[1]} == {*depths}, "asked at the others, nobody was settled"
    assert depths.count(EXIT_POINTS[1]) > 0.7 * len(depths)
