"""Policies decide as the oracle does; full depth answers shadow requests, which are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.e2e.asking import greedy, outputs
from tests.e2e.oracle import continuation, same, token_after
from tests.e2e.policies import artifact_of, expected, policy_of
from tests.e2e.scripted import EXIT_AT, only, parts, scripted
from tests.full import needed
from tests.tiny import EXIT_POINTS, FROM_ZERO, LAYERS
from vllm_adainfer import stats as stats_of
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.compat.requests import client_request_id
from vllm_adainfer.exits.loop.loop import StepOutput
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.settings.engine import DEFAULT_POLICY, Settings
from vllm_adainfer.watch.units import Grouping
from vllm_adainfer.watch.watch import Watch

# Probe, candidates, threshold and classifier.
WATCHED = [
    ("label-head", "labels", 0.2, "threshold"),
    ("lens", "labels", 0.6, "threshold"),
    ("lens", "full", 0.02, "threshold"),
    ("logit-lens", "full", 0.02, "threshold"),
]
UNWATCHED = [
    *WATCHED,
    ("logit-lens", "labels", 0.6, "threshold"),
    ("lens", "shortlist", 0.3, "threshold"),
    ("lens", "labels", 3.0, "crf"),
    ("lens", "full", -1.4, "crf"),
]
TAG = 0  # the level of the epsilon table that requests here are admitted with
NEVER = 1e-99  # an alpha at which a few answers tighten nothing
Watched = tuple[Any, Callable[[float], None]]


@contextmanager
def watched(
    llm: Any, artifact: Artifact | None, rate: float, alpha: float = 0.1
) -> Iterator[Watched]:
    """Serve with `artifact` (None: by script) and shadow requests.

    Yields the engine's stats, starting at zero, and a function that sets another shadow rate.
    """
    model, _, scheduler = parts(llm)
    loop = model.loop

    def set_rate(rate: float) -> None:
        scheduler.admission.arrival.is_shadow = cache(
            lambda request_id: is_shadow_at(rate)(client_request_id(request_id))
        )

    with scripted(llm) as stats:
        epsilons = [0.02, 0.05, 0.1]
        if artifact is not None:
            epsilons = [level.epsilon for level in artifact.config.levels]
            loop.policies = only(policy_of(artifact, model))
        loop.monitors = stats.shadow = {DEFAULT_POLICY: Watch(epsilons, alpha)}
        set_rate(rate)
        try:
            yield stats, set_rate
        finally:
            loop.monitors = {}


def is_shadow_at(rate: float) -> Callable[[str], bool]:
    """The draw of an engine with a shadow rate; here by ids as clients know them."""
    return Admission(Settings(record=(1,), shadow_rate=rate)).arrival.is_shadow


def random_prompts(count: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(5, 1000, generator.integers(2, 60)).tolist() for _ in range(count)]


def run(llm: Any, prompts: list[list[int]], params: Any) -> list[tuple[str, list[int]]]:
    """Request id and tokens of each prompt."""
    llm.reset_prefix_cache()
    found = outputs(llm, prompts, params)
    return [(output.request_id, list(output.outputs[0].token_ids)) for output in found]


def admitted(artifact: Artifact, tag: int = TAG) -> SamplingParams:
    labels = list(artifact.config.label_ids) or None
    return greedy(allowed_token_ids=labels, extra_args={EXIT_AT: tag})


def with_threshold(artifact: Artifact, threshold: float) -> Artifact:
    thresholds = torch.full_like(artifact.tensors["thresholds"], threshold)
    return replace(artifact, tensors={**artifact.tensors, "thresholds": thresholds})


def oracle_answers(
    artifact: Artifact, reference: Any, prompts: list[list[int]]
) -> list[tuple[list[int], tuple[int, int], int]]:
    """Prompts whose answers are no ties, with early depth and token, and the full-depth token."""
    never = with_threshold(artifact, torch.inf)
    answers = [
        (p, expected(artifact, reference, p), expected(never, reference, p)) for p in prompts
    ]
    return [(prompt, early, full[1]) for prompt, early, full in answers if early and full]


@pytest.mark.parametrize(
    ("rate", "policy"),
    [*product((1, 0.3), WATCHED), *product((0,), UNWATCHED)],
    ids=lambda one: "-".join(map(str, one)) if isinstance(one, tuple) else str(one),
)
def test_each_leaves_where_the_oracle_does_and_full_depth_answers_shadows_and_counts_them(
    engine, tiny_model, reference, policy, rate
):
    artifact = artifact_of(tiny_model, reference, *policy)
    cases = oracle_answers(artifact, reference, random_prompts(32, seed=5))
    assert len(cases) > 16
    assert len({early[0] for _, early, _ in cases}) > 1, "they leave at different depths"
    is_shadow, checked, disagreed, depths = is_shadow_at(rate), 0, 0, Counter[int]()
    with watched(engine, artifact, rate, alpha=NEVER) as (stats, _):
        found = run(engine, [prompt for prompt, _, _ in cases], admitted(artifact))
    for (_, (depth, early), full), (request_id, tokens) in zip(cases, found, strict=True):
        watched_one = is_shadow(request_id)
        assert tokens == [full if watched_one else early]
        checked += watched_one
        disagreed += watched_one and early != full
        depths[LAYERS if watched_one else depth] += 1
    assert (checked > 0, checked == len(cases)) == (rate > 0, rate == 1)
    assert rate < 1 or 0 < disagreed < len(cases)
    reading = stats.as_dict()["shadow"][artifact.config.levels[TAG].epsilon]
    assert (reading["checked"], reading["disagreed"]) == (checked, disagreed)
    assert +stats.exit_histogram == depths
    assert (stats.layers_run == stats.layers_possible) == (rate == 1)


@pytest.mark.parametrize("seed", needed(1, of=range(3)))
def test_shadows_in_mixed_batches_with_prompts_longer_than_a_step(small, reference, seed):
    generator = np.random.default_rng(seed)
    lengths = generator.choice([1, 2, 9, 31, 64, 100, 170, 300], 28)
    prompts = [generator.integers(5, 1000, length).tolist() for length in lengths]
    exits = generator.integers(-1, len(FROM_ZERO), len(prompts)).tolist()
    tokens = [1 if e >= 0 else int(generator.integers(1, 4)) for e in exits]
    params = [
        SamplingParams(temperature=0, max_tokens=n, extra_args={} if e < 0 else {EXIT_AT: e})
        for e, n in zip(exits, tokens, strict=True)
    ]
    is_shadow = is_shadow_at(0.5)
    checked = [0] * len(FROM_ZERO)
    with watched(small, None, rate=0.5, alpha=NEVER) as (stats, _):
        found = run(small, prompts, params)
    for prompt, exit_at, n, (request_id, produced) in zip(
        prompts, exits, tokens, found, strict=True
    ):
        early = exit_at >= 0 and not is_shadow(request_id)
        depth = FROM_ZERO[exit_at] if early else LAYERS
        assert same(produced, continuation(reference, prompt, n, depth))
        if exit_at >= 0 and not early:
            checked[exit_at] += 1
    assert sum(checked) > 0
    assert [reading["checked"] for reading in stats.as_dict()["shadow"].values()] == checked


def test_generated_texts_are_watched_text_by_text_up_to_the_tokens_that_the_bound_speaks_of(
    engine, reference
):
    """Each token of a shadow is compared after the same text; a text counts when it has ended."""
    longest, generator = 5, np.random.default_rng(21)
    prompts = [generator.integers(5, 1000, 6).tolist() for _ in range(10)]
    exits = generator.integers(0, len(EXIT_POINTS), len(prompts)).tolist()
    lengths = generator.integers(1, 9, len(prompts)).tolist()
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, extra_args={EXIT_AT: e})
        for e, n in zip(exits, lengths, strict=True)
    ]
    checked, disagreed = [0] * len(EXIT_POINTS), [0] * len(EXIT_POINTS)
    with watched(engine, None, rate=1) as (stats, _):
        loop = parts(engine)[0].loop
        monitor = Watch([0.02, 0.05, 0.1], NEVER, Grouping(longest))
        loop.monitors = stats.shadow = {DEFAULT_POLICY: monitor}
        found = run(engine, prompts, params)
        engine.llm_engine.step()  # the worker hears of the last ones that ended
    for prompt, exit_at, (_, text) in zip(prompts, exits, found, strict=True):
        for number, token in enumerate(text[:longest]):
            early = token_after(reference, prompt + text[:number], EXIT_POINTS[exit_at])
            checked[exit_at] += 1
            disagreed[exit_at] += early != token
    assert [one.checked for one in monitor.readings()] == checked
    assert [one.disagreed for one in monitor.readings()] == disagreed
    assert sum(checked) < sum(lengths)
    assert 0 < sum(disagreed) < sum(checked)


def test_rows_of_shadows_do_not_count_as_ready_to_leave(engine):
    prompt = list(range(5, 15))
    with watched(engine, None, rate=0) as (stats, _):
        model, _, scheduler = parts(engine)
        model.loop._min_rows_saved = 2 * len(prompt)
        turns = iter([True, False])
        scheduler.admission.arrival.is_shadow = cache(lambda request_id: next(turns))
        exit_at_once = greedy(extra_args={EXIT_AT: 0})
        run(engine, [prompt, prompt[::-1]], exit_at_once)
    assert +stats.exit_histogram == {LAYERS: 2}


def test_an_engine_without_the_setting_has_no_monitor_and_no_reading(engine):
    assert parts(engine)[0].loop.monitors == {}
    assert "shadow" not in stats_of(engine)


@pytest.mark.parametrize("candidates", ["labels", "full"])
def test_a_policy_that_is_often_wrong_is_stopped_and_the_other_level_is_not(
    engine, tiny_model, reference, candidates, caplog
):
    probe = "label-head" if candidates == "labels" else "logit-lens"
    artifact = artifact_of(tiny_model, reference, probe, candidates, -1.0)  # all leave at once
    strict, loose = (level.epsilon for level in artifact.config.levels)
    with watched(engine, artifact, rate=0.5) as (stats, set_rate):
        run(engine, random_prompts(60, seed=8), admitted(artifact))
        found = stats.as_dict()["shadow"]
        assert found[strict]["tightened"]
        assert found[strict]["low"] > strict
        assert not found[loose]["tightened"]

        # Watching goes on.
        run(engine, random_prompts(20, seed=9), admitted(artifact))
        later = stats.as_dict()["shadow"]
        assert 0 < later[strict]["checked"] - found[strict]["checked"] < 20

        # Nothing exits any more, whoever is a shadow.
        cases = oracle_answers(artifact, reference, random_prompts(16, seed=10))
        for rate in (0, 0.5):
            set_rate(rate)
            skipped = stats.layers_possible - stats.layers_run
            answers = run(engine, [prompt for prompt, _, _ in cases], admitted(artifact))
            assert [tokens for _, tokens in answers] == [[full] for _, _, full in cases]
            assert stats.layers_possible - stats.layers_run == skipped

        # The other level still does.
        set_rate(0)
        left = stats.exit_histogram[EXIT_POINTS[0]]
        run(engine, random_prompts(8, seed=11), admitted(artifact, tag=1))
        assert stats.exit_histogram[EXIT_POINTS[0]] == left + 8
    [warning] = [record for record in caplog.records if record.name.endswith("exits.shadow")]
    assert warning.levelname == "WARNING"
    assert f"epsilon = {strict:g}" in warning.getMessage()
    assert "calibrate again" in warning.getMessage()


def test_a_certified_label_wins_also_where_its_lead_is_below_the_rounding_of_the_logits(engine):
    model, _, _ = parts(engine)
    [policy] = model.loop.policies.policies
    label_ids = policy.answer_ids
    scores = torch.tensor([[100.0, 100.05], [100.05, 100.0]])  # bfloat16 steps by 0.5 there
    scored = np.array([0, 1]), Answers(scores, label_ids, of_labels=True)
    hidden = torch.zeros(2, 64, dtype=torch.bfloat16)
    model._output = StepOutput(hidden, (scored,))
    logits = model.compute_logits(hidden)
    assert logits.argmax(dim=1).tolist() == [int(label_ids[1]), int(label_ids[0])]
