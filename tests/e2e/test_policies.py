"""A calibrated policy decides in vLLM as it decides on transformers' hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests.chain import log_odds
from tests.e2e.oracle import TIE, hidden_states
from tests.e2e.scripted import only, parts, scripted
from tests.tiny import EXIT_POINTS, LAYERS, tiny_config, tiny_tensors
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.exits.loop.loop import StepOutput
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.policy import Policy

PROMPTS = 24
SHORTLIST = torch.arange(3, 1000, 7)


def artifact_of(
    model_path,
    model,
    probe: str,
    candidates: str,
    threshold: float,
    classifier: str = "threshold",
) -> Artifact:
    """Random lenses and a threshold on the score that some rows pass and some do not."""
    labels = tiny_config(model_path).labels if candidates == "labels" else ()
    config = tiny_config(
        model_path, probe=probe, candidates=candidates, labels=labels, classifier=classifier
    )
    thresholds = torch.full((len(config.levels), len(EXIT_POINTS)), threshold)
    tensors = tiny_tensors(config, thresholds)
    generator = torch.Generator().manual_seed(2)
    if probe != "label-head":
        tensors = {name: t for name, t in tensors.items() if ".head_" not in name}
    if labels and probe != "label-head":
        tensors["head_rows"] = model.lm_head.weight.data[list(config.label_ids)]
    if candidates == "shortlist":
        tensors["shortlist"] = SHORTLIST
        tensors["head_rows"] = model.lm_head.weight.data[SHORTLIST]
    for layer in EXIT_POINTS:
        if probe == "lens":
            lens = 0.02 * torch.randn(64, 64, generator=generator)
            tensors[f"exit.{layer}.lens_weight"] = lens
            tensors[f"exit.{layer}.lens_bias"] = torch.zeros(64)
        if classifier == "crf":
            tensors[f"exit.{layer}.classifier"] = torch.tensor([2.0, -1, -1, 2, 1, 4, -1.5])
    return Artifact(config, tensors)


def policy_of(artifact: Artifact, model: Any) -> Policy:
    return Policy(artifact, torch.device("cpu"), lambda _: model.logit_lens())


def oracle_score(artifact: Artifact, features: list[tuple[float, float]]) -> float:
    """The settled score at the last of the exit points whose features are given."""
    layers = artifact.config.exit_points[: len(features)]
    classifiers = [artifact.tensors[f"exit.{layer}.classifier"].numpy() for layer in layers]
    if artifact.config.classifier == "crf":
        return log_odds(np.array(features), np.stack(classifiers))
    return features[-1][1]


@torch.inference_mode()
def expected(
    artifact: Artifact, model, prompt: list[int], level: int = 0
) -> tuple[int, int] | None:
    """Depth and token of a prompt; None where a decision is too close to call."""
    config, tensors = artifact.config, artifact.tensors
    states = hidden_states(model, prompt)
    at_full_depth = list(config.label_ids) or list(range(config.vocab_size))
    early = SHORTLIST.tolist() if config.candidates == "shortlist" else at_full_depth
    features: list[tuple[float, float]] = []
    for layer in (*config.exit_points, LAYERS):
        state = states[layer][-1:]
        rows = early if layer < LAYERS else at_full_depth
        if layer < LAYERS and config.probe == "label-head":
            scores = state @ tensors[f"exit.{layer}.head_weight"].T
        else:
            if layer < LAYERS and config.probe == "lens":
                state = state + state @ tensors[f"exit.{layer}.lens_weight"]
            scores = model.lm_head(model.model.norm(state))[:, rows]
        probabilities = scores.softmax(-1).topk(2)
        best, second = probabilities.values[0].tolist()
        features.append((best, best - second))
        margin = scores.topk(2).values
        if margin[0, 0] - margin[0, 1] < TIE:
            return None
        token = rows[int(probabilities.indices[0, 0])]
        if layer == LAYERS:
            return layer, token
        lead = oracle_score(artifact, features) - float(tensors["thresholds"][level, 0])
        if abs(lead) < TIE:
            return None
        if lead > 0:
            return layer, token
    raise AssertionError("the last layer always answers")


@pytest.mark.parametrize(
    ("probe", "candidates", "threshold", "classifier"),
    [
        ("label-head", "labels", 0.2, "threshold"),
        ("lens", "labels", 0.6, "threshold"),
        ("logit-lens", "labels", 0.6, "threshold"),
        ("lens", "full", 0.1, "threshold"),
        ("logit-lens", "full", 0.1, "threshold"),
        ("lens", "shortlist", 0.3, "threshold"),
        ("lens", "labels", 3.0, "crf"),
        ("lens", "full", -1.4, "crf"),
    ],
)
def test_depths_and_tokens_are_those_of_the_oracle(
    engine, tiny_model, reference, probe, candidates, threshold, classifier
):
    model, _, _ = parts(engine)
    artifact = artifact_of(tiny_model, reference, probe, candidates, threshold, classifier)
    generator = np.random.default_rng(11)
    prompts = [
        generator.integers(5, 1000, generator.integers(2, 60)).tolist() for _ in range(PROMPTS)
    ]
    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        allowed_token_ids=list(artifact.config.label_ids) or None,
        extra_args={"exit_at": 0},  # threshold row 0: the first level of the epsilon table
    )
    with scripted(engine) as stats:
        model.loop.policies = only(policy_of(artifact, model))
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
        )
    wanted = [expected(artifact, reference, prompt) for prompt in prompts]
    sure = [(w, out.outputs[0].token_ids[0]) for w, out in zip(wanted, outputs, strict=True) if w]
    assert len(sure) > PROMPTS / 2
    assert [token for _, token in sure] == [want[1] for want, _ in sure]
    depths = [want[0] for want, _ in sure]
    assert len(set(depths)) > 1, "the case must have rows that leave at different depths"
    unsure = PROMPTS - len(sure)
    for depth in (*EXIT_POINTS, LAYERS):
        assert abs(stats.exit_histogram[depth] - depths.count(depth)) <= unsure


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
