"""Prompts that repeat others: in one part with them, and a bound that holds however they came."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.calibrate import say_what_they_share
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.certify.certify import LabelTest
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.split import Split, alike_of, groups_of
from vllm_adainfer.offline.calibration.enough_rows import check_rows, split_of
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.prompts import load_prompts
from vllm_adainfer.promise.first_documents import FirstDocuments

EPSILON, DELTA, DRAWS = 0.05, 0.1, 400


def example(token: int, group: str | None = None, labels: tuple[int, ...] | None = None) -> Example:
    return Example("", "", [1, token], None, labels=labels, group=group)


@pytest.mark.parametrize(
    ("examples", "alike"),
    [
        ([example(5), example(6), example(7)], None),
        ([example(5), example(6), example(5)], [0, 1, 0]),
        ([example(5, labels=(1, 2)), example(5, labels=(1, 3))], None),
        ([example(5, "a"), example(6, "a"), example(6, "b"), example(5, "b")], [0, 0, 0, 0]),
        ([example(5, "a"), example(6, "a"), example(5, "b"), example(7, "b")], None),
    ],
    ids=["all differ", "one repeats", "other labels", "groups that ask the same", "half of it"],
)
def test_groups_ask_the_same_if_they_have_the_same_prompts_and_answers(examples, alike):
    found = alike_of(examples, groups_of(examples))
    assert (None if found is None else found.tolist()) == alike


def test_equal_prompts_are_in_one_part_and_the_exact_bound_stays():
    """A third of the prompts come twice; as many different ones certify as without repeats."""
    alike = np.sort(np.concatenate([np.arange(1500), np.arange(0, 1500, 3)]))
    options = PolicyOptions(epsilon=EPSILON)
    split = split_of(np.arange(len(alike)), options, alike)
    parts = [set(alike[part].tolist()) for part in (split.fit, split.certify)]
    assert not parts[0] & parts[1]
    assert len(parts[1]) == len(split_of(np.arange(1500), options).certify)
    assert split.repeats is not None
    assert split.repeats.sum() == 500
    groups, repeats = split.groups[split.certify], split.repeats[split.certify]
    assert Bound.promised(options, groups, 1, repeats).kind == "exact"


@pytest.mark.parametrize("copies", [2, 5])
def test_a_file_of_copies_certifies_no_more_often_than_its_prompts(copies):
    """At a risk of just above epsilon, where rows taken for independent certify it far more."""
    generator, once = np.random.default_rng(0), 130
    repeats = np.tile([False] + [True] * (copies - 1), once)
    bound = Bound("exact", DELTA, 0.0, np.arange(once * copies), repeats=repeats)
    drawn = [(generator.random(once) < EPSILON + 1e-9).astype(float) for _ in range(DRAWS)]
    rows = [np.repeat(losses, copies) for losses in drawn]
    assert 0 < np.mean([bound.holds(losses, EPSILON) for losses in rows]) <= DELTA
    naive = np.mean([Bound("exact", DELTA, 0).holds(losses, EPSILON) for losses in rows])
    assert naive > 1.5 * DELTA


def test_a_prompt_that_is_asked_often_counts_as_often_as_it_is_asked():
    """A sixteenth of all requests are one prompt, whose answer changes; hardly any other does."""
    generator = np.random.default_rng(0)
    certifying = naive = 0
    for _ in range(DRAWS):
        often = generator.random(600) < 1 / 16
        losses = np.where(often, 1.0, 0.0)
        repeats = often & (np.cumsum(often) > 1)
        bound = Bound("exact", DELTA, 0.0, np.arange(600), repeats=repeats)
        certifying += bound.holds(losses, EPSILON)
        naive += Bound("exact", DELTA, 0).holds(losses[~repeats], EPSILON)
    assert certifying / DRAWS <= DELTA
    assert naive == DRAWS, "each prompt counted once says nothing of how often it is asked"


@pytest.mark.parametrize("kind", ["exact", "wsr"])
def test_some_repeats_cost_little(kind):
    """One prompt in twenty comes twice: of 600 rows 571 differ."""
    repeats = np.arange(600) % 21 == 20
    losses = (np.arange(600) % 100 == 7).astype(float)
    repeats[losses > 0] = False
    plain, found = (
        Bound(kind, DELTA, 0.0, np.arange(600), repeats=some).of(losses) for some in (None, repeats)
    )
    assert plain <= found < 1.06 * plain


def test_the_bound_is_the_larger_one_of_both_readings():
    repeats = np.arange(400) % 4 == 3
    bound = Bound("exact", DELTA, 0.0, np.arange(400), repeats=repeats)
    for where in (~repeats, repeats):  # errors among the prompts counted once, or among the others
        losses = np.zeros(400)
        losses[np.flatnonzero(where)[:6]] = 1
        readings = [Bound("exact", DELTA, 0.0).of(one) for one in (losses, losses[~repeats])]
        assert bound.of(losses) == max(readings)
        assert bound.holds(losses, bound.of(losses) + 1e-9)
        assert not bound.holds(losses, bound.of(losses) - 1e-9)
    assert bound.allowance(400, EPSILON) == Bound("exact", DELTA, 0.0).allowance(300, EPSILON)


def test_a_query_repeats_another_with_all_its_documents():
    options = PolicyOptions(promise=FirstDocuments(k=1, margin=0.05))
    groups, repeats = np.repeat([4, 6, 9], 2), np.repeat([False, True, False], 2)
    bound = Bound.promised(options, groups, 2, repeats)
    assert bound.repeats is not None
    assert (bound.kind, bound.repeats.tolist()) == ("exact", [False, True, False])


def test_too_few_different_prompts_are_refused_however_often_each_comes():
    alike = np.repeat(np.arange(80), 10)
    split = Split.of_groups(np.arange(800), alike=alike)
    with pytest.raises(AdaInferError, match=r"at least 89 different prompts .* but rows has 80:"):
        check_rows(split, PolicyOptions(epsilon=EPSILON), "rows")
    promise = LabelBound(kind="recall", label="bad", epsilon=EPSILON)
    bound = Bound("exact", DELTA, 0.0, np.arange(400), repeats=split.repeats[split.certify])
    with pytest.raises(AdaInferError, match=r"needs 45 held-out prompts .*, and there are 40"):
        LabelTest(promise, 7, bound).check(np.full(400, 7))


def test_calibrate_says_how_many_prompts_repeat_another(tiny_model, tmp_path: Path, capsys):
    rows = [
        f'{{"prompt": "Review : good bad good bad {"good " * (n % 90)}"}}\n' for n in range(100)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    options = PolicyOptions(epsilon=0.1)
    request = CalibrationRequest(
        str(tiny_model), tmp_path / "rows.jsonl", tmp_path / "policy",
        labels=("good", "bad"), options=options,
    )  # fmt: skip
    prompts = load_prompts(request)
    say_what_they_share(prompts)
    assert "10 of 100 prompts repeat another one" in capsys.readouterr().err
    fit, certify = (
        {tuple(prompts.examples[row].token_ids) for row in part}
        for part in (prompts.split.fit, prompts.split.certify)
    )
    assert not fit & certify
