"""Promises about single labels: recall, precision, and labels that no early answer is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.scored import SAFE, UNSAFE, safe_or_not
from tests.tiny import tiny_artifact, tiny_config
from tests.unit.readings import Compared, compare
from vllm_adainfer.artifact.fields import Label, LabelBound, LabelRisk, Level
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.artifact.scope import about_labels
from vllm_adainfer.cli.promises import label_bounds
from vllm_adainfer.engine.runner.build_loop import monitor_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.accounting.counters import PolicyStats
from vllm_adainfer.exits.loop.loop import Loop
from vllm_adainfer.exits.loop.shadow_objects import ShadowObjects
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import LabelTest, certify
from vllm_adainfer.offline.calibration.certify.path import PathPoint, threshold_path
from vllm_adainfer.offline.calibration.enough_rows import check_fields, check_labels, split_of
from vllm_adainfer.offline.calibration.fit.exits import Scored
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.policy import Policy
from vllm_adainfer.settings.engine import Settings
from vllm_adainfer.watch.units import ENDED_SINCE

DEPTH, LAYERS, ROWS = 10, (3, 6), 600
EPSILON, DELTA, RESAMPLES = 0.1, 0.1, 300
SETTINGS = Settings(artifact="policy")
GRID = [math.inf, *np.linspace(1, 0, 60).tolist()]
KINDS = pytest.mark.parametrize("kind", ["recall", "precision"])


def promised(kind: Any, label: str = "unsafe", epsilon: float = 0.08) -> LabelBound:
    return LabelBound(kind=kind, label=label, epsilon=epsilon)


@cache
def population(rows: int = 20_000) -> list[Scored]:
    """A sixth is unsafe; exits err less the surer they are, and more often about the unsafe."""
    generator = np.random.default_rng(0)
    full = np.where(generator.random(rows) < 1 / 6, UNSAFE, SAFE)
    return [safe_or_not(generator, full, worst) for worst in (0.4, 0.25)]


def label_check(promise: LabelBound, bound: Bound | None = None) -> LabelTest:
    return LabelTest(promise, UNSAFE, bound or Bound("exact", DELTA, 0.0))


def risk_of(promise: LabelBound, point: PathPoint) -> float:
    """The share of the population that the promise is about; straight from its definition."""
    about = {"recall": point.full, "precision": point.answers}[promise.kind] == UNSAFE
    return float(np.mean(point.answers[about] != point.full[about]))


@cache
def thresholds_drawn(kind: str) -> dict[str, list[PathPoint]]:
    """What is certified on rows drawn again and again, with the promise or without."""
    promise, everyone = promised(kind), population()
    true = {point.threshold: point for point in threshold_path(LAYERS, everyone, DEPTH, GRID)}
    bound = Bound.promised(PolicyOptions(delta=DELTA, label_bounds=(promise,)))
    generator = np.random.default_rng(1)
    found: dict[str, list[PathPoint]] = {"with": [], "without": []}
    for _ in range(RESAMPLES):
        drawn = generator.integers(0, len(everyone[0].full), ROWS)
        sample = [exit.of_rows(drawn) for exit in everyone]
        path = list(threshold_path(LAYERS, sample, DEPTH, GRID))
        for name, tests in (("with", [label_check(promise, bound)]), ("without", [])):
            point = certify(path, [EPSILON], bound, tests)[EPSILON]
            found[name].append(true[point.threshold])
    return found


def share_broken(promise: LabelBound, points: list[PathPoint]) -> float:
    """The share of draws in which the promise, or epsilon, is broken."""
    broken = [
        risk_of(promise, one) > promise.epsilon or one.disagreement > EPSILON for one in points
    ]
    return float(np.mean(broken))


@KINDS
def test_all_promises_hold_together_in_all_but_delta_of_the_draws(kind):
    """Each of them is tested with all of delta."""
    points = thresholds_drawn(kind)["with"]
    assert 0 < share_broken(promised(kind), points) <= DELTA
    assert np.mean([one.layers_saved for one in points]) > 0.15, "nobody leaving proves nothing"


@KINDS
def test_without_the_promise_the_label_is_lost_far_more_often(kind):
    assert share_broken(promised(kind), thresholds_drawn(kind)["without"]) == 1


def test_each_promise_has_all_of_delta():
    """They share one path, and the first point that breaks one of them is tested for it."""
    three = (promised("recall"), promised("precision"), promised("recall", "safe"))
    assert Bound.promised(PolicyOptions(delta=0.1, label_bounds=three)).delta == 0.1


@KINDS
def test_what_the_rows_say_of_a_promise_counts_the_rows_that_it_is_about(kind):
    full = np.array([UNSAFE] * 60 + [SAFE] * 40)
    answers = full.copy()
    answers[:2], answers[-1] = SAFE, UNSAFE
    found = label_check(promised(kind, epsilon=0.2)).risk(answers, full)
    expected = {"recall": (60, 2 / 60), "precision": (59, 1 / 59)}[kind]
    assert (found.rows, found.risk) == pytest.approx(expected)
    assert found.risk < found.bound <= 0.2


@KINDS
@pytest.mark.parametrize(("epsilon", "needed"), [(0.005, 460), (0.01, 230), (0.05, 45)])
def test_too_few_rows_are_refused_with_the_number_that_would_do(kind, epsilon, needed):
    test = label_check(promised(kind, epsilon=epsilon))
    enough = np.array([SAFE] * 500 + [UNSAFE] * needed)
    test.check(enough)
    sentence = f"--{kind} unsafe:{epsilon:g} needs {needed} held-out prompts that full depth answe"
    with pytest.raises(AdaInferError, match=sentence) as error:
        test.check(enough[:-1])
    assert f"there are {needed - 1}: give about 2 times as many" in str(error.value)
    with pytest.raises(AdaInferError, match="there are 0: give prompts that it does"):
        test.check(enough[:500])


def test_half_of_the_prompts_certify_where_only_some_of_them_count():
    groups = np.arange(1500)
    assert len(split_of(groups, PolicyOptions(epsilon=0.05)).certify) < 500
    options = PolicyOptions(epsilon=0.05, label_bounds=(promised("recall"),))
    assert len(split_of(groups, options).certify) == 750


LABELS = (Label(name="safe", token_id=SAFE), Label(name="unsafe", token_id=UNSAFE))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"never_early": ("harmless",)}, "--never-early harmless: there is no such label: name"),
        ({"label_bounds": (promised("recall", "bad"),)}, "--recall bad: there is no such label"),
        ({"label_bounds": (promised("precision", " unsafe"),)}, "--precision  unsafe: there is no"),
        ({"never_early": ("safe", "unsafe")}, "names every label, so that no request could leave"),
    ],
)
def test_promises_about_no_label_of_the_policy_are_refused(options, sentence):
    check_labels(PolicyOptions(label_bounds=(promised("recall"),), never_early=("safe",)), LABELS)
    with pytest.raises(AdaInferError, match=sentence):
        check_labels(PolicyOptions(**options), LABELS)


def test_each_field_of_an_object_has_a_value_that_may_be_early():
    fields = {"mood": ['"bad"', '"good"'], "seen": ["false", "true"]}
    check_fields(PolicyOptions(never_early=('mood="bad"', "seen=true")), fields)
    never = PolicyOptions(never_early=('mood="bad"', "seen=true", "seen=false"))
    with pytest.raises(AdaInferError, match="every value of seen, so that no object could be e"):
        check_fields(never, fields)


def test_a_promise_is_read_as_a_label_and_a_share():
    assert label_bounds("recall", ["unsafe:0.005", "a:b:0.1"]) == (
        promised("recall", "unsafe", 0.005),
        promised("recall", "a:b", 0.1),
    )


@pytest.mark.parametrize(
    "text", ["", "unsafe", "unsafe:", ":0.1", "unsafe:x", "unsafe:0", "unsafe:1", "unsafe:nan"]
)
@KINDS
def test_a_promise_that_cannot_be_read_is_refused(kind, text):
    with pytest.raises(AdaInferError, match=f"--{kind} '{text}' must be a label and a share betw"):
        label_bounds(kind, [text])


RISK = LabelRisk(rows=90, risk=0.01, bound=0.04)


def config_with(model: Any, **changes: Any) -> Any:
    bounds = changes.get("label_bounds", ())
    levels = [
        Level(
            epsilon=epsilon,
            disagreement=0.0,
            risk=0.0,
            bound=0.01,
            layers_saved=0.1,
            label_risks=[RISK] * len(bounds),
        )
        for epsilon in (0.02, 0.05)
    ]
    return tiny_config(model, **{"levels": levels, **changes})


def test_the_promises_in_words(tiny_model):
    bounds = (promised("recall", "bad", 0.005), promised("precision", "good", 0.02))
    config = config_with(tiny_model, label_bounds=bounds, never_early=("good",))
    assert about_labels(config) == [
        "at most 0.5 % of the requests that full depth answers with bad are answered otherwise",
        "at most 2 % of the requests answered with good are answered otherwise at full depth",
        "no early answer is good: such requests run all layers",
    ]
    assert about_labels(tiny_config(tiny_model)) == []


@pytest.mark.parametrize("never", [(), ("bad",), ("good",)])
def test_no_early_answer_is_such_a_label_not_even_at_a_tie(tiny_model, tmp_path, never):
    artifact = load_artifact(str(tiny_artifact(tiny_model, tmp_path / "policy", never_early=never)))
    policy = Policy(artifact, torch.device("cpu"))
    names = [label.name for label in artifact.config.labels]
    hidden = torch.randn(64, artifact.config.hidden_size)
    hidden[0] = 0  # both labels score alike
    rows = UndecidedRows(hidden, torch.zeros(64, dtype=torch.int64))
    for index in range(len(artifact.config.exit_points)):
        decision = policy.decide(index, rows)
        scores = decision.answers.scores
        best = [names[place] for place in scores.argmax(dim=1).tolist()]
        assert scores[0, 0] == scores[0, 1]
        assert set(best) == set(names)
        expected = [not never] + [name not in never for name in best[1:]]
        assert decision.settled.tolist() == expected


def shadowed(
    monitor: Any, early: list[int], full: list[int], ids: Sequence[str] | None = None
) -> PolicyStats:
    """Shadow requests with such labels early and at full depth; -1 is for not settled."""
    settled = [column >= 0 for column in early]
    columns = torch.tensor([column for column in early if column >= 0])
    logits, answered = (
        torch.nn.functional.one_hot(one, 2).float() for one in (torch.tensor(full), columns)
    )
    answers = Answers(answered, torch.tensor([0, 1]))
    return compare(monitor, Compared(), answers, logits, [0] * len(full), settled, ids)


def test_shadow_requests_are_counted_for_each_promise_settled_or_not(tiny_model):
    bounds = (promised("recall", "good"), promised("precision", "good"))
    monitor = monitor_of(config_with(tiny_model, label_bounds=bounds), SETTINGS)
    early, full = [1, 1, 0, -1, 0, 1, -1], [1, 0, 1, 1, 0, 1, 0]
    stats = shadowed(monitor, early, full)
    answered = [wanted if seen < 0 else seen for seen, wanted in zip(early, full, strict=True)]
    pairs = Counter(zip(answered, full, strict=True))
    recall, precision = (0.02, "recall", "good"), (0.02, "precision", "good")
    assert stats.labels_checked == {
        recall: pairs[0, 1] + pairs[1, 1],
        precision: pairs[1, 0] + pairs[1, 1],
    }
    assert +stats.labels_changed == {recall: pairs[0, 1], precision: pairs[1, 0]}
    found = monitor.as_dict()[0.02]["labels"]
    assert (found["recall of good"]["checked"], found["recall of good"]["disagreed"]) == (4, 1)
    assert (found["precision of good"]["checked"], found["precision of good"]["disagreed"]) == (
        4,
        1,
    )


@KINDS
def test_an_evaluation_counts_broken_promises_and_closes_nothing(tiny_model, caplog, kind):
    config = config_with(tiny_model, label_bounds=(promised(kind, "good"),))
    monitor = monitor_of(config, SETTINGS.model_copy(update={"compare": True}))
    for _ in range(50):
        shadowed(monitor, [0, 1] * 2, [1, 0] * 2)
    assert not monitor.tightened.any()
    [watch] = monitor.labels
    assert (watch.readings()[0].checked, watch.readings()[0].disagreed) == (100, 100)
    assert not caplog.records


@KINDS
def test_a_broken_promise_closes_its_level_though_epsilon_holds(tiny_model, caplog, kind):
    """Of 40 in 1,000 that are good, half are missed: 2 % of all answers change."""
    monitor = monitor_of(config_with(tiny_model, label_bounds=(promised(kind, "good"),)), SETTINGS)
    for _ in range(50):
        early, full = [0] * 60 + [1, 0] * 2, [0] * 60 + [1, 1] * 2
        if kind == "precision":
            early, full = full, early
        shadowed(monitor, early, full)
    assert monitor.tightened.tolist() == [True, False]
    [message, *more] = [record.getMessage() for record in caplog.records]
    assert f"policy guard: the {kind} of good is broken" in message
    assert len(more) <= 1  # epsilon's own bound may be broken, too, later


def test_a_promise_about_a_label_is_watched_by_groups_too_once_their_requests_have_ended(
    tiny_model, caplog
):
    """Those who ended are told to the loop alone, whatever policy they had."""
    config = config_with(
        tiny_model, label_bounds=(promised("recall", "good"),), bound="wsr", largest_group=5
    )
    monitor = monitor_of(config, SETTINGS)
    for text in range(100):
        ids = [f"decision-{text}-{part}-{part:08x}" for part in range(4)]
        shadowed(monitor, [0, 1, 1, 1], [1, 1, 1, 1], ids)
    [watch] = monitor.labels
    assert watch.readings()[0].checked == 0
    loop: Any = SimpleNamespace(monitors={"guard": monitor}, shadow_objects=ShadowObjects())
    for number in range(ENDED_SINCE):
        Loop.ended(loop, str(number))
    assert watch.readings()[0].checked == 400
    assert monitor.tightened.tolist() == [True, False]
    assert any("the recall of good is broken" in one.getMessage() for one in caplog.records)


def test_promises_that_hold_close_nothing(tiny_model):
    monitor = monitor_of(
        config_with(tiny_model, label_bounds=(promised("recall", "good"),)), SETTINGS
    )
    for _ in range(50):
        shadowed(monitor, [0] * 30 + [1] * 30, [0] * 30 + [1] * 30)
    assert not monitor.tightened.any()
