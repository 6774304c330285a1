"""A block of a prompt that left early never serves another request as if it were complete."""

from __future__ import annotations

import numpy as np
import pytest

from tests.e2e.asking import greedy, outputs
from tests.e2e.asking import tokens as tokens_of
from tests.e2e.oracle import continuation, same, token_after
from tests.e2e.scripted import EXIT_AT, ScriptedAdmission, scripted
from tests.tiny import FROM_ZERO, LAYERS

PREFIX = 64  # two blocks of the engine, whose requests leave before the first layer


def prompts_with_shared_prefix(count: int, seed: int, own: int = 7) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    prefix = generator.integers(5, 1000, PREFIX).tolist()
    return [prefix + generator.integers(5, 1000, own).tolist() for _ in range(count)]


def ask(llm, prompt, exit_at: int | None, max_tokens: int = 1):
    extra = {} if exit_at is None else {EXIT_AT: exit_at}
    [output] = outputs(llm, [prompt], greedy(max_tokens=max_tokens, extra_args=extra))
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def test_a_full_depth_request_does_not_hit_the_blocks_of_an_exited_one(small, reference):
    first, second = prompts_with_shared_prefix(2, seed=0)
    with scripted(small):
        ask(small, first, exit_at=0)
        tokens, cached = ask(small, second, exit_at=None, max_tokens=6)
    assert cached == 0
    assert same(tokens, continuation(reference, second, 6, LAYERS))


def test_the_second_touch_completes_a_shared_prefix_and_the_third_hits_it(small, reference):
    prompts = prompts_with_shared_prefix(4, seed=1)
    with scripted(small) as stats:
        answers = [ask(small, prompt, exit_at=0) for prompt in prompts]
    assert [cached for _, cached in answers] == [0, 0, PREFIX, PREFIX]
    depths = [FROM_ZERO[0], LAYERS, FROM_ZERO[0], FROM_ZERO[0]]
    for prompt, (tokens, _), depth in zip(prompts, answers, depths, strict=True):
        assert same(tokens, [token_after(reference, prompt, depth)])
    whole, own = len(prompts[0]), len(prompts[0]) - PREFIX
    rows = [whole, whole, own, own]
    assert stats.layers_run == sum(r * d for r, d in zip(rows, depths, strict=True))


def test_once_prefixes_have_come_again_new_ones_are_completed_at_once(
    small, reference, monkeypatch
):
    """Asked twice: from the fourth on, the first time runs to the end and the second hits it."""
    monkeypatch.setattr(ScriptedAdmission, "saving", ("policy", 0.4))
    pairs = [prompts_with_shared_prefix(2, seed=20 + number) for number in range(6)]
    with scripted(small):
        answers = [[ask(small, prompt, exit_at=0) for prompt in pair] for pair in pairs]
    hits = [second for _, (_, second) in answers]
    assert hits == [0, 0, 0, PREFIX, PREFIX, PREFIX]
    for pair, found, hit in zip(pairs, answers, hits, strict=True):
        depths = (LAYERS, FROM_ZERO[0]) if hit else (FROM_ZERO[0], LAYERS)
        for prompt, (tokens, _), depth in zip(pair, found, depths, strict=True):
            assert same(tokens, [token_after(reference, prompt, depth)])


def test_a_prefix_shared_within_a_step_is_completed_by_the_first_and_hit_by_the_others(
    small, reference
):
    prompts = prompts_with_shared_prefix(3, seed=7)
    with scripted(small) as stats:
        found = outputs(small, prompts, greedy(extra_args={EXIT_AT: 0}))
    assert [output.num_cached_tokens for output in found] == [0, PREFIX, PREFIX]
    depths = [LAYERS, FROM_ZERO[0], FROM_ZERO[0]]
    for prompt, output, depth in zip(prompts, found, depths, strict=True):
        tokens = list(output.outputs[0].token_ids)
        assert same(tokens, [token_after(reference, prompt, depth)])
    whole, own = len(prompts[0]), len(prompts[0]) - PREFIX
    assert stats.layers_run == whole * LAYERS + 2 * own * FROM_ZERO[0]


def test_one_batch_with_a_shared_prefix_is_exact(small, reference):
    prompts = prompts_with_shared_prefix(12, seed=2)
    exits = [i % (len(FROM_ZERO) + 1) - 1 for i in range(len(prompts))]
    params = [greedy(extra_args={} if e < 0 else {EXIT_AT: e}) for e in exits]
    with scripted(small):
        for _ in range(2):  # the second pass finds complete blocks only
            found = tokens_of(small, prompts, params)
            for prompt, exit_at, tokens in zip(prompts, exits, found, strict=True):
                depths = {LAYERS, LAYERS if exit_at < 0 else FROM_ZERO[exit_at]}
                assert any(same(tokens, [token_after(reference, prompt, d)]) for d in depths)


@pytest.mark.parametrize("length", [150, 300])
def test_chunks_before_the_last_are_cached_as_in_stock(small, reference, length):
    """The engine runs 128 rows a step, so these prompts take two or three."""
    generator = np.random.default_rng(length)
    prompt = generator.integers(5, 1000, length).tolist()
    longer = prompt + generator.integers(5, 1000, 9).tolist()
    with scripted(small):
        ask(small, prompt, exit_at=0)
        tokens, cached = ask(small, longer, exit_at=None, max_tokens=4)
    assert cached == (length - 1) // 128 * 128
    assert same(tokens, continuation(reference, longer, 4, LAYERS))


def test_resetting_the_prefix_cache_forgets_what_was_withheld(small):
    first, second = prompts_with_shared_prefix(2, seed=5)
    with scripted(small) as stats:
        ask(small, first, exit_at=0)
        small.reset_prefix_cache()
        ask(small, second, exit_at=0)
    assert stats.layers_run == (len(first) + len(second)) * FROM_ZERO[0]


def test_a_prompt_that_may_exit_but_runs_to_full_depth_is_hit_by_the_next(small, reference):
    prompts = prompts_with_shared_prefix(3, seed=8)
    never = len(FROM_ZERO)  # an exit point that there is not
    with scripted(small) as stats:
        answers = [
            ask(small, prompt, exit_at)
            for prompt, exit_at in zip(prompts, [never, 0, never], strict=True)
        ]
    assert [cached for _, cached in answers] == [0, PREFIX, PREFIX]
    depths = [LAYERS, FROM_ZERO[0], LAYERS]
    for prompt, (tokens, _), depth in zip(prompts, answers, depths, strict=True):
        assert same(tokens, [token_after(reference, prompt, depth)])
    whole, own = len(prompts[0]), len(prompts[0]) - PREFIX
    assert stats.layers_run == whole * LAYERS + own * (FROM_ZERO[0] + LAYERS)
