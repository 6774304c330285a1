"""Random policies of each kind, and what they decide on transformers' hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tests.chain import log_odds
from tests.e2e.oracle import TIE, hidden_states
from tests.tiny import EXIT_POINTS, LAYERS, tiny_config, tiny_tensors
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.policy.policy import Policy

SHORTLIST = torch.arange(3, 1000, 7)


def artifact_of(
    model_path,
    model,
    probe: str,
    candidates: str,
    threshold: float,
    classifier: str = "threshold",
    **more: Any,
) -> Artifact:
    """Random lenses and a threshold on the score that some rows pass and some do not."""
    labels = tiny_config(model_path).labels if candidates == "labels" else ()
    kind = {"probe": probe, "candidates": candidates, "classifier": classifier}
    config = tiny_config(model_path, labels=labels, **kind, **more)
    thresholds = torch.full((len(config.levels), len(EXIT_POINTS)), threshold)
    tensors = tiny_tensors(config, thresholds)
    generator = torch.Generator().manual_seed(2)
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
