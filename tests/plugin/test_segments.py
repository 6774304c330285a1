"""Segments as vLLM's compiler and its piecewise CUDA graphs want them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import override_forward_context

from vllm_adainfer.engine.segments.segments import FixedStates, Stack, segment_class
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.batch.hidden_states import HiddenStates


def test_segments_that_compile_differently_are_named_differently():
    spans = [(0, 0, 6), (0, 3, 6), (3, 5, 6), (0, 5, 6), (3, 5, 7), (5, 6, 6), (6, 6, 6)]
    ends = itertools.product((False, True), repeat=2)
    classes = [segment_class(*span, *end) for span, end in itertools.product(spans, ends)]
    assert len({kind.forward.__qualname__ for kind in classes}) == len(classes)


SHAPE = StackShape([1] * 4, head_size=4)


def stack_of(seen: list[Tensor]) -> Stack:
    """Four segments, which note what they read. The first embeds: it yields no residual."""

    def segment(positions, hidden, residual, per_layer):
        seen.append(hidden)
        return hidden + 1, hidden.clone() if residual is None else residual + 1, None

    def first(positions, ids, residual, per_layer):
        states = ids.unsqueeze(1).repeat(1, 4).float()
        return states, None, states.unsqueeze(1).clone()

    return Stack((first, segment, segment, segment), None, SHAPE, FixedStates(8))


def pass_of(stack: Stack, rows: int) -> HiddenStates:
    states = HiddenStates(torch.arange(rows))
    for index in range(4):
        states = stack.run(index, torch.arange(rows), states)
    return states


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE])
def test_graphs_find_the_states_between_segments_where_they_were_captured(mode):
    seen: list[Tensor] = []
    stack = stack_of(seen)
    with override_forward_context(SimpleNamespace(cudagraph_runtime_mode=mode)):
        results = [pass_of(stack, rows) for rows in (8, 3, 8)]
    for rows, result in zip((8, 3, 8), results, strict=True):
        expected = torch.arange(rows).unsqueeze(1).repeat(1, 4)
        assert torch.equal(result.hidden, expected + 3.0)
        assert torch.equal(result.residual, expected + 2.0)
        assert torch.equal(result.per_layer.squeeze(1), expected.float())
    addresses = {states.data_ptr() for states in seen}
    assert len(addresses) == 2 if mode == CUDAGraphMode.PIECEWISE else len(addresses) > 2


def test_graphs_also_find_states_that_came_from_elsewhere_with_padding_behind_them():
    """Rows that are left of a batch, and copies by which a recording times layers again."""
    seen: list[Tensor] = []
    stack = stack_of(seen)
    mode = SimpleNamespace(cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE)
    with override_forward_context(mode):
        pass_of(stack, 8)
        after = stack.run(0, torch.arange(8), HiddenStates(torch.arange(8)))
        after = stack.run(1, torch.arange(8), after)
        left = after.rows(torch.tensor([1, 4, 6]))
        stack.fixed_states.put_positions(torch.tensor([1, 4, 6]))
        again = stack.run(2, torch.arange(3), left.clone())
        assert torch.equal(again.hidden, left.hidden + 1)
        padded = stack.run(2, torch.arange(3), stack.fixed_states.put(left, 8))
    assert padded.num_rows == 8
    assert torch.equal(padded.hidden[:3], left.hidden + 1)
    assert len({states.data_ptr() for states in seen}) == 2
    assert stack.fixed_states.positions_of(3).tolist() == [1, 4, 6]


@pytest.mark.parametrize("mode", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE])
def test_only_sizes_that_passes_without_requests_have_captured_are_replayed(mode):
    stack = stack_of([])
    with override_forward_context(SimpleNamespace(cudagraph_runtime_mode=mode)):
        for rows in (8, 4):
            stack.run_all(torch.arange(rows), torch.arange(rows), with_last_kv=True)
        stack.run_all(torch.arange(6), torch.arange(6))  # a step in which exits are off
    captured = mode == CUDAGraphMode.PIECEWISE
    sizes = [stack.fixed_states.size_for(rows) for rows in (1, 4, 5, 8, 9)]
    assert sizes == ([4, 4, 8, 8, None] if captured else [None] * 5)


@pytest.mark.parametrize("moved", ["hidden", "residual"])
def test_states_of_which_one_part_lies_elsewhere_are_put_there_whole(moved):
    """Kernels of norms add to the residual in place: one part may stay where it was."""
    fixed = FixedStates(8)
    inside = fixed.put(HiddenStates(torch.zeros(8, 4), torch.zeros(8, 4)), 8)
    fixed.put(replace(inside, **{moved: torch.ones(8, 4)}), 8)
    assert inside.hidden.sum() + inside.residual.sum() == 8 * 4
