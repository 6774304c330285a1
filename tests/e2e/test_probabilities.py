"""Requests that read probabilities leave early, with those that the head at their exit has read."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import tiny_engine
from tests.e2e.asking import ask_and_count, greedy
from tests.e2e.oracle import last_states
from tests.e2e.scripted import parts
from tests.e2e.test_label_pool import CLOSE, expected
from tests.full import needed
from tests.tiny import EXIT_POINTS, LAYERS, tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer.promise.gates import Gate, Gates
from vllm_adainfer.promise.tolerance import Tolerance

PROMISES = {"risk": "probability", "tolerance": 0.05, "label_mass": True}
GATE = {"risk": "probability", "gates": (Gate(label="bad", probability=0.5),)}
_GENERATOR = np.random.default_rng(0)
PROMPTS = [_GENERATOR.integers(5, 1000, 1 + 5 * i % 23).tolist() for i in range(16)]


@pytest.fixture(scope="module")
def label_ids(tiny_model) -> list[int]:
    return list(tiny_config(tiny_model).label_ids)


@pytest.fixture(scope="module")
def states(reference) -> list[list[Tensor]]:
    return last_states(reference, PROMPTS)


@pytest.fixture(scope="module")
def heads(tiny_model) -> dict[str, Tensor]:
    return tiny_tensors(tiny_config(tiny_model, **PROMISES))


@pytest.fixture(scope="module")
def threshold(states, heads) -> float:
    """On the gap: half of the prompts would leave at the first exit point."""
    first, gaps = EXIT_POINTS[0], []
    for after in states:
        bad, good, _ = (after[first] @ heads[f"exit.{first}.head_weight"].T)[0]
        gaps.append(float(torch.tanh((bad - good).abs() / 2)))
    return float(np.median(gaps))


def artifact(tiny_model: Path, directory: Path, gap: float, promises: dict[str, Any]) -> str:
    """Of two labels with a gate at 0.5, this gap is at this distance from the gate."""
    threshold = 2 * math.atanh(gap) if "gates" in promises else gap
    thresholds = torch.full((2, len(EXIT_POINTS)), threshold)
    return str(tiny_artifact(tiny_model, directory, thresholds, **promises))


@pytest.fixture(
    scope="module",
    params=needed(
        2,
        of=[
            ("raw_logprobs", Tolerance),
            ("processed_logprobs", Tolerance),
            ("raw_logprobs", Gates),
        ],
    ),
    ids=lambda param: f"{param[0]}-{param[1].__name__}",
)
def engine(request, tiny_model, threshold, tmp_path_factory) -> Any:
    mode, kind = request.param
    directory = tmp_path_factory.mktemp("probabilities") / "policy"
    promises = GATE if kind is Gates else PROMISES
    switch = {"artifact": artifact(tiny_model, directory, threshold, promises), "min_rows_saved": 1}
    small = {"kv_cache_memory_bytes": 64 << 20, "max_model_len": 512}
    made = tiny_engine(tiny_model, switch, logprobs_mode=mode, **small)
    [policy] = parts(made)[0].loop.policies.policies
    assert type(policy.promise) is kind
    return made


def test_label_reads_get_the_probabilities_of_their_exit_and_others_those_of_full_depth(
    engine, reference, states, heads, threshold, label_ids
):
    """Reads beside requests for the label alone, and such that no policy serves, in one step."""
    others = [
        greedy(allowed_token_ids=label_ids),
        greedy(logprobs=3),
        greedy(logprob_token_ids=[7, 9]),
        greedy(),
    ]
    params = [
        greedy(logprob_token_ids=label_ids) if place % 2 else others[place // 2 % len(others)]
        for place in range(len(PROMPTS))
    ]
    outputs, left = ask_and_count(engine, PROMPTS, params)
    wanted: Counter[int] = Counter()
    for after, asked, output in zip(states, params, outputs, strict=True):
        found = expected(reference, after, heads, label_ids, label_ids, threshold)
        serves = asked.logprob_token_ids == label_ids or asked.allowed_token_ids == label_ids
        if found is None:
            continue
        depth, among, mass = found
        wanted[depth if serves else LAYERS] += 1
        logits = reference.lm_head(reference.model.norm(after[LAYERS]))[0]
        if asked.logprob_token_ids == label_ids:
            got = [output.logprobs[0][token].logprob for token in label_ids]
            assert np.exp(got) == pytest.approx((among * mass).tolist(), abs=CLOSE)
            assert np.exp(got).sum() == pytest.approx(mass, abs=CLOSE)
            if depth < LAYERS and float(among.max()) * mass > 0.01:
                assert output.token_ids[0] == label_ids[int(among.argmax())]
        elif asked.allowed_token_ids == label_ids:
            assert output.token_ids[0] == label_ids[int(among.argmax())]
        else:
            whole = logits.log_softmax(0)
            for token, entry in (output.logprobs or [{}])[0].items():
                assert entry.logprob == pytest.approx(float(whole[token]), abs=CLOSE)
            assert output.token_ids[0] == int(logits.argmax())
    assert left.total() == len(PROMPTS)
    assert all(left[depth] >= count for depth, count in wanted.items())
    assert left[EXIT_POINTS[0]] > 2


@pytest.mark.parametrize("best", [1, 2, 5])
def test_the_best_of_allowed_labels_are_probabilities_among_them_if_vllm_returns_those(
    engine, reference, states, heads, threshold, label_ids, best
):
    processed = engine.llm_engine.model_config.logprobs_mode == "processed_logprobs"
    params = greedy(allowed_token_ids=label_ids, logprobs=best)
    outputs, left = ask_and_count(engine, PROMPTS, params)
    if not processed:
        assert left == {LAYERS: len(PROMPTS)}
        return
    assert left[LAYERS] < len(PROMPTS) - 2
    for after, output in zip(states, outputs, strict=True):
        found = expected(reference, after, heads, label_ids, label_ids, threshold)
        if found is None:
            continue
        _, among, _ = found
        got = output.logprobs[0]
        assert output.token_ids[0] == label_ids[int(among.argmax())]
        for token, probability in zip(label_ids, among.tolist(), strict=True):
            if token in got:
                assert np.exp(got[token].logprob) == pytest.approx(probability, abs=CLOSE)
        assert len([token for token in label_ids if token in got]) == min(best, len(label_ids))
