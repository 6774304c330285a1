"""`settle` decides as `probe` does, and returns its scores."""

from __future__ import annotations

import pytest
import torch
from adainfer_kernels import Head, linear_score, probe, settle

from tests.kernels.oracle import DEVICE, normal

CLASSIFIER = torch.tensor([3.0, 1.5, -2.0], device=DEVICE)
SURE = 1e-5  # rows this near to the threshold may fall on either side


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("factors", [{}, {"soft_cap": 2.0, "scale": 0.5}], ids=["plain", "capped"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 2), (3, 5), (2, 1000), (40, 300), (600, 1000)])
def test_settle_is_what_the_probe_says(rows, tokens, factors, bias, backend):
    if backend == "triton" and DEVICE == "cpu" and rows * tokens > 20_000:
        pytest.skip("Triton's interpreter takes too long")
    state, weight = normal(rows, 32, seed=rows), 0.5 * normal(tokens, 32, seed=1)
    head = Head(weight, normal(tokens, seed=2) if bias else None, **factors)
    found = probe(state, head, return_scores=True)
    score = linear_score(found.features, CLASSIFIER)
    threshold = score.median().expand(rows)
    settled, scores = settle(state, head, CLASSIFIER, threshold, backend=backend)
    sure = (score - threshold).abs() > SURE
    assert settled[sure].equal((score >= threshold)[sure])
    torch.testing.assert_close(scores, found.scores)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_a_bad_score_is_never_settled(bad):
    state, head = torch.ones(2, 4, device=DEVICE), Head(torch.ones(8, 4, device=DEVICE))
    state[0, 0] = bad
    settled, _ = settle(state, head, CLASSIFIER, torch.full((2,), -torch.inf, device=DEVICE))
    assert settled.tolist() == [False, True]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"classifier": torch.zeros(2)}, r"classifier must have the shape \[3\], got \[2\]"),
        ({"threshold": torch.zeros(3)}, r"threshold must have the shape \[2\], got \[3\]"),
        ({"head": Head(torch.zeros(8, 5))}, r"head is for a hidden size of 5, got states \[2, 4\]"),
    ],
    ids=["classifier", "threshold", "head"],
)
def test_shapes_that_do_not_fit_are_refused(changes, words):
    fitting = {
        "readout": torch.zeros(2, 4),
        "head": Head(torch.zeros(8, 4)),
        "classifier": torch.zeros(3),
        "threshold": torch.zeros(2),
    }
    with pytest.raises(ValueError, match=words):
        settle(**{**fitting, **changes})
