"""Calibrate: prompts in, artifact out (collect -> fit -> choose -> certify -> save)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from vllm_adainfer.engine.architectures import MODELS
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.card import model_card, risk_plot
from vllm_adainfer.offline.calibration.collect import Ints, record, recording_engine
from vllm_adainfer.offline.calibration.data import (
    Example,
    check_labels_known,
    find_labels,
    first_token,
    make_examples,
    read_rows,
    read_template,
)
from vllm_adainfer.offline.calibration.fit import RightTokens, candidate_layers, split
from vllm_adainfer.offline.calibration.policy import (
    PolicyOptions,
    make_policy,
    policy_config,
    policy_details,
    policy_tensors,
)
from vllm_adainfer.offline.calibration.probes import ProbeKind, Target
from vllm_adainfer.policy.artifact import ArtifactConfig, Label, are_exit_points
from vllm_adainfer.policy.artifact_files import check_writable, save_artifact

# Tokens that an exit point may give where any may be asked for. They are 87 % of what SmolLM2
# writes, and what it is sure of early is common: simulated at epsilon 0.02, a probe of all 49,152
# saves 8.0 % of its layers and these 6.8 %, but it costs an LM head at every exit point.
SHORTLIST = 1024


@dataclass(frozen=True)
class CalibrationRequest:
    """What the command line says; see `vllm-adainfer calibrate --help`."""

    model: str
    data: Path
    output: Path
    template: str | None = None
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    probe: ProbeKind | Literal["auto"] = "auto"
    options: PolicyOptions = field(default_factory=PolicyOptions)


def calibrate(request: CalibrationRequest) -> ArtifactConfig:
    """Calibrate a policy and write its artifact.

    Raises:
        AdaInferError: input, model or bound do not allow it; nothing is left behind.

    """
    check_writable(request.output)
    options = request.options
    if request.labels and options.max_tokens > 1:
        raise AdaInferError("--labels are answers of one token: drop --max-tokens, or --labels")
    probe = choose_probe(request.probe, request.labels)
    rows = read_rows(request.data)
    halves = split(len(rows), options.seed)
    check_rows(len(halves[1]), options, str(request.data))
    hf_config, tokenizer = load_config(request.model)
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
    # Recorded in this order, so that what a lens may learn from comes first.
    fit_half, held_out = (np.arange(len(halves[0])), np.arange(len(halves[0]), len(rows)))
    examples = [examples[index] for index in np.concatenate(halves)]
    right = right_tokens(examples, labels, tokenizer) if options.risk == "accuracy" else None
    layers = _layers(options.exit_points, hf_config.num_hidden_layers)
    lens_prompts = len(fit_half) if probe == "lens" else 0
    with recording_engine(
        request.model, hf_config, examples, layers, lens_prompts, options.max_tokens
    ) as engine:
        recording = record(engine, examples, labels, layers, options.max_tokens)
    answers = label_ids(labels)
    if options.max_tokens > 1:
        answers = shortlist(recording.tokens[recording.rows_of(fit_half)])
    target = Target(probe, answers)
    policy = make_policy(recording, target, (fit_half, held_out), options, right)
    if options.epsilon not in policy.points:
        raise AdaInferError(
            f"no exit point of {request.model} is worth its cost on these prompts within epsilon "
            f"{options.epsilon:g}: raise --epsilon, give more rows, or try another --probe"
        )
    name = Path(request.model).name if Path(request.model).is_dir() else request.model
    halves = (fit_half, held_out)
    config = policy_config(policy, recording, target, halves, options, labels, name, hf_config)
    details = {
        "template": request.template,
        "labels": list(request.labels),
        **policy_details(policy, recording, halves, options),
    }
    save_artifact(
        request.output,
        config,
        policy_tensors(policy, target, labels),
        details,
        model_card(config, details),
        {"risk.png": risk_plot(config, details)},
    )
    return config


def load_config(model: str) -> tuple[Any, Any]:
    """The model's Hugging Face config and tokenizer.

    Raises:
        AdaInferError: there is no such model, or it has no exit points.

    """
    from transformers import AutoConfig, AutoTokenizer

    try:
        hf_config = AutoConfig.from_pretrained(model)
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise AdaInferError(
            f"--model {model} is neither a model directory nor a hub id that can be fetched "
            f"({' '.join(str(error).split())[:200]})"
        ) from None
    architecture = (hf_config.architectures or ["none"])[0]
    if architecture not in MODELS:
        raise AdaInferError(
            f"--model {model} is a {architecture}, which has no exit points yet; supported: "
            f"{', '.join(MODELS)}"
        )
    return hf_config, tokenizer


def choose_probe(asked: ProbeKind | Literal["auto"], labels: tuple[str, ...]) -> ProbeKind:
    """The probe asked for, or the one that suits.

    Raises:
        AdaInferError: a label head without labels.

    """
    if asked == "auto":
        return "label-head" if labels else "lens"
    if asked == "label-head" and not labels:
        raise AdaInferError("--probe label-head needs --labels, such as --labels negative,positive")
    return asked


def label_ids(labels: tuple[Label, ...]) -> torch.Tensor | None:
    """int64 [labels], None for the whole vocabulary."""
    return torch.tensor([label.token_id for label in labels]) if labels else None


def shortlist(tokens: Ints) -> torch.Tensor:
    """int64 [at most `SHORTLIST`], the commonest of `tokens`, ascending."""
    found, counts = np.unique(tokens, return_counts=True)
    commonest = found[np.argsort(-counts, kind="stable")[:SHORTLIST]]
    return torch.from_numpy(np.sort(commonest))


def check_rows(held_out: int, options: PolicyOptions, data: str) -> None:
    """The half that certifies must be able to, even if not one answer differs.

    Raises:
        AdaInferError: it has too few rows; says how many are needed.

    """
    needed = options.bounds().rows_needed(options.epsilon)
    if held_out < needed:
        raise AdaInferError(
            f"too few rows for the bound: epsilon {options.epsilon:g} at delta "
            f"{options.delta:g} needs at least {2 * needed - 1} rows (half of them held out), "
            f"{data} has {2 * held_out} or one fewer: give more rows or raise --epsilon"
        )


def right_tokens(examples: list[Example], labels: tuple[Label, ...], tokenizer: Any) -> RightTokens:
    """Per prompt the token that its label begins with.

    Raises:
        AdaInferError: a row has no label.

    """
    ids = {label.name: label.token_id for label in labels}
    right = []
    for example in examples:
        if example.label is None:
            raise AdaInferError(
                f"{example.place} has no label, which --risk accuracy needs in every row: label "
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
