"""What holds for any scores at all."""

from __future__ import annotations

from itertools import pairwise, product

import pytest
import torch
from adainfer_kernels import ProbeResult, merge
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.flat import probe
from tests.kernels.oracle import (
    BACKENDS,
    DEVICE,
    DTYPES,
    assert_accurate,
    normal,
    reduce,
    with_scores,
)

# Multiples of 1/8, so that sums of them are exact in fp32; more than 128 take another path.
SCORES = st.integers(2, 300).flatmap(
    lambda size: st.lists(st.integers(-400, 400).map(lambda n: n / 8), min_size=size, max_size=size)
)
CONSTANTS = st.integers(-400, 400).map(lambda n: n / 8)
# Around the groups of 64 that more than 128 scores are reduced by.
SIZES = [2, 63, 64, 65, 127, 128, 129, 191, 192, 193, 1000, 4095, 4096, 4097]
properties = settings(deadline=None)
# Triton's interpreter takes too long for hundreds of examples.
each_backend = pytest.mark.parametrize("backend", BACKENDS if DEVICE == "cuda" else ["torch"])


def probed(row: list[float], **options: Tensor | str) -> ProbeResult:
    """The probe of a row with these scores."""
    return probe(*with_scores(torch.tensor(row)), norm=None, **options)


def states_and_head_of(scores: Tensor) -> tuple[Tensor, Tensor]:
    """States and a head whose products, with norm=None, are exactly these [up to 16 rows, n]."""
    rows, size = scores.shape
    head = torch.zeros(size, 16, dtype=scores.dtype, device=DEVICE)
    head[:, :rows] = scores.T
    return torch.eye(rows, 16, dtype=scores.dtype, device=DEVICE), head


def assert_same_features(left: ProbeResult, right: ProbeResult, atol: float = 1e-5) -> None:
    torch.testing.assert_close(left.features, right.features, rtol=0, atol=atol)


@each_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 7])
def test_scores_reduce_as_in_fp64(rows, size, dtype, backend):
    scores = 3 * normal(rows, size, dtype=dtype)
    right = reduce(scores.double(), torch.arange(size, device=DEVICE))
    found = probe(*states_and_head_of(scores), norm=None, backend=backend)
    assert_accurate(found, right, right)
    assert torch.equal(found.top1_id, right.top1_id), "ties of the dtype too"


@each_backend
@pytest.mark.parametrize("size", SIZES)
def test_the_best_two_may_stand_anywhere(size, backend):
    scores, places = normal(16, size), list(product([0, 1, size - 2, size - 1], repeat=2))
    for row, (best, second) in enumerate(places):
        scores[row, second] = 8.5
        scores[row, best] = 9.0
    found = probe(*states_and_head_of(scores), norm=None, backend=backend)
    assert found.top1_id.tolist() == [best for best, _ in places]
    apart = torch.tensor([best != second for best, second in places], device=DEVICE)
    assert (found.top2[apart] == 8.5).all()


@each_backend
@given(row=SCORES)
@properties
def test_the_gap_is_a_share_and_the_best_score_is_the_best(backend, row):
    found = probed(row, backend=backend)
    assert found.top1.item() == max(row) == row[found.top1_id.item()]
    assert found.top1_id.item() == row.index(max(row))
    assert found.top2.item() == sorted(row)[-2]
    assert 0 <= found.gap.item() <= found.top_prob.item() <= 1


@each_backend
@given(row=SCORES, constant=CONSTANTS)
@properties
def test_a_constant_added_to_all_scores_changes_no_feature(backend, row, constant):
    plain, shifted = (
        probed(scores, backend=backend) for scores in (row, [score + constant for score in row])
    )
    assert torch.equal(plain.top1_id, shifted.top1_id)
    assert_same_features(shifted, plain, atol=5e-5)


@each_backend
@given(
    row_and_order=SCORES.flatmap(
        lambda row: st.tuples(st.just(row), st.permutations(range(len(row))))
    )
)
@properties
def test_a_permuted_vocabulary_has_permuted_ids(backend, row_and_order):
    row, order = row_and_order
    plain, permuted = (
        probed(scores, backend=backend) for scores in (row, [row[at] for at in order])
    )
    assert_same_features(permuted, plain)
    best = {at for at, score in enumerate(row) if score == max(row)}
    assert order[permuted.top1_id.item()] in best
    assert permuted.top1_id.item() == min(order.index(at) for at in best)


@given(row=SCORES, data=st.data())
@properties
def test_shards_cut_anywhere_merge_to_the_whole(row, data):
    cuts = data.draw(st.sets(st.integers(0, len(row) // 2 - 1).map(lambda n: 2 * n), max_size=6))
    hidden, head = with_scores(torch.tensor(row), rows=2)
    shards = [
        probe(hidden, head[first:last], norm=None, candidates=torch.arange(first, last).to(DEVICE))
        for first, last in pairwise(sorted(cuts | {0, len(row)}))
    ]
    found = merge(data.draw(st.permutations(shards)))
    whole = probe(hidden, head, norm=None)
    assert torch.equal(found.top1_id, whole.top1_id)
    assert torch.equal(found.top1, whole.top1)
    assert torch.equal(found.top2, whole.top2)
    assert_same_features(found, whole)
