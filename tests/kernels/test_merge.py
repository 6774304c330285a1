"""Results over parts of the vocabulary merge to the result over all of it."""

from __future__ import annotations

import random

import pytest
import torch
from adainfer_kernels import ProbeResult, merge
from torch import Tensor

from tests.kernels.flat import probe
from tests.kernels.oracle import (
    BACKENDS,
    DEVICE,
    INF,
    NAN,
    assert_accurate,
    normal,
    oracle,
    same_dtype,
    states_and_head,
    with_scores,
)


def shards_of(
    hidden: Tensor, head: Tensor, count: int, bias: Tensor | None = None, **options
) -> list[ProbeResult]:
    """What `count` devices find that hold a part of the head each."""
    ids = torch.arange(len(head), device=DEVICE).chunk(count)
    assert len(ids) == count
    return [
        probe(
            hidden,
            head[part],
            candidates=part,
            head_bias=None if bias is None else bias[part],
            **options,
        )
        for part in ids
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_merged_shards_are_the_whole_in_any_order(count, backend):
    hidden, head = states_and_head(7, 3000, 40)
    bias = normal(3000)
    shards = shards_of(hidden, head, count, bias, backend=backend)
    right = oracle(hidden, head, head_bias=bias), same_dtype(hidden, head, head_bias=bias)
    for seed in range(5):
        random.Random(seed).shuffle(shards)
        assert_accurate(merge(shards), *right)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("count", [2, 3, 7])
@pytest.mark.parametrize("tied", [(0, 99), (49, 50), (33, 34, 66, 67), range(100)], ids=str)
def test_a_tie_across_shards_goes_to_the_lowest_id(tied, count, backend):
    scores = normal(100)
    scores[list(tied)] = 9.0
    shards = shards_of(*with_scores(scores, 3), count, norm=None, backend=backend)
    for order in (shards, shards[::-1]):
        found = merge(order)
        assert found.top1_id.tolist() == [min(tied)] * 3
        assert found.top1.tolist() == found.top2.tolist() == [9.0] * 3
        assert found.gap.tolist() == [0.0] * 3


@pytest.mark.parametrize("count", [1, 2])
def test_what_speaks_of_one_shard_only_is_left_out(count):
    hidden, head = states_and_head(7, 50, 16)
    asked = {"classifier": normal(3), "threshold": normal(7), "return_scores": True}
    found = merge(shards_of(hidden, head, count, **asked))
    assert (found.settled, found.scores) == (None, None)


def test_shards_without_any_score_do_not_count():
    hidden, head = states_and_head(7, 90, 16)
    bias = normal(90)
    bias[30:60] = -INF
    right = oracle(hidden, head, head_bias=bias), same_dtype(hidden, head, head_bias=bias)
    assert_accurate(merge(shards_of(hidden, head, 3, bias)), *right)


@pytest.mark.parametrize("spoilt", [NAN, INF])
@pytest.mark.parametrize("at", [0, 50, 89])
def test_a_shard_without_a_softmax_leaves_none(at, spoilt):
    hidden, head = states_and_head(7, 90, 16)
    bias = normal(90)
    bias[at] = spoilt
    assert merge(shards_of(hidden, head, 3, bias)).features.isnan().all()


def test_scores_that_are_all_minus_infinity_leave_no_feature():
    hidden, head = states_and_head(7, 90, 16)
    bias = torch.full((90,), -INF, device=DEVICE)
    assert merge(shards_of(hidden, head, 3, bias)).features.isnan().all()


def test_no_shards_are_an_error():
    with pytest.raises(ValueError, match="merge needs at least one part"):
        merge([])
