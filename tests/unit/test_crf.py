from __future__ import annotations

import numpy as np
import pytest
import torch
from adainfer_kernels import Head
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from tests.chain import log_odds, log_sum, potentials
from vllm_adainfer.offline.calibration.fit.chain import fit_crf_chain
from vllm_adainfer.offline.calibration.fit.classifier import fit_crf
from vllm_adainfer.offline.calibration.fit.exits import FittedExit, Scored
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.score import score


def chains(count: int, exits: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Rows whose state seldom changes from one exit point to the next; features say it faintly."""
    generator = np.random.default_rng(seed)
    settled = np.empty((count, exits), dtype=bool)
    settled[:, 0] = generator.random(count) < 0.5
    for index in range(1, exits):
        changes = generator.random(count) < np.where(settled[:, index - 1], 0.02, 0.15)
        settled[:, index] = settled[:, index - 1] ^ changes
    gap = np.clip(0.4 + 0.2 * settled + 0.25 * generator.standard_normal((count, exits)), 0, 1)
    top_prob = gap + (1 - gap) * generator.random((count, exits)) / 2
    return torch.tensor(np.stack([top_prob, gap], axis=-1)).float(), settled


def filtered(features: Tensor, steps: list[Tensor]) -> Tensor:
    """Scores [rows, exit points], each given the exit points so far."""
    found: list[Tensor] = []
    for index, step in enumerate(steps):
        found.append(score(features[:, index], step, found[-1] if found else None))
    return torch.stack(found, dim=1)


def penalised_loss(features: np.ndarray, settled: np.ndarray, steps: np.ndarray) -> float:
    """What the fit minimises: of all prefixes, by counting sequences."""
    loss = float((steps**2).sum()) / 200
    for row, states in zip(features, settled.astype(int), strict=True):
        for length in range(1, len(states) + 1):
            found = potentials(row[:length], steps)
            loss += log_sum(list(found.values())) - found[tuple(states[:length])]
    return loss


@pytest.mark.parametrize("exits", [1, 2, 5])
def test_the_score_is_the_log_odds_over_all_sequences_of_states_so_far(exits):
    features, _ = chains(20, exits, seed=1)
    steps = 2 * torch.randn(exits, 7, generator=torch.Generator().manual_seed(2))
    found = filtered(features, list(steps))
    for row in range(20):
        for last in range(exits):
            expected = log_odds(features[row, : last + 1].numpy(), steps[: last + 1].numpy())
            assert found[row, last].item() == pytest.approx(expected, abs=1e-4)


def test_no_change_of_a_weight_makes_the_chains_likelier():
    features, settled = chains(40, 3, seed=3)
    x = features.double().numpy()
    steps = torch.stack(fit_crf(features, settled)).double().numpy()
    best = penalised_loss(x, settled, steps)
    for change in 0.02 * np.concatenate([np.eye(21), -np.eye(21)]):
        assert penalised_loss(x, settled, steps + change.reshape(3, 7)) > best


def test_a_chain_of_one_exit_point_is_logistic_regression():
    features, settled = chains(300, 1, seed=4)
    x = np.column_stack([features[:, 0].double().numpy(), np.ones(300)])
    model = LogisticRegression(C=100.0, fit_intercept=False, tol=1e-8).fit(x, settled[:, 0])
    [step] = fit_crf(features, settled)
    np.testing.assert_allclose(
        score(features[:, 0], step, None).numpy(), model.decision_function(x), atol=1e-3
    )


def test_a_chain_foretells_better_than_each_exit_point_alone():
    features, settled = chains(600, 4, seed=5)
    unseen, truth = chains(2000, 4, seed=6)
    odds = filtered(unseen, fit_crf(features, settled)).double().numpy()
    for index in range(1, 4):
        alone = LogisticRegression(C=100.0).fit(features[:, index].numpy(), settled[:, index])
        loss_alone = log_loss(truth[:, index], alone.predict_proba(unseen[:, index].numpy())[:, 1])
        loss = log_loss(truth[:, index], 1 / (1 + np.exp(-odds[:, index])))
        assert loss < 0.95 * loss_alone


@pytest.mark.parametrize("state", [True, False])
def test_an_exit_point_with_one_state_only_has_a_sure_and_finite_score(state):
    features, settled = chains(100, 3, seed=7)
    settled[:, 1] = state
    odds = filtered(features, fit_crf(features, settled))[:, 1]
    assert odds.isfinite().all()
    assert ((odds > 2) if state else (odds < -2)).all()


def test_chosen_exit_points_are_chained_on_both_halves():
    halves = [chains(80, 3, seed) for seed in (8, 9)]
    exits = [
        FittedExit(
            layer,
            Probe(Head(torch.zeros(2, 4))),
            torch.zeros(3),
            *(
                Scored(
                    features=features[:, index],
                    tokens=(~settled[:, index]).astype(np.int64),
                    full=np.zeros(80, dtype=np.int64),
                    loss=(~settled[:, index]).astype(float),
                    score=torch.zeros(80),
                )
                for features, settled in halves
            ),
        )
        for index, layer in enumerate((3, 6, 9))
    ]
    chained = fit_crf_chain(exits, Target("label-head", torch.tensor([0, 1])))
    steps = fit_crf(*halves[0])
    for half, (features, settled) in zip(("fitted", "held_out"), halves, strict=True):
        found = [getattr(fitted, half) for fitted in chained]
        assert torch.equal(torch.stack([s.score for s in found], 1), filtered(features, steps))
        assert np.array_equal(np.stack([s.agrees for s in found], 1), settled)
    assert [fitted.layer for fitted in chained] == [3, 6, 9]
    assert torch.equal(torch.stack([fitted.classifier for fitted in chained]), torch.stack(steps))
