"""What is said of an artifact: one list of facts, the same words at start-up, in text and card."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests import student
from tests.objects import SCHEMA, object_config, two_fields
from tests.tiny import tiny_config
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import Label, LabelBound, LabelRisk, Level, SharedTokens
from vllm_adainfer.artifact.outputs import Value
from vllm_adainfer.artifact.words import promise_in_words
from vllm_adainfer.engine.startup.banner import policy_banner
from vllm_adainfer.offline.calibration.write.card import model_card
from vllm_adainfer.offline.facts.artifact import artifact_facts
from vllm_adainfer.offline.facts.document import Table, as_markdown, as_text
from vllm_adainfer.promise.first_documents import FirstDocuments
from vllm_adainfer.promise.gates import Gate
from vllm_adainfer.settings.engine import Settings

DETAILS: dict[str, Any] = {
    "rows": 401,
    "rows_fitted": 200,
    "rows_held_out": 201,
    "prompts": 50,
    "seed": 4,
    "majority_share": 0.61,
    "exit_points": [
        {"layer": 2, "leaving": 0.25, "agreement": 0.9, "probe_bytes": 520, "probe_cost": 0.5},
        {"layer": 3, "leaving": 0.5, "agreement": 0.95, "probe_bytes": 3 << 20, "probe_cost": 2.0},
    ],
    "agreement": {"2": 0.9, "4": 0.95},
    "risk_curve": [
        {"layers_saved": 0.02 * n, "risk": 0.001 * n, "bound": 0.002 * n} for n in range(20)
    ],
    "provenance": {"versions": {"torch": "2"}, "cpu": "a CPU"},
}
PROBABILITY: dict[str, Any] = {"risk": "probability", "tolerance": 0.05}
TEXT: dict[str, Any] = {"probe": "lens", "candidates": "shortlist", "labels": (), "max_tokens": 16}
GATES: dict[str, Any] = {"risk": "probability", "gates": (Gate(label="bad", probability=0.8),)}
RERANKER: dict[str, Any] = {
    "architecture": "LlamaForSequenceClassification",
    "score_head": "sigmoid",
    "labels": (Label(name="no", token_id=0), Label(name="yes", token_id=1)),
    "risk": "probability",
    "top_k": FirstDocuments(k=5, margin=0.05),
}
ABOUT_LABELS: dict[str, Any] = {
    "label_bounds": (LabelBound(kind="recall", label="bad", epsilon=0.1),),
    "never_early": ("good",),
}
VALUES = tuple(Value(text=str(number), written=(7,)) for number in range(20))
SHARED = SharedTokens(start=(1, 2), end=(3,))


def level(epsilon: float, saved: float, **changes: Any) -> Level:
    found = {"disagreement": 0.003, "risk": -0.001, "bound": epsilon / 2, **changes}
    return Level(epsilon=epsilon, layers_saved=saved, **found)


def table_with(config: ArtifactConfig, column: str, **details: Any) -> Table:
    blocks = artifact_facts(config, {**DETAILS, **details})
    [table] = [one for one in blocks if isinstance(one, Table) and column in one.rows[0]]
    return table


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({}, {"candidates": "bad (447), good (999)", "classifier": "svm on top_prob, gap"}),
        ({}, {"calibrated": "on 401 prompts, 201 of them held out for the bound; seed 4"}),
        ({}, {"majority baseline": "61.0% agreement"}),
        ({}, {"bound": "epsilon 0.05 at delta 0.1 on disagreement (exact)"}),
        ({}, {"promise": "at most 5 % of the answers changed (confidence 90%)"}),
        (TEXT, {"calibrated": "on 401 tokens of 50 prompts, 201 of them held out for the bound; "
                "seed 4", "candidates": "shortlist of the vocabulary"}),
        ({"risk": "accuracy"}, {"promise": "at most 5 points of accuracy lost (confidence 90%)"}),
        (ABOUT_LABELS, {"promise": "at most 5 % of the answers changed (confidence 90%; at most 10 "
                        "% of the requests that full depth answers with bad are answered "
                        "otherwise; no early answer is good: such requests run all layers)"}),
        ({"label_pool": True}, {"serves": "requests for one token among two or more of bad, good"}),
        (RERANKER, {"serves": "requests for the score of a prompt, its probability of yes"}),
        ({"shared": SHARED}, {"prompts": "that begin with the same 2 tokens and end with the same "
                              "1 tokens, as all those of the calibration do; others run all "
                              "layers"}),
    ],
)  # fmt: skip
def test_the_facts_say_what_a_policy_is_for_and_what_it_promises(tiny_model, changes, facts):
    changes = {"levels": (level(0.05, 0.2),), **changes}
    if "label_bounds" in changes:
        risks = (LabelRisk(rows=30, risk=0.02, bound=0.09),)
        changes["levels"] = (level(0.05, 0.2, label_risks=risks),)
    found = artifact_facts(tiny_config(tiny_model, **changes), DETAILS)[0]
    assert facts.items() <= found.items()


@pytest.mark.parametrize("changes", [{**PROBABILITY, "label_mass": True}, PROBABILITY, GATES])
@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits"])
def test_start_up_line_text_and_card_use_the_same_words(tiny_model, changes, mode):
    config = tiny_config(tiny_model, **changes)
    line = policy_banner("mood", config, Settings(artifact="policy"), mode)
    promise = promise_in_words(config, config.epsilon)
    found = artifact_facts(config, DETAILS)[0]
    assert promise == (
        f"at most 5 % of the answers wrong (confidence 90%; wrong: {config.promise.words()})"
    )
    assert f", {promise}, 20% of layers saved in calibration" in line
    assert line.endswith("kv exact, shadow rate 0")
    assert found["promise"] == promise
    assert (found["probabilities"] in line) == (mode != "raw_logits")
    assert f"- **promise**: {promise}\n" in model_card(config, DETAILS)
    certified = config.promise.serves_probabilities(in_vocabulary=True)
    assert ("the label mass is not certified, so" in found["probabilities"]) != certified
    if mode == "raw_logits":
        assert ", but not for probabilities, which --logprobs-mode raw_logits does not" in line


def test_with_epsilon_0_the_start_up_line_promises_nothing(tiny_model):
    config = tiny_config(tiny_model, **PROBABILITY)
    line = policy_banner("mood", config, Settings(artifact="policy", epsilon=0))
    assert line.endswith("; epsilon is 0, so no request exits unless it sets its own epsilon")
    assert "wrong" not in line


@pytest.mark.parametrize(
    ("levels", "risk", "words"),
    [
        (
            [level(0.02, 0.1), level(0.05, 0.25), level(0.1, 0.4)],
            "disagreement",
            "Requests will run 4.5 of 6 layers on average, 25% fewer, with at most 5 % of the "
            "answers changed (confidence 90%). At epsilon 0.1 they would run 40% fewer.",
        ),
        (
            [level(0.05, 0.25)],
            "accuracy",
            "Requests will run 4.5 of 6 layers on average, 25% fewer, with at most 5 points of "
            "accuracy lost (confidence 90%).",
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
    config = tiny_config(tiny_model, levels=tuple(levels), risk=risk)
    assert artifact_facts(config, DETAILS)[-1] == words


@pytest.mark.parametrize(
    ("several", "changes", "said"),
    [
        (True, {}, "Each epsilon holds by itself at confidence 90%, not all at once"),
        (False, {}, "The bound holds at confidence 90%."),
        (False, {}, "is one on the mean loss (exact), over the draw of the held-out prompts"),
        (False, TEXT, "Served tokens follow text with early tokens in it"),
        (False, TEXT, "Exits stop after 16 tokens"),
    ],
)
def test_text_and_card_say_what_the_bounds_cover(tiny_model, several, changes, said):
    levels = [level(0.02, 0.1)] * several + [level(0.05, 0.2)]
    config = tiny_config(tiny_model, levels=tuple(levels), **changes)
    assert said in as_text(artifact_facts(config, DETAILS))
    assert said in model_card(config, DETAILS)
    assert "Served tokens" not in model_card(tiny_config(tiny_model), DETAILS)


@pytest.mark.parametrize(
    ("changes", "risk"),
    [
        ({}, {}),
        ({"risk": "accuracy"}, {"accuracy lost": "-0.10%"}),
        (PROBABILITY, {"wrong answers": "-0.10%"}),
    ],
)
def test_each_level_has_a_row_with_the_risk_that_is_bounded(tiny_model, changes, risk):
    config = tiny_config(tiny_model, levels=(level(0.05, 0.2),), **changes)
    assert table_with(config, "epsilon").rows == [
        {
            "epsilon": "5 %",
            "disagreement, held out": "0.30%",
            **risk,
            "upper bound": "2.50%",
            "layers saved": "20.0%",
        }
    ]


def test_each_exit_point_has_a_row_of_who_leaves_and_what_its_probe_takes(tiny_model):
    rows = table_with(tiny_config(tiny_model), "exit point").rows
    assert [list(row.values()) for row in rows] == [
        ["2", "25.0%", "90.0%", "0.5 KiB", "0.50"],
        ["3", "50.0%", "95.0%", "3.0 MiB", "2.00"],
    ]


@pytest.mark.parametrize(("gain", "said"), [(0.1, "may save more"), (0.001, "will hardly save")])
def test_the_learning_curve_says_whether_more_prompts_would_pay(tiny_model, gain, said):
    curve = [{"prompts": 200, "layers_saved": 0.2}, {"prompts": 400, "layers_saved": 0.2 + gain}]
    blocks = artifact_facts(tiny_config(tiny_model), {**DETAILS, "learning_curve": curve})
    assert f"more prompts {said}" in blocks[-2]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        ({"calibration": 150.0}, ": about +2.6 points, at most 3 min more to calibrate."),
        ({"calibration": None}, ": about +2.6 points."),
    ],
)
def test_the_learning_curve_says_what_twice_as_many_prompts_would_bring_and_take(
    tiny_model, seconds, said
):
    """By the line through all three: the last step alone, + 2.2 points, may be chance."""
    saved = zip((212, 424, 848), (0.400, 0.430, 0.452), strict=True)
    curve = [{"prompts": prompts, "layers_saved": share} for prompts, share in saved]
    details = {**DETAILS, "prompts": 1500, "learning_curve": curve, "seconds": seconds}
    [plain] = [one for one in artifact_facts(tiny_config(tiny_model), details)
               if isinstance(one, str) and "Fitted on" in one]  # fmt: skip
    assert plain.endswith(f" 3000 prompts instead of 1500{said}")
    assert "by their heads" not in plain
    asked = {"exit_points": (0, 3), **student.asked_with(SHARED)}
    assert "the exit points save by their heads alone 40%, 43%, 45%" in as_text(
        artifact_facts(tiny_config(tiny_model, **asked), details)
    )


def test_the_card_has_front_matter_the_facts_and_how_often_the_probe_agrees(tiny_model):
    asked = {"exit_points": (0, 3), **student.asked_with(SHARED)}
    card = model_card(tiny_config(tiny_model, **asked), DETAILS)
    assert card.startswith("---\nbase_model: ")
    assert "\n- **student**: tiny-bert" in card
    assert "| 2     |     90.0% |\n| 4     |     95.0% |\n\n" in card
    assert card.endswith("\nMade with torch 2 on a CPU.\n")


DOCUMENT = ["A sentence.", {"model": "tiny"}, "", Table([{"label": "a|b", "share": "5 %"}], 1)]


def test_a_document_is_text():
    assert as_text(DOCUMENT) == (
        "A sentence.\n\nmodel  tiny\n\nlabel   share\n─────────────\na|b       5 %"
    )


def test_a_document_is_markdown():
    assert as_markdown(DOCUMENT) == (
        "A sentence.\n\n- **model**: tiny\n\n"
        "| label | share |\n|-------|-------|\n| a\\|b  |   5 % |"
    )


@pytest.mark.parametrize("lay_out", [as_text, as_markdown])
def test_nothing_in_a_table_is_wrapped_cut_coloured_or_read_as_markup(monkeypatch, lay_out):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    cell = f"{'word ' * 60}[bold]:smile: [0, 1]"
    [*_, last] = lay_out([Table([{"a": "1", "b": cell}])]).splitlines()
    assert cell in last
    assert "\x1b" not in last


def test_of_objects_the_fields_are_said_and_the_guess_and_the_card_has_a_request(tiny_model):
    many = two_fields().fields[0].model_copy(update={"path": "stars", "values": VALUES, "guess": 3})
    of_stars = two_fields().model_copy(update={"fields": (many, two_fields().fields[1])})
    config = object_config(tiny_model, output=of_stars)
    [facts, *_] = artifact_facts(config, DETAILS)
    assert "candidates" not in facts
    assert facts["field stars"] == "0, 1, 2, 3, 4, 5, 6, 7, ... (20)"
    assert facts["field seen"] == "false, true"
    assert facts["guess"] == "stars=3, seen=true (5 tokens)"
    assert facts["promise"].startswith("at most 5 % of the objects, in any field, changed")
    card = model_card(config, {**DETAILS, "schema": json.dumps(SCHEMA)})
    [body] = [part for part in card.split("```") if part.startswith("json\n")]
    asked = json.loads(body.removeprefix("json\n"))
    assert asked["response_format"]["json_schema"]["schema"] == SCHEMA
    assert "response_format" not in model_card(tiny_config(tiny_model), DETAILS)
