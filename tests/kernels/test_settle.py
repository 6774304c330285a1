"""`settle` decides as `probe` does, and returns its scores."""

from __future__ import annotations

import pytest
import torch
from adainfer_kernels import linear_score, probe, settle

CLASSIFIER = torch.tensor([3.0, 1.5, -2.0])
SURE = 1e-5  # rows this near to the threshold may fall on either side


@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 2), (3, 5), (2, 1000), (40, 300), (600, 1000)])
def test_settle_is_what_the_probe_says(rows, tokens, bias, implementation):
    if implementation == "triton" and rows * tokens > 20_000:
        pytest.skip("Triton's interpreter takes too long")
    generator = torch.Generator().manual_seed(rows)
    state = torch.randn(rows, 32, generator=generator)
    head = 0.5 * torch.randn(tokens, 32, generator=generator)
    head_bias = torch.randn(tokens, generator=generator) if bias else None
    found = probe(state, head, norm=None, head_bias=head_bias, return_scores=True)
    score = linear_score(found.features, CLASSIFIER)
    threshold = score.median().expand(rows)
    settled, scores = settle(
        state,
        head,
        head_bias=head_bias,
        classifier=CLASSIFIER,
        threshold=threshold,
        implementation=implementation,
    )
    sure = (score - threshold).abs() > SURE
    assert settled[sure].equal((score >= threshold)[sure])
    torch.testing.assert_close(scores, found.scores)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_with_a_bad_score_is_never_settled(bad):
    state, head = torch.ones(2, 4), torch.ones(8, 4)
    state[0, 0] = bad
    settled, _ = settle(state, head, classifier=CLASSIFIER, threshold=torch.full((2,), -torch.inf))
    assert settled.tolist() == [False, True]


@pytest.mark.parametrize(
    "changes",
    [
        {"head_bias": torch.zeros(7)},
        {"classifier": torch.zeros(2)},
        {"threshold": torch.zeros(3)},
        {"head_weight": torch.zeros(8, 5)},
        {"head_weight": torch.zeros(1, 4)},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_shapes_that_do_not_fit_are_refused(changes):
    fitting = {
        "readout": torch.zeros(2, 4),
        "head_weight": torch.zeros(8, 4),
        "classifier": torch.zeros(3),
        "threshold": torch.zeros(2),
    }
    with pytest.raises(ValueError, match="must have the shape"):
        settle(**{**fitting, **changes})
