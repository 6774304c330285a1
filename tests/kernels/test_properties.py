"""What holds for any scores at all."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from adainfer_kernels import ProbeResult, merge, summarise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.flat import probe
from tests.kernels.oracle import (
    DEVICE,
    DTYPES,
    INF,
    NAN,
    assert_accurate,
    normal,
    reduce,
    same,
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


def probed(row: list[float], **options: Tensor) -> ProbeResult:
    """The probe of a row with these scores."""
    return probe(*with_scores(torch.tensor(row)), norm=None, **options)


def summarised(row: list[float]) -> ProbeResult:
    return summarise(torch.tensor([row], device=DEVICE))


either = pytest.mark.parametrize("find", [summarised, probed])


def assert_same_features(left: ProbeResult, right: ProbeResult, atol: float = 1e-5) -> None:
    torch.testing.assert_close(left.features, right.features, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [1, 7])
def test_scores_reduce_as_in_fp64(rows, size, dtype):
    scores = 3 * normal(rows, size, dtype=dtype)
    ids = torch.arange(size, device=DEVICE).expand(rows, -1)
    right = reduce(scores.double(), ids)
    found = summarise(scores)
    assert_accurate(found, right, right)
    assert torch.equal(found.top1_id, right.top1_id), "ties of the dtype too"


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("best", [0, 1, -2, -1])
@pytest.mark.parametrize("second", [0, 1, -2, -1])
def test_the_best_two_may_stand_anywhere(best, second, size):
    scores = normal(2, size)
    scores[:, second] = 8.5
    scores[:, best] = 9.0
    found = summarise(scores)
    assert found.top1_id.tolist() == [best % size] * 2
    if best % size != second % size:
        assert found.top2.tolist() == [8.5] * 2


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_row_without_a_softmax_spoils_no_other(value, size):
    scores = normal(3, size)
    clean = summarise(scores)
    scores[1] = value
    found = summarise(scores)
    assert found.features.isnan().all(dim=-1).tolist() == [False, True, False]
    assert torch.equal(found.features[[0, 2]], clean.features[[0, 2]])


@pytest.mark.parametrize("size", SIZES)
def test_ids_name_the_columns(size):
    scores = normal(3, size)
    plain = summarise(scores)
    ids = torch.randperm(5000, generator=torch.Generator().manual_seed(0))[:size].to(DEVICE)
    for named in (summarise(scores, ids), summarise(scores, ids.expand(3, -1))):
        assert torch.equal(named.top1_id, ids[plain.top1_id])
        assert torch.equal(named.top2, plain.top2)
        assert_same_features(named, plain)


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
def test_a_column_without_an_id_does_not_count(shape):
    scores = torch.tensor([[1.0, 9.0, 2.0, NAN, 0.0]], device=DEVICE)
    ids = torch.tensor([40, -1, 60, -1, 50], device=DEVICE).view(shape)
    found, right = summarise(scores, ids), summarise(scores[:, ::2])
    assert (found.top1_id.item(), found.top1.item(), found.top2.item()) == (60, 2.0, 1.0)
    assert_same_features(found, right)


@either
@given(row=SCORES)
@properties
def test_the_gap_is_a_share_and_the_best_score_is_the_best(find, row):
    found = find(row)
    assert found.top1.item() == max(row) == row[found.top1_id.item()]
    assert found.top1_id.item() == row.index(max(row))
    assert found.top2.item() == sorted(row)[-2]
    assert 0 <= found.gap.item() <= found.top_prob.item() <= 1


@either
@given(row=SCORES, constant=CONSTANTS)
@properties
def test_a_constant_added_to_all_scores_changes_no_feature(find, row, constant):
    plain, shifted = find(row), find([score + constant for score in row])
    assert torch.equal(plain.top1_id, shifted.top1_id)
    assert_same_features(shifted, plain, atol=5e-5)


@given(row=SCORES, constant=CONSTANTS)
@properties
def test_a_constant_bias_changes_no_feature(row, constant):
    bias = torch.full((len(row),), constant, device=DEVICE)
    plain, biased = probed(row), probed(row, head_bias=bias)
    assert torch.equal(plain.top1_id, biased.top1_id)
    assert torch.equal(plain.top1 + constant, biased.top1)
    assert_same_features(biased, plain, atol=5e-5)


@either
@given(
    row_and_order=SCORES.flatmap(
        lambda row: st.tuples(st.just(row), st.permutations(range(len(row))))
    )
)
@properties
def test_a_permuted_vocabulary_has_permuted_ids(find, row_and_order):
    row, order = row_and_order
    plain, permuted = find(row), find([row[at] for at in order])
    assert_same_features(permuted, plain)
    best = {at for at, score in enumerate(row) if score == max(row)}
    assert order[permuted.top1_id.item()] in best
    assert permuted.top1_id.item() == min(order.index(at) for at in best)


@either
@given(row=SCORES, data=st.data())
@properties
def test_a_duplicated_maximum_leaves_no_gap(find, row, data):
    row[data.draw(st.integers(0, len(row) - 1))] = max(row) + 1
    row.insert(data.draw(st.integers(0, len(row))), max(row))
    found = find(row)
    assert found.gap.item() == 0
    assert found.top1_id.item() == row.index(max(row))


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


def test_one_shard_of_everything_is_the_whole():
    row = normal(500).tolist()
    assert same(probed(row, candidates=torch.arange(500, device=DEVICE)), probed(row))
