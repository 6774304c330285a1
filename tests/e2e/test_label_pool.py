"""Requests that name labels of a pool get what the head at their exit says of those alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from tests.conftest import tiny_engine
from tests.e2e.asking import ask_and_count, greedy
from tests.e2e.oracle import last_states
from tests.tiny import EXIT_POINTS, LAYERS, tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer.artifact.fields import Label, Question

POOL = tuple(Label(name=f"label {token}", token_id=token) for token in (40, 7, 300, 12, 999, 5))
IDS = [label.token_id for label in POOL]
KINDS: dict[str, dict[str, Any]] = {
    "tokens": {"labels": POOL, "label_pool": True},
    "probabilities": {
        "labels": POOL,
        "label_pool": True,
        "risk": "probability",
        "tolerance": 0.05,
        "label_mass": True,
    },
}
# Each certified on its own; no other policy has these labels.
MOODS = [Label(name=f"mood {token}", token_id=token) for token in (60, 50, 70)]
KINDS["questions"] = {
    "labels": tuple(MOODS),
    "label_pool": True,
    "by_question": True,
    "questions": (
        Question(name="mood", ends=((20, 30), (22, 30)), certified=(0.02, 0.05)),
        Question(name="side", ends=((30,),), certified=(0.05,)),
    ),
}
# By question and epsilon, as tags count.
GAPS = {("mood", 0.02): 0.3, ("mood", 0.05): 0.05, ("side", 0.02): np.inf, ("side", 0.05): 0.0}
GAP = 0.15  # between the best two labels at which a row is settled
CLOSE, TIE = 2e-4, 1e-3
_GENERATOR = np.random.default_rng(5)
PROMPTS = [_GENERATOR.integers(5, 1000, 1 + 5 * i % 23).tolist() for i in range(24)]


@pytest.fixture(scope="module")
def engine(tiny_model, tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("pools")
    artifacts = {}
    for name, kind in KINDS.items():
        gaps = torch.tensor([*GAPS.values()] if name == "questions" else [GAP, GAP])
        thresholds = gaps.unsqueeze(1).repeat(1, len(EXIT_POINTS))
        artifacts[name] = str(tiny_artifact(tiny_model, folder / name, thresholds, **kind))
    switch = {"artifact": artifacts, "min_rows_saved": 1}
    return tiny_engine(
        tiny_model,
        switch,
        kv_cache_memory_bytes=64 << 20,
        max_model_len=512,
        logprobs_mode="raw_logprobs",
    )


@pytest.fixture(scope="module")
def heads(tiny_model) -> dict[str, dict[str, Tensor]]:
    return {name: tiny_tensors(tiny_config(tiny_model, **kind)) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def states(reference) -> list[list[Tensor]]:
    return last_states(reference, PROMPTS)


def random_request(seed: int) -> SamplingParams:
    """About a random subset of the pool, or about tokens that no policy serves."""
    generator = np.random.default_rng(seed)
    own = generator.choice(IDS, generator.integers(2, len(IDS) + 1), replace=False).tolist()
    asked = [
        {"allowed_token_ids": own},
        {"logprob_token_ids": own},
        {"logprob_token_ids": own},
        {"allowed_token_ids": [*own, 8]},
        {"logprob_token_ids": own[:1]},
    ][generator.integers(5)]
    return greedy(**asked)


@torch.inference_mode()
def expected(
    reference: Any,
    after: list[Tensor],
    tensors: dict[str, Tensor] | None,
    own: list[int],
    pool: list[int] = IDS,
    gap: float = GAP,
) -> tuple[int, Tensor, float] | None:
    """Depth, probabilities among the labels `own` and their mass; None if too close to call.

    `tensors` are the policy's; None if no policy serves the request.
    """
    columns = [pool.index(token) for token in own] if tensors is not None else []
    for layer in EXIT_POINTS if tensors is not None else ():
        scores = after[layer] @ tensors[f"exit.{layer}.head_weight"].T
        scores = (scores + tensors[f"exit.{layer}.head_bias"])[0]
        among = scores[columns].softmax(0)
        best = among.sort().values
        lead = float(best[-1] - best[-2]) - gap
        if abs(lead) < TIE:
            return None
        if lead > 0:
            mass = float(torch.sigmoid(scores[-1])) if len(scores) > len(pool) else 1.0
            return layer, among, mass
    whole = reference.lm_head(reference.model.norm(after[LAYERS]))[0].softmax(0)[own]
    return LAYERS, whole / whole.sum(), float(whole.sum())


@pytest.mark.parametrize("seed", range(3))
def test_random_subsets_in_one_step_are_each_answered_among_their_own_labels(
    engine, reference, states, heads, seed
):
    asked = [random_request(100 * seed + place) for place in range(len(PROMPTS))]
    outputs, left = ask_and_count(engine, PROMPTS, asked)
    wanted: Counter[int] = Counter()
    for after, params, output in zip(states, asked, outputs, strict=True):
        own = params.allowed_token_ids or params.logprob_token_ids
        reads = params.logprob_token_ids is not None
        served = len(own) > 1 and set(own) <= set(IDS)
        tensors = heads["probabilities" if reads else "tokens"] if served else None
        found = expected(reference, after, tensors, own)
        if found is None:
            continue
        depth, among, mass = found
        wanted[depth] += 1
        if reads:
            got = np.exp([output.logprobs[0][token].logprob for token in own])
            assert got == pytest.approx((among * mass).tolist(), abs=CLOSE)
            assert all(entry.logprob <= 0 for entry in output.logprobs[0].values())
        elif among.sort().values.diff()[-1] > TIE:
            assert output.token_ids[0] == own[int(among.argmax())]
    assert left.total() == len(PROMPTS)
    assert all(left[depth] >= count for depth, count in wanted.items())
    assert sum(wanted[layer] for layer in EXIT_POINTS) > 5
    assert wanted[LAYERS] > 1


def test_each_question_is_answered_at_its_own_exit_and_others_at_full_depth(
    engine, reference, heads
):
    """Two wordings of one question, another, and two that nobody has calibrated."""
    ends = {(20, 30): "mood", (22, 30): "mood", (23, 30): "side", (20, 31): None, (30, 8): None}
    own = [label.token_id for label in MOODS]
    inputs, asked, wanted = [], [], []
    for place, prompt in enumerate(PROMPTS):
        end = list(ends)[place % len(ends)]
        epsilon = (0.02, 0.05)[place // len(ends) % 2]
        inputs.append([*prompt, *end])
        asked.append(greedy(allowed_token_ids=own, extra_args={"adainfer_epsilon": epsilon}))
        wanted.append(GAPS.get((ends[end], epsilon), np.inf))
    outputs, left = ask_and_count(engine, inputs, asked)
    depths: Counter[int] = Counter()
    for prompt, output, gap in zip(inputs, outputs, wanted, strict=True):
        [after] = last_states(reference, [prompt])
        found = expected(reference, after, heads["questions"], own, own, gap)
        if found is None:
            continue
        depths[found[0]] += 1
        if found[1].sort().values.diff()[-1] > TIE:
            assert output.token_ids[0] == own[int(found[1].argmax())]
    assert all(left[depth] >= count for depth, count in depths.items())
    assert depths[EXIT_POINTS[0]] > 3
    assert depths[LAYERS] > 10
