"""Calibrate: prompts in, artifact out (collect -> fit -> choose -> certify -> save)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.collect import (
    Ints,
    Recording,
    record,
    recording_engine,
)
from vllm_adainfer.offline.calibration.data import (
    Example,
    check_labels_known,
    find_labels,
    first_token,
    make_examples,
    read_rows,
    read_template,
)
from vllm_adainfer.offline.calibration.fit import candidate_layers
from vllm_adainfer.offline.calibration.fitted_policy import (
    Calibration,
    FittedPolicy,
    PolicyOptions,
    make_policy,
)
from vllm_adainfer.offline.calibration.label_reads import label_reads
from vllm_adainfer.offline.calibration.loss import RightTokens
from vllm_adainfer.offline.calibration.policy_artifact import write_artifact
from vllm_adainfer.offline.calibration.probes import Target
from vllm_adainfer.offline.calibration.split import Split, random_order
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.policy.artifact import ArtifactConfig, Label, are_exit_points
from vllm_adainfer.policy.artifact_files import check_writable
from vllm_adainfer.policy.kinds import ProbeChoice, ProbeKind

# How many tokens an exit point can answer with when the vocabulary is open. They make up 87 % of
# what SmolLM2 writes, and the tokens it is sure of early are common ones: simulated at epsilon
# 0.02, a probe of all 49,152 tokens saves 8.0 % of the layers and this one 6.8 %, but the former
# costs an LM head at every exit point.
SHORTLIST = 1024
# A policy promises probabilities in the whole vocabulary, too, if it then still saves this share of
# the time that it would save without: where the labels have nearly all of the mass, it does.
MASS_WORTH = 0.5


@dataclass(frozen=True)
class CalibrationRequest:
    """The command line's arguments; see `vllm-adainfer calibrate --help`."""

    model: str
    data: Path
    output: Path
    template: str | None = None
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    probe: ProbeChoice = "auto"
    options: PolicyOptions = field(default_factory=PolicyOptions)


@dataclass(frozen=True)
class Prompts:
    """What is recorded, in random order.

    Attributes:
        examples: the prompts.
        labels: the answers, if there is a fixed set of them.
        split: which of them fit, and which certify.
        hf_config: of the model.
        right: the right tokens by prompt, if the risk is of accuracy.

    """

    examples: list[Example]
    labels: tuple[Label, ...]
    split: Split
    hf_config: Any
    right: RightTokens | None


def calibrate(request: CalibrationRequest) -> ArtifactConfig:
    """Calibrate a policy and write its artifact.

    Raises:
        AdaInferError: the input, the model or the bound does not allow it; nothing is written.

    """
    prompts = load_prompts(request)
    return fit_and_certify(request, prompts, record_prompts(request, prompts))


def load_prompts(request: CalibrationRequest) -> Prompts:
    """Check the request, and read its data.

    Raises:
        AdaInferError: the input, the model or the number of rows does not allow it.

    """
    check_writable(request.output)
    options = request.options
    if options.tolerance is not None:
        check_tolerance(request)
    if request.labels and options.max_tokens > 1:
        raise AdaInferError("--labels are one-token answers: drop --max-tokens or --labels")
    choose_probe(request.probe, request.labels)
    rows = read_rows(request.data)
    split = Split.halves(len(rows))
    check_rows(split, options, str(request.data))
    hf_config, tokenizer = load_config_and_tokenizer(request.model)
    examples = make_examples(
        rows,
        tokenizer,
        read_template(request.template),
        request.label_field,
        hf_config.max_position_embeddings - options.max_tokens,
    )
    labels = find_labels(request.labels, examples[0], tokenizer) if request.labels else ()
    if labels:
        check_labels_known(examples, labels)
    examples = [examples[index] for index in random_order(len(examples), options.seed)]
    right = right_tokens(examples, labels, tokenizer) if options.risk == "accuracy" else None
    return Prompts(examples, labels, split, hf_config, right)


def record_prompts(request: CalibrationRequest, prompts: Prompts) -> Recording:
    """Run the model at full depth."""
    options, hf_config, examples = request.options, prompts.hf_config, prompts.examples
    layers = _layers(options.exit_points, hf_config.num_hidden_layers)
    probe = choose_probe(request.probe, request.labels)
    lens_prompts = len(prompts.split.fit) if probe == "lens" else 0
    with recording_engine(
        request.model, hf_config, examples, layers, lens_prompts, options.max_tokens
    ) as engine:
        return record(engine, examples, prompts.labels, layers, options.max_tokens)


def fit_and_certify(
    request: CalibrationRequest, prompts: Prompts, recording: Recording
) -> ArtifactConfig:
    """Make the policy and write its artifact.

    Raises:
        AdaInferError: no policy keeps the bound and is worth its cost; nothing is written.

    """
    options, split = request.options, prompts.split
    answers = label_ids(prompts.labels)
    if options.max_tokens > 1:
        answers = shortlist(recording.tokens[split.fit_rows(recording)])
    reads = None
    if options.risk == "probability" and answers is not None:
        reads = label_reads(recording, answers)
    target = Target(choose_probe(request.probe, request.labels), answers, reads)
    policy = make_policy(
        Calibration(recording, target, split, options, prompts.labels, prompts.right)
    )
    if reads is not None:
        policy = with_mass_if_it_pays(policy)
    if options.epsilon not in policy.points:
        raise AdaInferError(
            f"no exit point of {request.model} is worth its cost on these prompts within epsilon "
            f"{options.epsilon:g}: raise --epsilon, give more rows, or try another --probe"
        )
    return write_artifact(
        policy, request.model, prompts.hf_config, request.template, request.output
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


def check_tolerance(request: CalibrationRequest) -> None:
    """Check that a policy can promise the probabilities that `request` asks for.

    Raises:
        AdaInferError: it cannot.

    """
    options = request.options
    refusals = [
        (
            options.max_tokens > 1,
            "--tolerance is for the probabilities of one token: drop --max-tokens or --tolerance",
        ),
        (
            not request.labels,
            "--tolerance is for the probabilities of labels: give --labels, such as "
            "negative,positive, or drop --tolerance",
        ),
        (
            request.probe not in ("auto", "label-head"),
            f"--tolerance needs the scores of a label-head, and --probe {request.probe} has none: "
            "drop --probe or --tolerance",
        ),
        (
            options.risk == "accuracy",
            "--tolerance bounds how far probabilities move, --risk accuracy the accuracy lost, and "
            "a policy has one bound: drop one of them",
        ),
        (
            options.classifier in ("rbf", "boosting"),
            f"--classifier {options.classifier} is a table over probabilities, and --tolerance "
            "reads log-odds: use svm, logreg, threshold or crf",
        ),
    ]
    for refused, sentence in refusals:
        if refused:
            raise AdaInferError(sentence)


def choose_probe(asked: ProbeChoice, labels: tuple[str, ...]) -> ProbeKind:
    """The probe asked for, or the default for these labels.

    Raises:
        AdaInferError: a label head without labels.

    """
    if asked == "auto":
        return "label-head" if labels else "lens"
    if asked == "label-head" and not labels:
        raise AdaInferError("--probe label-head needs --labels, such as --labels negative,positive")
    return asked


def label_ids(labels: tuple[Label, ...]) -> torch.Tensor | None:
    """int64 [labels]; None, which means the whole vocabulary, if there are none."""
    return torch.tensor([label.token_id for label in labels]) if labels else None


def shortlist(tokens: Ints) -> torch.Tensor:
    """int64 [at most `SHORTLIST`], the commonest of `tokens`, ascending."""
    found, counts = np.unique(tokens, return_counts=True)
    commonest = found[np.argsort(-counts, kind="stable")[:SHORTLIST]]
    return torch.from_numpy(np.sort(commonest))


def check_rows(split: Split, options: PolicyOptions, data: str) -> None:
    """Check that the held-out half could certify the bound if not one answer differed.

    Raises:
        AdaInferError: it has too few rows; the message says how many are needed.

    """
    needed = options.bounds().rows_needed(options.epsilon)
    if len(split.certify) < needed:
        raise AdaInferError(
            f"too few rows for the bound: epsilon {options.epsilon:g} at delta "
            f"{options.delta:g} needs at least {2 * needed - 1} rows (half of them held out), but "
            f"{data} has {len(split.fit) + len(split.certify)}: give more rows or raise --epsilon"
        )


def right_tokens(examples: list[Example], labels: tuple[Label, ...], tokenizer: Any) -> RightTokens:
    """For each prompt, the first token of its label.

    Raises:
        AdaInferError: a row has no label.

    """
    ids = {label.name: label.token_id for label in labels}
    right = []
    for example in examples:
        if example.label is None:
            raise AdaInferError(
                f"{example.place} has no label, but --risk accuracy needs one in every row: label "
                "the rows (see --label-field) or bound the disagreement"
            )
        if labels:
            right.append({ids[example.label]})
        else:
            right.append({first_token(example.text, example.label, tokenizer)})
    return right


def _layers(asked: tuple[int, ...] | None, depth: int) -> list[int]:
    if asked is not None and not are_exit_points(asked, depth):
        raise AdaInferError(
            f"--exit-points must ascend between 1 and {depth - 1} for this model of {depth} "
            f"layers, got {','.join(map(str, asked))}"
        )
    return candidate_layers(depth, asked)
