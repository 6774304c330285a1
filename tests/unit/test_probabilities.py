"""What is read of labels' probabilities, and what vLLM makes of the logits that carry them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_adainfer.promise.label_subsets import restrict
from vllm_adainfer.promise.probabilities import (
    MOVES,
    PROBABILITY_FEATURES,
    LabelProbabilities,
    answers_of,
    features_of,
    probabilities_of_logits,
    probabilities_of_scores,
)

VOCABULARY = 49152
SCORE = st.floats(-60, 60, width=32)
SCORES = st.integers(2, 26).flatmap(
    lambda labels: st.lists(
        st.lists(SCORE, min_size=labels + 1, max_size=labels + 1), min_size=1, max_size=4
    )
)
CLOSE = 5e-4  # fp32 sums over the vocabulary


def logits_of(
    scores: torch.Tensor, label_ids: torch.Tensor, vocabulary: int | None
) -> torch.Tensor:
    """The row that vLLM's sampler sees of an early answer."""
    answers = answers_of(scores, vocabulary)
    logits = answers[:, -1:].repeat(1, VOCABULARY)
    labels, rest = answers[:, :-1], answers[:, -1:]
    logits[:, label_ids] = torch.where(labels.isneginf(), rest, labels)
    return logits


@pytest.mark.parametrize("with_mass", [True, False])
@given(rows=SCORES, data=st.data())
def test_vllm_returns_the_probabilities_that_were_read(with_mass, rows, data):
    """Also of requests that name some labels of a pool alone."""
    scores = torch.tensor(rows)
    labels = scores.shape[1] - 1
    ids = st.lists(st.integers(0, VOCABULARY - 1), min_size=labels, max_size=labels, unique=True)
    label_ids = torch.tensor(data.draw(ids))
    own = torch.tensor(data.draw(st.lists(st.booleans(), min_size=labels, max_size=labels)))
    own |= torch.arange(labels) < 2  # a request names two labels at least
    scores = restrict(scores, own.expand(len(scores), -1))
    vocabulary = VOCABULARY if with_mass else None
    logprobs = logits_of(scores, label_ids, vocabulary).log_softmax(dim=-1, dtype=torch.float32)
    probabilities = logprobs.exp()
    read = probabilities_of_scores(scores)
    assert not probabilities.isnan().any()
    assert (probabilities >= 0).all()
    assert (probabilities <= 1 + CLOSE).all()
    mass = read.mass if with_mass else torch.ones(len(scores))
    of_labels = probabilities[:, label_ids[own]]
    torch.testing.assert_close(of_labels.sum(1), mass, atol=CLOSE, rtol=0)
    torch.testing.assert_close(of_labels, read.among[:, own] * mass[:, None], atol=CLOSE, rtol=0)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(len(scores)), atol=CLOSE, rtol=0)


@given(rows=SCORES)
def test_features_are_finite_and_those_of_the_probabilities(rows):
    scores = torch.tensor(rows)
    found = features_of(scores)
    assert found.isfinite().all()
    exact = scores[:, :-1].double().softmax(dim=1)
    best = exact.topk(2).values
    expected = {
        "top_logit": best[:, 0].log() - (1 - best[:, 0]).log(),
        "gap": best[:, 0] - best[:, 1],
        "mass_logit": scores[:, -1].double(),
    }
    for column, name in enumerate(PROBABILITY_FEATURES):
        where = expected[name].abs() < 20  # beyond, 1 - p has no digits left in the oracle
        torch.testing.assert_close(
            found[where, column].double(), expected[name][where], atol=1e-4, rtol=1e-4
        )


def test_the_best_labels_of_a_tie_have_even_odds():
    [tied, three] = features_of(torch.tensor([[1.0, 1.0, -9.0, 3.0], [2.0, 2.0, 2.0, 0.0]]))
    assert tied.tolist() == pytest.approx([0.0, 0.0, 3.0], abs=1e-4)
    assert three.tolist() == pytest.approx([-np.log(2), 0.0, 0.0], abs=1e-6)


def test_logits_are_read_as_vllm_returns_them():
    logits = torch.randn(9, 100, generator=torch.Generator().manual_seed(0)) * 4
    labels = torch.tensor([40, 3, 77])
    read = probabilities_of_logits(logits, labels)
    whole = logits.double().softmax(dim=1)[:, labels]
    torch.testing.assert_close(read.mass.double(), whole.sum(1), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        read.among.double(), whole / whole.sum(1, keepdim=True), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("among", "mass", "moved", "moved_with_mass"),
    [
        ([0.6, 0.4], 1.0, 0.0, 0.0),
        ([0.7, 0.3], 1.0, 0.1, 0.1),
        ([0.6, 0.4], 0.8, 0.0, 0.2),
        ([0.7, 0.3], 0.9, 0.1, 0.13),
        ([0.5, 0.5], 0.7, 0.1, 0.3),
    ],
)
def test_the_largest_move_is_over_all_that_is_promised(among, mass, moved, moved_with_mass):
    full = LabelProbabilities(torch.tensor([[0.6, 0.4]]), torch.tensor([1.0]))
    early = LabelProbabilities(torch.tensor([among]), torch.tensor([mass]))
    for with_mass, expected in ((False, moved), (True, moved_with_mass)):
        assert early.largest_move(full, with_mass).item() == pytest.approx(expected, abs=1e-6)
        assert full.largest_move(early, with_mass).item() == pytest.approx(expected, abs=1e-6)


def test_a_move_of_a_probability_in_the_vocabulary_counts_where_the_others_cancel():
    """0.8 x 0.9 against 0.9 x 0.8 are equal; 0.8 x 0.8 against 0.9 x 0.9 are 0.17 apart."""
    full = LabelProbabilities(torch.tensor([[0.8, 0.2]]), torch.tensor([0.8]))
    early = LabelProbabilities(torch.tensor([[0.9, 0.1]]), torch.tensor([0.9]))
    assert early.largest_move(full, with_mass=True).item() == pytest.approx(0.17, abs=1e-6)


def test_the_buckets_of_moves_ascend_to_one():
    assert sorted(set(MOVES)) == list(MOVES)
    assert MOVES[-1] == 1
