from __future__ import annotations

from typing import Any

import pytest

from tests.tiny import tiny_config
from vllm_adainfer.artifact.fields import Level
from vllm_adainfer.offline.reports.describe import describe

DETAILS: dict[str, Any] = {
    "rows": 401,
    "rows_held_out": 201,
    "seed": 4,
    "majority_share": 0.61,
    "exit_points": [
        {"layer": 2, "leaving": 0.25, "agreement": 0.9, "probe_bytes": 520, "probe_cost": 0.5},
        {"layer": 3, "leaving": 0.5, "agreement": 0.95, "probe_bytes": 3 << 20, "probe_cost": 2.0},
    ],
}


def level(epsilon: float, saved: float, risk: float = 0.001) -> Level:
    return Level(
        epsilon=epsilon, disagreement=0.003, risk=risk, bound=epsilon / 2, layers_saved=saved
    )


def test_nothing_is_wrapped_or_coloured_at_a_narrow_width(tiny_model, monkeypatch):
    levels = [level(0.05, 0.2)]
    plain = lines(tiny_model, levels)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert lines(tiny_model, levels) == plain
    assert not any("\x1b" in line for line in plain)


def lines(tiny_model, levels: list[Level], **changes: Any) -> list[str]:
    config = tiny_config(tiny_model, levels=tuple(levels), **changes)
    return describe(config, DETAILS).splitlines()


@pytest.mark.parametrize(
    ("levels", "risk", "words"),
    [
        (
            [level(0.02, 0.1), level(0.05, 0.25), level(0.1, 0.4)],
            "disagreement",
            "Requests will run 4.5 of 6 layers on average, 25% fewer, and change at most 5 % of "
            "the answers (confidence 90%). At epsilon 0.1 they would run 40% fewer.",
        ),
        (
            [level(0.05, 0.25)],
            "accuracy",
            "Requests will run 4.5 of 6 layers on average, 25% fewer, and lose at most 5 points "
            "of accuracy (confidence 90%).",
        ),
        (
            [level(0.05, 0.0)],
            "disagreement",
            "Nothing is saved within this bound: all requests will run at full depth.",
        ),
    ],
)
def test_the_last_line_says_what_is_saved_at_what_bound_and_at_the_next_looser_one(
    tiny_model, levels, risk, words
):
    assert lines(tiny_model, levels, risk=risk)[-1] == words


def test_each_epsilon_of_a_table_is_said_to_hold_by_itself(tiny_model):
    several = "\n".join(lines(tiny_model, [level(0.02, 0.1), level(0.05, 0.2)]))
    assert "Each epsilon holds by itself at confidence 90%, not all at once" in several
    alone = "\n".join(lines(tiny_model, [level(0.05, 0.2)]))
    assert "The bound holds at confidence 90%." in alone


@pytest.mark.parametrize(("max_tokens", "said"), [(1, False), (16, True)])
def test_a_policy_for_text_says_after_which_text_and_for_how_many_tokens_it_is(
    tiny_model, max_tokens, said
):
    own = {"probe": "lens", "candidates": "shortlist", "labels": ()} if max_tokens > 1 else {}
    text = "\n".join(lines(tiny_model, [level(0.05, 0.2)], max_tokens=max_tokens, **own))
    assert ("Served tokens follow text with early tokens in it" in text) == said
    assert ("Exits stop after 16 tokens" in text) == said


def test_rows_seed_majority_and_bound_are_named(tiny_model):
    text = "\n".join(lines(tiny_model, [level(0.05, 0.2)]))
    assert "on 401 prompts, 201 of them held out for the bound; seed 4" in text
    assert "majority baseline  61.0 % agreement" in text
    assert "epsilon 0.05 at delta 0.1 on disagreement (exact)" in text


def test_each_exit_point_has_a_line_of_who_leaves_and_what_its_probe_takes(tiny_model):
    found = [line.split() for line in lines(tiny_model, [level(0.05, 0.2)])]
    assert ["2", "25.0%", "90.0%", "0.5", "KiB", "0.50"] in found
    assert ["3", "50.0%", "95.0%", "3.0", "MiB", "2.00"] in found


PROBABILITY: dict[str, Any] = {"risk": "probability", "tolerance": 0.05}


@pytest.mark.parametrize(
    ("mass", "wrong", "certified"),
    [
        (
            True,
            "another best label than full depth's, or a label's probability (among the labels or "
            "in the whole vocabulary) that moves by more than 0.05",
            "certified: requests for probabilities in the whole vocabulary may exit, too",
        ),
        (
            False,
            "another best label than full depth's, or a label's probability that moves by more "
            "than 0.05",
            "not certified: requests for probabilities in the whole vocabulary run all layers",
        ),
    ],
)
def test_a_policy_for_probabilities_says_what_is_wrong_and_whether_the_mass_is_certified(
    tiny_model, mass, wrong, certified
):
    found = lines(tiny_model, [level(0.05, 0.25)], label_mass=mass, **PROBABILITY)
    facts = dict(line.split(maxsplit=1) for line in found[:10] if " " in line)
    assert facts["bound"] == "epsilon 0.05 at delta 0.1 on wrong answers (exact)"
    assert facts["wrong"] == wrong
    assert any(line.split() == ["label", "mass", *certified.split()] for line in found)
    assert found[-1] == (
        "Requests will run 4.5 of 6 layers on average, 25% fewer, and give at most 5 % wrong "
        f"answers: {wrong} (confidence 90%)."
    )


@pytest.mark.parametrize(
    ("risk", "line"),
    [
        ("disagreement", ["0.050", "0.30%", "2.50%", "20.0%"]),
        ("accuracy", ["0.050", "0.30%", "-0.10%", "2.50%", "20.0%"]),
    ],
)
def test_each_level_has_a_line_with_the_accuracy_lost_where_that_is_bounded(tiny_model, risk, line):
    found = lines(tiny_model, [level(0.05, 0.2, risk=-0.001)], risk=risk)
    assert line in [text.split() for text in found]


def test_each_level_of_a_policy_for_probabilities_has_disagreement_and_wrong_answers(tiny_model):
    found = [text.split() for text in lines(tiny_model, [level(0.05, 0.2, 0.01)], **PROBABILITY)]
    heads = [
        *("epsilon", "disagreement,", "held", "out", "wrong", "answers"),
        *("upper", "bound", "layers", "saved"),
    ]
    assert heads in found
    assert ["0.050", "0.30%", "1.00%", "2.50%", "20.0%"] in found
