from __future__ import annotations

import pytest
import torch
from adainfer_kernels import ProbeResult, probe, summarise
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

HIDDEN = 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Multiples of 1/8, so that sums of them are exact in fp32.
SCORES = st.lists(st.integers(-400, 400).map(lambda n: n / 8), min_size=2, max_size=40)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def oracle(scores: Tensor) -> dict[str, Tensor]:
    """Softmax and top-k in fp64."""
    scores = scores.double()
    best = scores.topk(2, dim=-1).values
    probabilities = scores.softmax(dim=-1).topk(2, dim=-1).values
    return {
        "top1": best[:, 0],
        "top2": best[:, 1],
        "lse": scores.logsumexp(dim=-1),
        "top_prob": probabilities[:, 0],
        "gap": probabilities[:, 0] - probabilities[:, 1],
    }


def numbers(result: ProbeResult) -> dict[str, Tensor]:
    names = ("top1", "top2", "lse", "top_prob", "gap")
    return {name: getattr(result, name).double() for name in names}


def assert_near(found: ProbeResult, expected: dict[str, Tensor], atol: float) -> None:
    for name, value in numbers(found).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=atol, msg=name)


def same(left: ProbeResult, right: ProbeResult) -> bool:
    return torch.equal(left.top1_id, right.top1_id) and all(
        torch.equal(numbers(left)[name], value) for name, value in numbers(right).items()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 1000, 32000])
@pytest.mark.parametrize("rows", [1, 7, 83])
def test_scores_reduce_as_in_fp64(rows, vocab, dtype):
    scores = normal(rows, vocab, dtype=dtype)
    found = summarise(scores)
    assert_near(found, oracle(scores), atol=1e-5)
    best = scores.double().amax(dim=-1, keepdim=True)
    lowest = [int(row.nonzero()[0]) for row in scores.double() == best]
    assert found.top1_id.tolist() == lowest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 1000, 32000])
@pytest.mark.parametrize("rows", [1, 7, 83])
def test_a_probe_is_fp64_softmax_and_topk_up_to_the_rounding_of_its_dtype(rows, vocab, dtype):
    hidden = normal(rows, HIDDEN, seed=1, dtype=dtype)
    head = (normal(vocab, HIDDEN, seed=2) / 4).to(dtype)
    found = probe(hidden, head)
    scores = hidden.double() @ head.double().T
    magnitude = float((hidden.double().abs() @ head.double().abs().T).max())
    rounding = torch.finfo(dtype).eps * magnitude
    expected = oracle(scores)
    assert_near(found, expected, atol=2 * rounding)
    clear = expected["top1"] - expected["top2"] > 2 * rounding
    assert torch.equal(found.top1_id[clear], scores.argmax(dim=-1)[clear])
    assert found.top1_id.dtype == torch.int64


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_lens", [False, True])
def test_lens_then_norm_then_head_then_bias(with_lens, with_norm, with_bias):
    hidden, head = normal(7, HIDDEN, seed=1), normal(50, HIDDEN, seed=2)
    options, x = {}, hidden.double()
    if with_lens:
        weight, bias = normal(HIDDEN, HIDDEN, seed=3), normal(HIDDEN, seed=4)
        options |= {"lens_weight": weight, "lens_bias": bias}
        x = x + x @ weight.double() + bias.double()
    if with_norm:
        gain = normal(HIDDEN, seed=5)
        options |= {"norm_weight": gain, "norm_eps": 0.1}
        x = x / (x.square().mean(dim=-1, keepdim=True) + 0.1).sqrt() * gain.double()
    scores = x @ head.double().T
    if with_bias:
        shift = normal(50, seed=6)
        options["head_bias"] = shift
        scores = scores + shift.double()
    found = probe(hidden, head, **options)
    assert_near(found, oracle(scores), atol=1e-4)
    assert torch.equal(found.top1_id, scores.argmax(dim=-1))


@pytest.mark.parametrize("tied", [(0, 1), (3, 8), (2, 5, 9)])
def test_a_tie_goes_to_the_lowest_id_and_leaves_no_gap(tied):
    scores = normal(1, 10)
    scores[0, list(tied)] = 9.0
    found = summarise(scores)
    assert found.top1_id.item() == min(tied)
    assert found.top1.item() == found.top2.item() == 9.0
    assert found.gap.item() == 0


def test_a_row_with_a_nan_has_nan_features_and_spoils_no_other_row():
    scores = normal(3, 10)
    clean = summarise(scores)
    scores[1, 4] = float("nan")
    found = summarise(scores)
    assert found.gap.isnan().tolist() == [False, True, False]
    assert found.top_prob.isnan().tolist() == [False, True, False]
    assert torch.equal(found.gap[[0, 2]], clean.gap[[0, 2]])
    assert not (found.gap >= float("-inf"))[1], "no threshold accepts it"


def test_minus_infinity_takes_a_token_out():
    scores = normal(7, 10)
    without = summarise(scores[:, ::2])
    scores[:, 1::2] = float("-inf")
    found = summarise(scores)
    assert torch.equal(found.top1_id, 2 * without.top1_id)
    assert_near(found, numbers(without), atol=1e-6)


def test_a_token_left_alone_is_certain():
    scores = torch.full((1, 5), float("-inf"))
    scores[0, 3] = 1.0
    found = summarise(scores)
    assert (found.top1_id.item(), found.top_prob.item(), found.gap.item()) == (3, 1.0, 1.0)


def test_a_row_of_minus_infinity_has_nan_features():
    found = summarise(torch.full((1, 5), float("-inf")))
    assert found.gap.isnan().all()
    assert found.top_prob.isnan().all()


def test_strided_input_gives_what_its_copy_gives():
    hidden, head = normal(14, 2 * HIDDEN, seed=1)[::2, ::2], normal(HIDDEN, 100, seed=2).T
    assert not hidden.is_contiguous()
    assert not head.is_contiguous()
    strided, copied = probe(hidden, head), probe(hidden.contiguous(), head.contiguous())
    assert torch.equal(strided.top1_id, copied.top1_id)
    assert_near(strided, numbers(copied), atol=1e-5)
    scores = normal(100, 7, seed=3).T
    assert same(summarise(scores), summarise(scores.contiguous()))


def test_candidates_name_the_columns():
    hidden, head = normal(7, HIDDEN, seed=1), normal(4, HIDDEN, seed=2)
    candidates = torch.tensor([31, 7, 900, 12])
    plain, named = probe(hidden, head), probe(hidden, head, candidates=candidates)
    assert torch.equal(named.top1_id, candidates[plain.top1_id])
    assert torch.equal(named.gap, plain.gap)


def test_no_rows_give_no_rows():
    assert probe(normal(0, HIDDEN), normal(4, HIDDEN)).gap.shape == (0,)


def test_a_lens_without_bias_is_an_error():
    with pytest.raises(ValueError, match="lens_weight needs lens_bias"):
        probe(normal(1, HIDDEN), normal(4, HIDDEN), lens_weight=normal(HIDDEN, HIDDEN))


@pytest.mark.parametrize("scores", [0, 1])
def test_fewer_than_two_scores_are_an_error(scores):
    with pytest.raises(ValueError, match=f"at least two scores a row, got {scores}"):
        summarise(normal(3, scores))
    with pytest.raises(ValueError, match=f"at least two scores a row, got {scores}"):
        probe(normal(3, HIDDEN), normal(scores, HIDDEN))


@given(SCORES)
@settings(deadline=None)
def test_the_gap_is_a_share_and_the_best_score_is_the_best(row):
    found = summarise(torch.tensor([row]))
    assert found.top1.item() == max(row) == row[found.top1_id.item()]
    assert found.top1 >= found.top2
    assert 0 <= found.gap.item() <= found.top_prob.item() <= 1


@given(SCORES, st.integers(-400, 400).map(lambda n: n / 8))
@settings(deadline=None)
def test_a_constant_added_to_all_scores_changes_no_feature(row, constant):
    scores = torch.tensor([row])
    plain, shifted = summarise(scores), summarise(scores + constant)
    assert torch.equal(plain.top1_id, shifted.top1_id)
    torch.testing.assert_close(shifted.gap, plain.gap, rtol=0, atol=5e-5)
    torch.testing.assert_close(shifted.top_prob, plain.top_prob, rtol=0, atol=5e-5)


@given(SCORES.flatmap(lambda row: st.tuples(st.just(row), st.permutations(range(len(row))))))
@settings(deadline=None)
def test_the_order_of_the_vocabulary_does_not_change_the_gap(row_and_order):
    row, order = row_and_order
    scores = torch.tensor([row])
    plain, permuted = summarise(scores), summarise(scores[:, order])
    torch.testing.assert_close(permuted.gap, plain.gap, rtol=0, atol=1e-5)
    assert row[order[permuted.top1_id.item()]] == max(row)
