"""Gates: on which side of a number a probability lies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import pad

from tests.tiny import tiny_config
from tests.unit.readings import outcomes
from vllm_adainfer.artifact.requested import Form, Output
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.evaluation.promised import promised_rows
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.reports import figures
from vllm_adainfer.offline.reports.evaluation_facts import facts_of_gates
from vllm_adainfer.promise.gates import FURTHEST, Gate, Gates

GATES = (
    Gate(label="a", probability=0.8),
    Gate(label="c", probability=0.05),
    Gate(probability=0.6),
)
SINGLE = pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.label}:{gate.probability}")


def scores_of(rows: int, seed: int, unnamed: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(rows, 3, generator=generator)
    if unnamed:  # some rows are about two of the labels
        scores[::5, 2] = -torch.inf
        scores[1::5, 0] = -torch.inf
    return scores


def probability(scores: torch.Tensor, gate: Gate) -> torch.Tensor:
    """Of the gate's label, by its definition."""
    among = scores.double().softmax(dim=1)
    return among.amax(dim=1) if gate.label is None else among[:, "abc".index(gate.label)]


@SINGLE
def test_a_margin_is_the_distance_of_the_log_odds(gate):
    scores = scores_of(200, 0)
    found = Gates(gates=(gate,)).about("abc").margins(scores).squeeze(1).double()
    odds = torch.logit(probability(scores, gate)) - math.log(
        gate.probability / (1 - gate.probability)
    )
    torch.testing.assert_close(found, odds, atol=1e-4, rtol=1e-4)
    shifted = (
        Gates(gates=(gate,)).about("abc").margins(scores + torch.randn(200, 1)).squeeze(1).double()
    )
    torch.testing.assert_close(shifted, odds, atol=1e-4, rtol=1e-4)


@SINGLE
def test_an_answer_is_wrong_on_the_other_side_of_a_gate(gate):
    early, full = scores_of(400, 1), scores_of(400, 1) + scores_of(400, 2, unnamed=False)
    below, above = (probability(one, gate) >= gate.probability for one in (early, full))
    expected = below != above
    if gate.label is None:
        expected |= above & (early.argmax(dim=1) != full.argmax(dim=1))
    found = Gates(gates=(gate,)).about("abc").wrong(*outcomes(early, full))
    assert torch.equal(found, expected)
    assert 0.05 < found.double().mean() < 0.95


def test_of_several_gates_one_on_the_other_side_is_enough():
    early, full = scores_of(400, 1), scores_of(400, 2, unnamed=False)
    each = [Gates(gates=(gate,)).about("abc").wrong(*outcomes(early, full)) for gate in GATES]
    assert torch.equal(
        Gates(gates=GATES).about("abc").wrong(*outcomes(early, full)), torch.stack(each).any(dim=0)
    )


def test_a_classifier_reads_the_nearest_gates_distance_and_side():
    scores, gates = scores_of(100, 3), Gates(gates=GATES).about("abc")
    for margins, (distance, side) in zip(
        gates.margins(scores).tolist(), gates.features(pad(scores, (0, 1))).tolist(), strict=True
    ):
        nearest = min((max(-FURTHEST, min(FURTHEST, one)) for one in margins), key=abs)
        assert (distance, side) == (abs(nearest), nearest)


def config_with(model, *gates: Gate, **changes):
    return tiny_config(model, **{"risk": "probability", "gates": gates, **changes})


BAD = Gate(label="bad", probability=0.8)


def test_a_gate_is_read_as_a_label_or_best_and_a_number():
    assert Gates.asked(["bad:0.8", "a:b:0.5", "best:0.9"]).gates == (
        BAD,
        Gate(label="a:b", probability=0.5),
        Gate(probability=0.9),
    )


@pytest.mark.parametrize("text", ["", "bad", ":0.5", "bad:", "bad:0", "bad:1", "bad:2", "bad:nan"])
def test_a_gate_that_cannot_be_read_is_refused(text):
    with pytest.raises(AdaInferError, match=f"--gate '{text}' must be a label, or best, and a pro"):
        Gates.asked([text])


@pytest.mark.parametrize(
    ("gates", "tokens"),
    [
        ([BAD], False),
        ([Gate(probability=0.5)], False),
        ([Gate(label="bad", probability=0.5)], True),
        ([BAD, Gate(label="good", probability=0.5)], True),
    ],
    ids=["no", "of the best", "yes", "one of two"],
)
def test_probabilities_are_served_and_the_label_alone_only_where_a_gate_decides_it(
    tiny_model, gates, tokens
):
    config = config_with(tiny_model, *gates)
    served = {
        kind: Output(kind, frozenset(config.label_ids)).is_promised_by(config) for kind in Form
    }
    assert served == {
        Form.TOKEN: tokens,
        Form.CHOICE: False,
        Form.AMONG_LABELS: True,
        Form.IN_VOCABULARY: True,
        Form.SCORES: False,
        Form.OBJECT: False,
        Form.OBJECT_PROBABILITIES: False,
    }


def test_what_is_wrong_is_said_of_each_gate(tiny_model):
    assert config_with(tiny_model, BAD, Gate(probability=0.9)).promise.words() == (
        "the probability of bad among the labels on the other side of 0.8 than at full depth or "
        "the best label's probability among the labels on the other side of 0.9 than at full "
        "depth, or another best label where full depth's is above"
    )


def test_evaluate_counts_by_gate_and_the_page_shows_both_probabilities(tiny_model):
    config, rows = config_with(tiny_model, BAD, Gate(probability=0.6)), 200
    full = np.log(np.random.default_rng(0).dirichlet([1, 1], rows)).astype(np.float32)
    early = full + np.random.default_rng(1).normal(0, 0.3, (rows, 2)).astype(np.float32)
    strict, ours = (level.epsilon for level in config.levels)

    def run(logprobs: np.ndarray) -> Run:
        return Run(1.0, [[1]] * rows, logprobs=logprobs)

    rounds = [(run(full), {NEVER_EXIT: run(full), strict: run(full), ours: run(early)})]
    found = promised_rows(config, [], np.arange(rows), rounds)["gates"]
    assert [one["label"] for one in found["gates"]] == ["bad", "the best label"]
    assert found["stock"]["wrong"] == found["levels"][0]["wrong"] == 0
    level, sides = found["levels"][1], []
    among, wanted = (np.exp(one) / np.exp(one).sum(1, keepdims=True) for one in (early, full))
    sides.append((among[:, 0] >= 0.8) != (wanted[:, 0] >= 0.8))
    above = wanted.max(1) >= 0.6
    another = among.argmax(1) != wanted.argmax(1)
    sides.append(((among.max(1) >= 0.6) != above) | (above & another))
    assert [one["differs"] for one in level["gates"]] == [side.mean() for side in sides]
    assert level["wrong"] == (sides[0] | sides[1]).mean()
    assert 0 < level["wrong"] < 0.5
    assert "bad at 0.8" in facts_of_gates(found)[0].rows[0]
    panels = figures.gates({"gates": found}, 1)
    assert [panel["title"] for panel in panels] == [
        "Probability of bad, with a gate at 0.8",
        "Probability of the best label, with a gate at 0.6",
    ]
    [(x, y)] = [panels[0]["points"][1]]
    np.testing.assert_allclose(x, wanted[:, 0], atol=1e-4)
    np.testing.assert_allclose(y, among[:, 0], atol=1e-4)
    assert figures.gates({}, 0) == []
