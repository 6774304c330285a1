"""Recall and precision by label in a report, beside scikit-learn's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import precision_score, recall_score

from tests.tiny import tiny_config
from tests.unit.test_label_bounds import config_with, promised
from vllm_adainfer.artifact.fields import Choice
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.by_label import label_rows
from vllm_adainfer.offline.reports.evaluation_facts import facts_of_labels

ROWS = 300
GENERATOR = np.random.default_rng(0)
FULL = GENERATOR.integers(0, 2, ROWS)
EARLY = np.where(GENERATOR.random(ROWS) < 0.1, 1 - FULL, FULL)
RIGHT = np.where(GENERATOR.random(ROWS) < 0.2, 1 - FULL, FULL)
CHOICES = (
    Choice(text="no", token_ids=(3, 9), first_tokens=(3,)),
    Choice(text="yes", token_ids=(7,), first_tokens=(7,)),
)


def rows_of(config: Any, texts: Any, labelled: bool = True) -> list[dict[str, Any]]:
    """`texts` are the tokens of both answers, and what the data calls them."""
    examples = [Example("here", "", [1], texts[right][1] if labelled else None) for right in RIGHT]
    early, full = ([[*texts[one][0]] for one in ones] for ones in (EARLY, FULL))
    return label_rows(config, examples, np.arange(ROWS), early, full)


def check(rows: list[dict[str, Any]]) -> None:
    for label, row in enumerate(rows):
        for name, wanted in (("", FULL), ("true_", RIGHT)):
            for kind, score in (("recall", recall_score), ("precision", precision_score)):
                value, of = row[f"{name}{kind}"], wanted if kind == "recall" else EARLY
                assert value == pytest.approx(score(wanted == label, label == EARLY))
                interval = binomtest(round(value * (of == label).sum()), int((of == label).sum()))
                expected = interval.proportion_ci(0.95, method="exact")
                assert row[f"{name}{kind}_95"] == pytest.approx((expected.low, expected.high))
        counts = [int((ones == label).sum()) for ones in (FULL, EARLY, RIGHT)]
        assert [row["full_depth"], row["answered"], row["right"]] == counts


@pytest.mark.parametrize("name", ["name", "token_id"], ids=["of a row", "of a request"])
def test_the_rows_of_labels_are_scikit_learns(tiny_model, name):
    """The data has a row's right label by its name, and that of a request by its token."""
    config = tiny_config(tiny_model)
    rows = rows_of(config, [((one.token_id,), str(getattr(one, name))) for one in config.labels])
    assert [row["label"] for row in rows] == [label.name for label in config.labels]
    check(rows)


def test_a_choice_counts_as_a_whole(tiny_model):
    labels = tiny_config(tiny_model).labels
    labels = tuple(
        one.model_copy(update={"name": choice.text, "token_id": choice.first_tokens[0]})
        for one, choice in zip(labels, CHOICES, strict=True)
    )
    config = tiny_config(tiny_model, choices=CHOICES, labels=labels)
    rows = rows_of(config, [(choice.token_ids, choice.text) for choice in CHOICES])
    assert [row["label"] for row in rows] == ["no", "yes"]
    check(rows)


def test_prompts_without_labels_have_no_true_recall_and_missing_answers_no_share(tiny_model):
    config = tiny_config(tiny_model)
    texts = [((one.token_id,), one.name) for one in config.labels]
    assert not any("true_recall" in row for row in rows_of(config, texts, labelled=False))
    examples = [Example("here", "", [1], None)] * 3
    bad, good = ([[label.token_id]] * 3 for label in config.labels)
    rows = label_rows(config, examples, np.arange(3), bad, good)
    assert [(row["recall"], row["precision"]) for row in rows] == [(None, 0.0), (0.0, None)]
    bad, good = facts_of_labels(rows)[0].rows
    assert (bad["recall"], good["precision"]) == ("-", "-")


@pytest.mark.parametrize(
    ("epsilon", "said"), [(0.2, "within"), (0.06, "compatible with"), (0.01, "above")]
)
def test_what_changes_is_held_against_what_is_promised(tiny_model, epsilon, said):
    bounds = (promised("recall", "bad", epsilon), promised("precision", "good", epsilon))
    config = config_with(tiny_model, label_bounds=bounds)
    bad, good = rows_of(config, [((one.token_id,), one.name) for one in config.labels])
    assert 0.06 < 1 - bad["recall"] < 0.15
    assert 0.06 < 1 - good["precision"] < 0.15
    assert bad["verdicts"] == {"recall": f"{said} the bound of {epsilon:.1%}"}
    assert good["verdicts"] == {"precision": f"{said} the bound of {epsilon:.1%}"}
    assert facts_of_labels([bad, good])[0].rows[0]["promised"] == f"recall {said.split()[0]}"


def test_a_verdict_is_about_the_same_pass_where_that_was_compared(tiny_model):
    bounds = promised("recall", "bad", 0.01), promised("precision", "good", 0.01)
    config = config_with(tiny_model, label_bounds=bounds)
    examples = [Example("here", "", [1], None)] * ROWS
    ids = [[one.token_id] for one in config.labels]
    early, full = ([ids[one] for one in ones] for ones in (EARLY, FULL))
    counted = {"recall of bad": (150, 1), "precision of good": (0, 0)}
    bad, good = label_rows(config, examples, np.arange(ROWS), early, full, counted)
    assert bad["verdicts"] == {"recall": "within the bound of 1.0%"}
    assert bad["recall"] < 0.95  # between two passes
    assert good["verdicts"] == {"precision": "above the bound of 1.0%"}
