"""Calibrate: prompts in, artifact out (collect -> fit -> choose -> certify -> save)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from vllm_adainfer.artifact.config import ArtifactConfig, Label, are_exit_points
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.collect import (
    FOLDS,
    Ints,
    Recording,
    record,
    recording_engine,
)
from vllm_adainfer.offline.calibration.fit import candidate_layers
from vllm_adainfer.offline.calibration.fitted_policy import Calibration, FittedPolicy, make_policy
from vllm_adainfer.offline.calibration.label_pool import subsets_of
from vllm_adainfer.offline.calibration.label_reads import label_reads
from vllm_adainfer.offline.calibration.policy_artifact import write_artifact
from vllm_adainfer.offline.calibration.probes import Target
from vllm_adainfer.offline.calibration.prompts import CalibrationRequest, Prompts, load_prompts
from vllm_adainfer.offline.calibration.questions import ends_of

# How many tokens an exit point can answer with when the vocabulary is open. They make up 87 % of
# what SmolLM2 writes, and the tokens it is sure of early are common ones: simulated at epsilon
# 0.02, a probe of all 49,152 tokens saves 8.0 % of the layers and this one 6.8 %, but the former
# costs an LM head at every exit point.
SHORTLIST = 1024
# A policy promises probabilities in the whole vocabulary, too, if it then still saves this share of
# the time that it would save without: where the labels have nearly all of the mass, it does.
MASS_WORTH = 0.5


def calibrate(request: CalibrationRequest) -> ArtifactConfig:
    """Calibrate a policy and write its artifact.

    Raises:
        AdaInferError: the input, the model or the bound does not allow it; nothing is written.

    """
    prompts = load_prompts(request)
    return fit_and_certify(request, prompts, record_prompts(request, prompts))


def record_prompts(request: CalibrationRequest, prompts: Prompts) -> Recording:
    """Run the model at full depth."""
    options, hf_config, examples = request.options, prompts.hf_config, prompts.examples
    layers = _layers(options.exit_points, hf_config.num_hidden_layers)
    lens_prompts = len(prompts.split.fit) if prompts.probe == "lens" else 0
    adapter = request.adapter
    settings = {} if adapter is None else adapter.engine_settings
    with recording_engine(
        request.model, hf_config, examples, layers, lens_prompts, options.max_tokens, **settings
    ) as engine:
        labels = [label.token_id for label in prompts.labels]
        if prompts.choices is not None:
            labels = prompts.choices.first_tokens.token_ids.tolist()
        recording = record(
            engine, examples, labels, layers, options.max_tokens, adapter and adapter.request
        )
    if prompts.choices is not None:
        decided = prompts.choices.decided_by(recording.tokens)
        recording = replace(recording, tokens=decided)
    if prompts.probe == "lens":  # its sums are by prompt
        return recording
    return replace(recording, folds=prompts.split.groups % FOLDS)


def fit_and_certify(
    request: CalibrationRequest, prompts: Prompts, recording: Recording
) -> ArtifactConfig:
    """Make the policy and write its artifact.

    Raises:
        AdaInferError: no policy keeps the bound and is worth its cost; nothing is written.

    """
    policy = make_policy(calibration_of(request, prompts, recording))
    if request.options.risk == "probability":
        policy = with_mass_if_it_pays(policy)
    epsilon = request.options.epsilon
    if epsilon not in policy.points:
        raise AdaInferError(
            f"no exit point of {request.model} is worth its cost on these prompts within epsilon "
            f"{epsilon:g}: raise --epsilon, or give new rows (another try on the same held-out "
            "half would have a larger delta)"
        )
    return write_artifact(
        policy,
        request.model,
        prompts.hf_config,
        request.template,
        request.output,
        None if request.adapter is None else request.adapter.described,
    )


def calibration_of(
    request: CalibrationRequest, prompts: Prompts, recording: Recording
) -> Calibration:
    """What the policy is made from."""
    split = prompts.split
    answers = label_ids(prompts.labels)
    if request.options.max_tokens > 1:
        answers = shortlist(recording.tokens[split.fit_rows(recording)])
    reads = subsets = None
    if request.label_pool:
        subsets = subsets_of(prompts.examples, [label.token_id for label in prompts.labels])
    if request.options.risk == "probability" and answers is not None:
        reads = label_reads(recording, answers, subsets)
    questions = [example.question for example in prompts.examples]
    first_tokens = None if prompts.choices is None else prompts.choices.first_tokens
    return Calibration(
        recording,
        Target(prompts.probe, answers, reads, subsets, first_tokens),
        split,
        request.options,
        prompts.labels,
        prompts.right,
        choices=prompts.choices,
        questions=[name for name in questions if name is not None],
        ends=ends_of(prompts.examples) if any(questions) else {},
    )


def with_mass_if_it_pays(policy: FittedPolicy) -> FittedPolicy:
    """The policy that promises the label mass, too, unless it is expected to save too little.

    Expected on the half that fits: whichever of the two were chosen by the other half, its bound
    would hold less often.
    """
    with_mass = make_policy(replace(policy.calibration, with_mass=True))
    saved, saved_without = (
        1 - one.expected["chosen"] / one.expected["full_depth"] for one in (with_mass, policy)
    )
    return with_mass if 0 < saved >= MASS_WORTH * saved_without else policy


def label_ids(labels: tuple[Label, ...]) -> torch.Tensor | None:
    """int64 [labels]; None, which means the whole vocabulary, if there are none."""
    return torch.tensor([label.token_id for label in labels]) if labels else None


def shortlist(tokens: Ints) -> torch.Tensor:
    """int64 [at most `SHORTLIST`], the commonest of `tokens`, ascending."""
    found, counts = np.unique(tokens, return_counts=True)
    commonest = found[np.argsort(-counts, kind="stable")[:SHORTLIST]]
    return torch.from_numpy(np.sort(commonest))


def _layers(asked: tuple[int, ...] | None, depth: int) -> list[int]:
    if asked is not None and not are_exit_points(asked, depth):
        raise AdaInferError(
            f"--exit-points must ascend between 1 and {depth - 1} for this model of {depth} "
            f"layers, got {','.join(map(str, asked))}"
        )
    return candidate_layers(depth, asked)
