"""What a policy for probabilities says of itself: at start-up and in its card."""

from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import tiny_config
from vllm_adainfer.artifact.promise import wrong_in_words
from vllm_adainfer.engine.startup.banner import policy_banner
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.write.card import model_card
from vllm_adainfer.settings.engine import Settings

DETAILS: dict[str, Any] = {
    "rows": 401,
    "rows_fitted": 200,
    "rows_held_out": 201,
    "seed": 4,
    "majority_share": 0.61,
    "agreement": {"2": 0.9, "4": 0.95},
    "provenance": {"versions": {"torch": "2"}, "cpu": "a CPU"},
}


def probability(model: Any, **changes: Any) -> Any:
    return tiny_config(model, **{"risk": "probability", "tolerance": 0.05, **changes})


UNCERTIFIED = (
    "the label mass is not certified, so requests for probabilities in the whole vocabulary run at "
    "full depth"
)


@pytest.mark.parametrize(
    ("mass", "mode", "served"),
    [
        (True, "raw_logprobs", " and for their probabilities in the whole vocabulary"),
        (
            True,
            "processed_logprobs",
            " and for their probabilities, in the whole vocabulary or among the labels",
        ),
        (
            False,
            "processed_logprobs",
            f" and for their probabilities among the labels ({UNCERTIFIED})",
        ),
        (
            False,
            "raw_logprobs",
            f", but not for probabilities: {UNCERTIFIED}, and those among the labels alone need "
            "--logprobs-mode processed_logprobs",
        ),
        (
            True,
            "raw_logits",
            ", but not for probabilities, which --logprobs-mode raw_logits does not return",
        ),
    ],
)
def test_the_start_up_line_says_which_probabilities_are_served_and_within_what_bound(
    tiny_model, mass, mode, served
):
    config = probability(tiny_model, label_mass=mass)
    line = policy_banner("mood", config, Settings(artifact="policy"), mode)
    assert f"for greedy requests for one token among bad, good{served}, at most 0.05 of" in line
    wrong = wrong_in_words(config)
    assert f"at most 0.05 of the answers wrong (confidence 90%; wrong: {wrong}), 20% of" in line
    assert line.endswith("kv exact, shadow rate 0")


def test_with_epsilon_0_the_start_up_line_promises_nothing(tiny_model):
    config = probability(tiny_model, label_mass=True)
    line = policy_banner("mood", config, Settings(artifact="policy", epsilon=0))
    assert "probabilities in the whole vocabulary; epsilon is 0, so no request exits" in line
    assert "wrong" not in line


def test_the_card_says_what_is_wrong_and_whether_the_label_mass_is_certified(tiny_model):
    config = probability(tiny_model, label_mass=True)
    card, plain = (
        " ".join(model_card(one, DETAILS).split()) for one in (config, small(tiny_model))
    )
    assert "| tolerance | 0.05 |" in card
    assert "| certified: probabilities in the whole vocabulary are served, too |" in card
    assert f"the share of wrong answers ({wrong_in_words(config)}) is at most epsilon" in card
    assert "| not certified: only probabilities among the labels are served |" in plain


def small(model: Any) -> Any:
    return probability(model, label_mass=False)


def test_the_card_of_another_policy_knows_no_tolerance(tiny_model):
    card = model_card(tiny_config(tiny_model), DETAILS)
    assert "tolerance" not in card
    assert "label mass" not in card


@pytest.mark.parametrize("max_tokens", [1, 16])
def test_the_card_says_that_bounds_hold_one_by_one_and_after_which_text(tiny_model, max_tokens):
    own = {"probe": "lens", "candidates": "shortlist", "labels": ()} if max_tokens > 1 else {}
    card = model_card(tiny_config(tiny_model, max_tokens=max_tokens, **own), DETAILS)
    assert "Each epsilon holds by itself" in card
    assert ("Served tokens follow text with early tokens in it" in card) == (max_tokens > 1)


@pytest.mark.parametrize("bound", ["auto", "exact", "wsr"])
def test_a_wrong_answer_is_bounded_as_a_changed_one_is(bound):
    changed = Bound.promised(PolicyOptions(bound=bound))
    wrong = Bound.promised(PolicyOptions(bound=bound, risk="probability", tolerance=0.05))
    assert wrong == changed
    assert (bound != "auto") or wrong.kind == "exact"
