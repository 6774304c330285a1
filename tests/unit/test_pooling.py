"""The mean of a prompt is that of all of its own rows, in however many chunks they come."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vllm_adainfer.engine.admission.running import NOT_POOLED, Running
from vllm_adainfer.engine.runner.request_table import RequestTable
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.loop.pooling import CarriedPrompts, PooledPrompts
from vllm_adainfer.exits.loop.step import FULL_DEPTH, StepContext

HIDDEN, POINTS = 8, 2


def step_of(
    lens: list[int], ends: list[int], complete: list[bool], pooled_from: list[int] | None
) -> StepContext:
    """One in which requests run `lens` rows, up to position `ends` (exclusive)."""
    return StepContext(
        request_ids=[f"request {place}" for place in range(len(lens))],
        layout=RowLayout(np.array(lens), np.array(ends) - 1),
        yields_token=np.array(complete),
        threshold_rows=np.zeros(len(lens), dtype=np.int64),
        continues=np.zeros(len(lens), dtype=np.bool_),
        pooled_from=None if pooled_from is None else np.array(pooled_from),
    )


def definition(states: Tensor, pooled_from: int) -> Tensor:
    normed = states / (states.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return torch.cat([normed[-1], normed[pooled_from:].mean(0)])


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_prompts_in_any_chunks_and_order_are_read_as_the_definition_says(seed, with_residual):
    """Some requests have left, and rows of earlier tokens have rejoined before those of others."""
    generator = np.random.default_rng(seed)
    torch.manual_seed(seed)
    lens = generator.integers(2, 30, 5)
    pooled_from = [int(generator.integers(1, length)) for length in lens]
    pooled_from[int(generator.integers(len(lens)))] = NOT_POOLED
    states = torch.randn(POINTS, len(lens), 30, HIDDEN)
    carried, done = CarriedPrompts(), np.zeros(len(lens), dtype=np.int64)
    found: dict[tuple[int, int], Tensor] = {}
    while (done < lens).any():
        chunk = np.minimum(generator.integers(1, 12, len(lens)), lens - done)
        chunk[generator.random(len(lens)) < 0.3] = 0
        done += chunk
        complete = (done == lens) & (chunk > 0)
        step = step_of(chunk.tolist(), done.tolist(), complete.tolist(), pooled_from)
        prompts = PooledPrompts(step, carried)
        wanted = np.flatnonzero(complete & (step.pooled_from >= 0))
        leaving = np.flatnonzero((step.pooled_from < 0) & (chunk > 0))
        waiting = np.where((chunk > 0) & (step.pooled_from >= 0), generator.integers(0, 3, 5), 0)
        layout, _ = step.layout.regroup(leaving, waiting)
        for point in range(POINTS):
            rows = [
                torch.cat(
                    [
                        torch.full((joined, HIDDEN), torch.nan),
                        states[point, request, max(end - own, 0) : end],
                    ]
                )
                for request, (joined, own, end) in enumerate(
                    zip(waiting, layout.query_lens - waiting, done, strict=True)
                )
            ]
            hidden = torch.cat(rows)
            residual = torch.randn_like(hidden) if with_residual else None
            batch = HiddenStates(hidden if residual is None else hidden - residual, residual)
            order = generator.permutation(wanted)
            read = prompts.read(point, order, prompts.chunks, layout, batch)
            found |= {(point, int(one)): row for one, row in zip(order, read, strict=True)}
        carried.step_ended(step)
    assert len(found) == POINTS * (len(lens) - 1)
    assert not carried.read
    assert not carried.ends
    for (point, request), read in found.items():
        right = definition(states[point, request, : lens[request]], pooled_from[request])
        torch.testing.assert_close(read, right, rtol=1e-4, atol=1e-5)


def test_a_chunk_before_the_own_tokens_carries_nothing():
    carried = CarriedPrompts()
    step = step_of([4, 5], [4, 5], [False, False], [4, 4])
    prompts = PooledPrompts(step, carried)
    assert prompts.chunks.tolist() == [1]
    prompts.read(0, np.arange(0), prompts.chunks, step.layout, HiddenStates(torch.ones(9, HIDDEN)))
    carried.step_ended(step)
    assert [carried.ends.get(name) for name in step.request_ids] == [None, 5]


def test_rows_of_a_draft_behind_a_prompt_are_none_of_it():
    states = torch.randn(12, HIDDEN)
    step = replace(step_of([8, 4], [8, 4], [True, True], [2, 1]), sampled_lens=np.array([4, 1]))
    prompts = PooledPrompts(step, CarriedPrompts())
    read = prompts.read(0, np.array([0, 1]), prompts.chunks, step.layout, HiddenStates(states))
    expected = torch.stack([definition(states[:5], 2), definition(states[8:], 1)])
    torch.testing.assert_close(read, expected)


def put(carried: CarriedPrompts, *names: str) -> None:
    for name in names:
        carried.read.setdefault(name, {})[0] = torch.ones(HIDDEN)


@pytest.mark.parametrize(
    ("complete", "pooled_from", "end"),
    [(False, [2], 9), (True, [2], None), (False, [NOT_POOLED], None), (False, None, None)],
    ids=["a chunk", "the last chunk", "a chunk that is not pooled", "no pooled policy any more"],
)
def test_sums_are_kept_only_while_they_have_every_row(complete, pooled_from, end):
    """A chunk may run without being pooled, as while other weights are served."""
    carried = CarriedPrompts()
    put(carried, "request 0", "elsewhere")
    carried.step_ended(step_of([4], [9], [complete], pooled_from))
    assert carried.ends.get("request 0") == end
    assert ("request 0" in carried.read) == (end is not None)
    assert "elsewhere" in carried.read  # it did not run in this step


def test_sums_are_forgotten_with_their_request_or_with_all():
    carried = CarriedPrompts()
    put(carried, "a", "b", "c")
    carried.forget("a")
    carried.forget("never seen")
    assert list(carried.read) == ["b", "c"]
    carried.clear()
    assert not carried.read


def test_what_is_kept_of_a_chunk_keeps_no_larger_tensor_alive():
    carried = CarriedPrompts()
    step = step_of([3, 3], [3, 3], [False, True], [1, 1])
    prompts = PooledPrompts(step, carried)
    prompts.read(0, np.array([1]), prompts.chunks, step.layout, HiddenStates(torch.ones(6, HIDDEN)))
    kept = carried.read["request 0"][0]
    assert kept.untyped_storage().nbytes() == 4 * HIDDEN


@pytest.mark.parametrize(
    ("computed", "end", "whole"),
    [(0, None, True), (4, None, True), (5, None, False), (9, 9, True), (9, 7, False)],
    ids=[
        "nothing cached",
        "cached up to its own tokens",
        "one of its own cached",
        "its first chunk pooled",
        "only a part of it pooled",
    ],
)
def test_a_prompt_of_which_some_own_rows_never_ran_is_decided_by_its_last_token(
    computed, end, whole
):
    table = RequestTable()
    table.put("a", Running(pooled_from=4, threshold_row=3, last_token_row=7))
    own, carried = table.of(["a"]), SimpleNamespace(ends={"a": end})
    running: Any = SimpleNamespace(_loop=SimpleNamespace(carried=carried))
    RunningRequests._without_lost_rows(running, own, ["a"], np.array([computed]))
    found = own.pooled_from.tolist(), own.threshold_row.tolist()
    assert found == (([4], [3]) if whole else ([NOT_POOLED], [7]))


@pytest.mark.parametrize(("changed", "forgotten"), [(False, []), (True, ["a"])])
def test_sums_of_a_request_end_with_the_policy_that_read_it(changed, forgotten):
    """Its adapter may turn out to be another one, with a policy of its own."""
    before = Running(prompt=[5], threshold_row=1)
    now = replace(before, threshold_row=FULL_DEPTH) if changed else before
    noted: list[str] = []
    put: dict[str, Running] = {}
    running: Any = SimpleNamespace(
        _requests={"a": before},
        _put=put.__setitem__,
        _admit=lambda *_: now,
        _loop=SimpleNamespace(carried=SimpleNamespace(forget=noted.append)),
    )
    RunningRequests.use_admission(running, SimpleNamespace())
    assert noted == forgotten
    assert put == {"a": now}
