"""What calibration makes of prompts that heads read as a whole."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.calibrations import (
    DEPTH,
    EPSILON,
    HF_CONFIG,
    LABEL_IDS,
    LAYERS,
    PROMPTS,
    SPLIT,
    of_prompts,
    recording_of_prompts,
)
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.certify.bound import Bound
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.shared import pooled_from
from vllm_adainfer.offline.calibration.enough_rows import ALLOWANCE, split_of
from vllm_adainfer.offline.calibration.fit import cost
from vllm_adainfer.offline.calibration.fit.choose import candidate_layers, layers_saved
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.fit_policy import fit_candidates, fit_policy
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.write.card import model_card
from vllm_adainfer.offline.calibration.write.policy_artifact import (
    policy_config,
    policy_details,
    policy_tensors,
)
from vllm_adainfer.offline.reports import views
from vllm_adainfer.promise.accuracy import Accuracy


@pytest.fixture(autouse=True)
def equally_fast_probes(monkeypatch) -> None:
    monkeypatch.setattr(cost, "probe_seconds", lambda *_: 1e-6)


SAYS_MUCH, SAYS_NOTHING = 0.3, 1e3


@pytest.mark.parametrize(
    ("mean_noise", "changes", "kind"),
    [
        (SAYS_MUCH, {}, "pooled-label-head"),
        (SAYS_NOTHING, {}, "label-head"),
        (SAYS_MUCH, {"pool_seconds": 1.0}, "label-head"),
    ],
    ids=["means say much", "means say nothing", "means take too long"],
)
def test_auto_takes_the_faster_heads_by_the_half_that_fits(mean_noise, changes, kind):
    recording = recording_of_prompts(mean_noise, **changes)
    found = fit_policy(of_prompts(recording), "auto")
    assert found.calibration.target.kind == kind
    assert (found.last_token is not None) == (kind == "pooled-label-head")
    # With other held-out prompts, the choice and the exit points are the same.
    recording.tokens[SPLIT.certify] = LABEL_IDS[0]
    again = fit_policy(of_prompts(recording), "auto")
    assert again.calibration.target.kind == kind
    assert [exit.layer for exit in again.exits] == [exit.layer for exit in found.exits]


def test_pooled_heads_that_are_asked_for_are_kept_though_others_are_faster():
    recording = recording_of_prompts(SAYS_NOTHING)
    found = fit_policy(of_prompts(recording), "pooled-label-head")
    assert found.calibration.target.is_pooled


@pytest.mark.parametrize("asked", [None, (0, 2, 4, 6)])
def test_the_part_for_the_last_token_has_only_exit_points_of_the_policy(asked):
    """And none before the first layer, where one token says nothing of the others."""
    found = fit_policy(
        of_prompts(recording_of_prompts(0.6), exit_points=asked), "pooled-label-head"
    )
    whole, last = ([one.layer for one in part.exits] for part in (found, found.last_token))
    assert set(last) <= set(whole) - {0}
    if asked is not None:
        assert (whole, last) == ([0, 2, 4, 6], [2, 4, 6])


def test_it_finds_no_exit_points_where_only_the_last_token_goes_on():
    recording = recording_of_prompts(SAYS_MUCH, own_kv_layers=4)
    layers = [exit.layer for exit in fit_candidates(of_prompts(recording))]
    assert layers == [0, 2, 4]
    last = replace(of_prompts(recording), target=Target("label-head", LABEL_IDS))
    assert [exit.layer for exit in fit_candidates(last)] == [*LAYERS]


def test_a_part_that_certifies_nothing_is_left_out_and_said_to_be(capsys):
    recording = recording_of_prompts(SAYS_MUCH)
    nothing = {layer: torch.zeros_like(states) for layer, states in recording.states.items()}
    whole = of_prompts(replace(recording, states=nothing))
    found = fit_policy(whole, "pooled-label-head")
    assert EPSILON in found.points
    assert found.last_token is None
    assert policy_config(found, "tiny", HF_CONFIG).last_token is None
    assert "the last token alone cannot be certified within the bound" in capsys.readouterr().err


@pytest.mark.parametrize("by_question", [False, True])
def test_one_bound_covers_both_parts_whichever_decides_a_request(by_question):
    """The larger loss of each row certifies; and at one epsilon both parts are served, or none."""
    data = of_prompts(recording_of_prompts(0.6), epsilon=0.1, by_question=by_question)
    names = [f"question {row % 2}" for row in range(PROMPTS)]
    if by_question:
        data = replace(data, questions=names, ends={name: ((0,),) for name in names})
    found = fit_policy(data, "pooled-label-head")
    asked = np.array(names)[SPLIT.certify]
    pairs = [(found.points, found.last_token.points, np.ones(len(asked), dtype=np.bool_))]
    if by_question:
        pairs = [
            (points, found.last_token.questions[name], asked == name)
            for name, points in found.questions.items()
        ]
    for whole, last, rows in pairs:
        assert whole.keys() == last.keys()
        for epsilon in whole:
            larger = np.maximum(whole[epsilon].losses, last[epsilon].losses)
            assert found.terms.bound.of_rows(rows).holds(larger, epsilon)
    assert found.last_token.points[0.1].layers_saved > 0
    config = policy_config(found, "tiny", HF_CONFIG)
    assert config.last_token.one_bound
    card = model_card(config, policy_details(found))
    assert all(f"{level.layers_saved:.1%}" in card for level in config.last_token.levels)
    assert [one.epsilon for one in config.levels] == [
        one.epsilon for one in config.last_token.levels
    ]


def test_the_learning_curve_is_of_the_exit_points_on_a_quarter_a_half_and_all_that_fits():
    found = fit_policy(of_prompts(recording_of_prompts(0.6)), "pooled-label-head")
    curve = found.learning_curve()
    assert [point["prompts"] for point in curve] == [112, 225, 450]
    saved = layers_saved(found.exits, DEPTH, found.allowed)
    assert curve[-1]["layers_saved"] == pytest.approx(saved)
    assert curve[0]["layers_saved"] < saved
    other = replace(found.calibration, target=Target("lens", LABEL_IDS))
    assert replace(found, calibration=other).learning_curve() == []


def example(*token_ids: int) -> Example:
    return Example("", "", list(token_ids), None)


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([(1, 2, 3, 4), (1, 2, 5)], 2),
        ([(1, 2, 3), (4, 2, 3)], 1),  # the first token is left out in any case
        ([(1, 2, 3), (1, 2, 3)], 2),  # a prompt has a token of its own in any case
        ([(1, 2, 3, 4), (1, 2, 3)], 2),
        ([(1, 2), (1, 2, 3, 4), (1, 2, 3, 5)], 1),
        ([(7, 8, 9)], 2),
    ],
)
def test_prompts_are_pooled_from_where_they_begin_to_differ(prompts, shared):
    examples = [example(*tokens) for tokens in prompts]
    assert pooled_from(examples, min(map(len, prompts))) == shared


@pytest.mark.parametrize("rows", [300, 1000, 1500, 3000])
@pytest.mark.parametrize("epsilon", [0.02, 0.05])
def test_prompts_that_the_bound_can_do_without_are_fitted_on(rows, epsilon):
    """No more certify than are needed for a bound on 0.6 epsilon, to within a few percent."""
    options = PolicyOptions(epsilon=epsilon)
    split = split_of(np.arange(rows), options)
    held_out, bound = len(split.certify), Bound.promised(options)
    assert len(split.fit) + held_out == rows
    assert held_out <= rows - rows // 2
    if held_out < rows - rows // 2:
        assert bound.allowance(held_out, epsilon) >= ALLOWANCE * epsilon
    sizes = range(1, int(0.9 * held_out))
    assert all(bound.allowance(size, epsilon) < ALLOWANCE * epsilon for size in sizes[::7])


@pytest.mark.parametrize(("rows", "epsilon"), [(4000, 0.02), (12_000, 0.02), (12_000, 0.05)])
def test_of_many_prompts_a_share_certifies_and_allows_more_than_the_least_that_would_do(
    rows, epsilon
):
    options = PolicyOptions(epsilon=epsilon)
    split, bound = split_of(np.arange(rows), options), Bound.promised(options)
    held_out, least = len(split.certify), len(split_of(np.arange(3000), options).certify)
    assert sorted([*split.fit, *split.certify]) == [*range(rows)]
    assert 0.2 * rows <= held_out <= 0.25 * rows
    assert bound.allowance(held_out, epsilon) >= bound.allowance(least, epsilon)
    steps = [bound.allowance(size, epsilon) for size in range(held_out - 200, held_out, 40)]
    assert bound.allowance(held_out, epsilon) >= max(steps), "no size just below allows more"


def test_many_prompts_that_hardly_do_for_the_bound_are_halved():
    assert len(split_of(np.arange(4000), PolicyOptions(epsilon=0.005)).certify) == 2000


def test_groups_of_many_prompts_that_ask_the_same_are_never_torn_apart():
    alike = np.arange(8000) // 2
    split = split_of(np.arange(8000), PolicyOptions(), alike)
    assert not {*alike[split.fit]} & {*alike[split.certify]}
    assert 0.2 * 8000 <= len(split.certify) <= 0.25 * 8000


@pytest.mark.parametrize(
    ("groups", "options"),
    [
        (np.arange(2000), {"by_question": True}),
        (np.arange(2000), {"promise": Accuracy()}),
        (np.arange(2000), {"bound": "wsr"}),
        (np.arange(2000) // 2, {}),
    ],
    ids=["by question", "accuracy", "wsr", "prompts that came together"],
)
def test_bounds_that_need_more_rows_get_half(groups, options):
    split = split_of(groups, PolicyOptions(epsilon=0.05, **options))
    assert (len(split.fit), len(split.certify)) == (1000, 1000)


def test_only_pooled_heads_have_something_to_read_before_the_first_layer():
    assert candidate_layers(30, kind="pooled-label-head")[0] == 0
    assert candidate_layers(30, kind="label-head")[0] > 0
    assert candidate_layers(30, (0, 8), "pooled-label-head") == [0, 8]
    for kind in "label-head", "lens", "logit-lens":
        with pytest.raises(AdaInferError, match="must ascend between 1 and 29 for this model of"):
            candidate_layers(30, (0, 8), kind)


@pytest.mark.parametrize(("length", "pooled"), [(3, False), (4, True)])
def test_a_prompt_is_explained_with_the_states_that_its_part_reads(monkeypatch, length, pooled):
    """Of a prompt without tokens of its own, there is no mean."""
    recording = recording_of_prompts(0.6)
    found = fit_policy(of_prompts(recording, exit_points=(0, 2, 4, 6)), "pooled-label-head")
    config = policy_config(found, "tiny", HF_CONFIG)
    recorded: list[Any] = []
    monkeypatch.setattr(views, "recorded", lambda *args, **_: recorded.append(args[3].layers))
    model = SimpleNamespace(path="", hf_config=None, engine_settings={}, lora_request=None)
    artifact = Artifact(config, policy_tensors(found))
    with pytest.raises(AttributeError):  # nothing was recorded here
        views.record_prompts(model, artifact, [])
    assert recorded == [(0, 2, 4, 6)]
    part, row, _ = views.decided_by(artifact, None, [5] * length)
    if not pooled:
        for mean in recording.means.values():
            mean[:] = torch.nan
    seen = views.views_of(part, recording, 1, row, str)
    assert [view.layer for view in seen] == ([0, 2, 4, 6, DEPTH] if pooled else [2, 4, 6, DEPTH])
    assert all(np.isfinite(view.top_prob) for view in seen)
