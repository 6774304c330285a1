"""Ties, certainty, infinities and NaN, wherever in the vocabulary they stand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.flat import probe
from tests.kernels.oracle import (
    BACKENDS,
    DEVICE,
    DTYPES,
    FORMS,
    INF,
    NAN,
    check_probe,
    in_form,
    normal,
    states_and_head,
    with_scores,
)

pytestmark = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # numpy, in the interpreter
]

VOCAB = 5000
# Torch goes by groups of 64 and, from 256 rows on, by blocks of 1024; Triton's interpreter has four
# parts of 1264, in tiles of 1024 and 240; a GPU has parts of 32.
TIES = [
    (0, 1),
    (0, 4999),
    (4998, 4999),
    (15, 16),
    (31, 32),
    (63, 64),
    (1023, 1024),
    (1263, 1264),
    (2287, 2288),
    (2527, 3792),
    (4095, 4096),
    (5, 1270, 4999),
    tuple(range(7, 5000, 131)),
]
ACCEPT_ALL = [[0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [-1.0, 2.0, 0.0]]


def accepting(classifier: list[float], rows: int) -> dict[str, Tensor]:
    """A classifier that every threshold below allows to settle everything that can be settled."""
    threshold = torch.full((rows,), -INF, device=DEVICE)
    return {"classifier": torch.tensor(classifier, device=DEVICE), "threshold": threshold}


@pytest.mark.parametrize("tied", TIES, ids=lambda tied: f"{tied[0]}-{tied[-1]}")
def test_a_tie_goes_to_the_lowest_id_and_leaves_no_gap(tied, backend):
    rows = 256 if backend == "torch" else 1
    scores = normal(VOCAB)
    scores[list(tied)] = 9.0
    found = check_probe(*with_scores(scores, rows), {"norm": None}, backend)
    assert (found.top1_id == min(tied)).all()
    assert (found.top1 == 9).all()
    assert (found.top2 == 9).all()
    assert (found.gap == 0).all()


@pytest.mark.parametrize("at", [0, 1, 15, 16, 63, 64, 1023, 1024, 1263, 1264, 4096, 4998, 4999])
def test_the_best_is_found_everywhere_with_its_runner_up_elsewhere(at, backend):
    scores = normal(VOCAB)
    scores[at], scores[(at + 2500) % VOCAB] = 9.0, 8.5
    found = check_probe(*with_scores(scores), {"norm": None}, backend)
    assert (found.top1_id.item(), found.top1.item(), found.top2.item()) == (at, 9.0, 8.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 16, 17, 64, 65, 129, 1024, 1025, 4097, VOCAB])
def test_equal_scores_share_the_probability_and_the_first_wins(vocab, dtype, backend):
    scores = torch.full((vocab,), -3.0)
    found = check_probe(*with_scores(scores, 2, dtype), {"norm": None}, backend)
    assert found.top1_id.tolist() == [0, 0]
    assert found.gap.tolist() == [0, 0]
    torch.testing.assert_close(found.top_prob.cpu(), torch.full((2,), 1 / vocab))


@pytest.mark.parametrize("form", FORMS[1:])
def test_of_unsorted_candidates_the_lowest_id_wins_a_tie(form, backend):
    hidden, head = with_scores(torch.full((VOCAB,), 2.0), rows=5)
    head, options = in_form(form, head, width=100)
    options["norm"] = None
    found = check_probe(hidden, head, options, backend)
    assert found.top1_id.tolist() == [options["candidates"].min().item()] * 5
    assert (found.gap == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 1500, VOCAB - 1])
def test_a_saturated_row_is_certain(at, dtype, backend):
    scores = torch.full((VOCAB,), -30.0)
    scores[at] = 30.0
    found = check_probe(*with_scores(scores, 3, dtype), {"norm": None}, backend)
    assert found.top1_id.tolist() == [at] * 3
    assert found.top_prob.tolist() == found.gap.tolist() == [1.0] * 3


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_scores_do_not_overflow(offset, backend):
    scores = torch.tensor([3.0, 2.0, 0.0, 1.0]).repeat(500) + offset
    found = probe(*with_scores(scores), norm=None, backend=backend)
    right = 1 / 500 / (1 + torch.tensor([-1.0, -2.0, -3.0]).exp().sum())
    torch.testing.assert_close(found.top_prob.cpu(), right[None], rtol=2e-3, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_minus_infinity_takes_a_token_out(form, backend):
    hidden, head = states_and_head(5, VOCAB, 40)
    bias = normal(VOCAB)
    bias[::2] = -INF
    bias[1000:3000] = -INF
    head, options = in_form(form, head, width=100, head_bias=bias)
    found = check_probe(hidden, head, options, backend)
    assert (found.top1_id % 2 == 1).all()


@pytest.mark.parametrize("at", [0, 2000, VOCAB - 1])
def test_a_token_left_alone_is_certain(at, backend):
    scores = torch.full((VOCAB,), -INF)
    scores[at] = -5.0
    found = check_probe(*with_scores(scores), {"norm": None}, backend)
    assert (found.top1_id.item(), found.top1.item(), found.top2.item()) == (at, -5.0, -INF)
    assert (found.top_prob.item(), found.gap.item()) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("form", "classifier"),
    [*(("full", each) for each in ACCEPT_ALL), *((form, ACCEPT_ALL[0]) for form in FORMS[1:])],
    ids=str,
)
@pytest.mark.parametrize("poison", ["all -inf", "one +inf", "all +inf", "one NaN", "all NaN"])
def test_scores_without_a_softmax_have_nan_features_and_settle_nothing(
    poison, form, classifier, backend
):
    hidden, head = states_and_head(5, 2000, 16)
    head, options = in_form(form, head, width=100, head_bias=normal(2000))
    value = float(poison.split()[1])
    bias = options["head_bias"]
    bias[: 1 if "one" in poison else None] = value
    if form == "gathered":
        bias[options["candidates"][70]] = value
    found = check_probe(hidden, head, options, backend, **accepting(classifier, 5))
    assert found.features.isnan().all()
    assert not found.settled.any()


@pytest.mark.parametrize("norm", ["rms", "layer", None])
@pytest.mark.parametrize("form", FORMS)
def test_a_nan_spoils_its_own_row_only(form, norm, backend):
    rows = 70 if form == "full" else 5
    hidden, head = states_and_head(rows, 1500, 16)
    head, options = in_form(form, head, width=20)
    options |= {"norm": norm, "backend": backend}
    options |= accepting([0.0, 0.0, 1.0], rows)
    clean = probe(hidden, head, **options)
    spoilt = torch.zeros(rows, dtype=torch.bool, device=DEVICE)
    spoilt[3] = True
    hidden[3, 7] = NAN
    found = probe(hidden, head, **options)
    assert found.features[spoilt].isnan().all()
    assert torch.equal(found.settled, clean.settled & ~spoilt)
    assert clean.settled.all()
    for name in ("top1_id", "top1", "top2", "lse"):
        assert torch.equal(getattr(found, name)[~spoilt], getattr(clean, name)[~spoilt])


@pytest.mark.parametrize("form", FORMS)
def test_a_row_at_its_threshold_is_settled(form, backend):
    hidden, head = states_and_head(3, 1500, 16)
    head, options = in_form(form, head, width=20)
    options |= accepting([0.0, 0.0, 0.5], 3)
    options["threshold"] = torch.tensor([0.5, 0.50001, 0.49999], device=DEVICE)
    found = probe(hidden, head, **options, backend=backend)
    assert found.settled.tolist() == [True, False, True]
