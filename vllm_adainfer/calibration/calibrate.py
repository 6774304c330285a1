"""Calibrate: prompts in, artifact out (collect -> fit -> certify -> save)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.artifact import (
    ArtifactConfig,
    Label,
    Level,
    check_writable,
    save_artifact,
)
from vllm_adainfer.calibration.card import model_card, risk_plot
from vllm_adainfer.calibration.certify import (
    PathPoint,
    bound_of,
    certify,
    choose_exits,
    threshold_grid,
    walk,
)
from vllm_adainfer.calibration.collect import collect
from vllm_adainfer.calibration.data import (
    check_labels_known,
    find_labels,
    make_examples,
    read_rows,
    read_template,
)
from vllm_adainfer.calibration.fit import (
    FittedExit,
    Ints,
    Target,
    candidate_layers,
    chain,
    fit_exits,
    split,
)
from vllm_adainfer.decision.bound import rows_needed
from vllm_adainfer.decision.classifier import Kind
from vllm_adainfer.decision.probe import FEATURES
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.plugin import MODELS
from vllm_adainfer.provenance import provenance

ProbeKind = Literal["auto", "lens", "label-head", "logit-lens"]
EPSILONS = (0.005, 0.01, 0.02, 0.05, 0.1)


@dataclass(frozen=True)
class CalibrationRequest:
    """What the command line says; see `vllm-adainfer calibrate --help`."""

    model: str
    data: Path
    output: Path
    template: str | None = None
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    probe: ProbeKind = "auto"
    classifier: Kind = "svm"
    exit_points: tuple[int, ...] | None = None
    epsilon: float = 0.02
    delta: float = 0.1
    seed: int = 0


def calibrate(request: CalibrationRequest) -> ArtifactConfig:
    """Calibrate a policy and write its artifact.

    Raises:
        AdaInferError: input, model or bound do not allow it; nothing is left behind.

    """
    check_writable(request.output)
    probe = _probe_kind(request)
    rows = read_rows(request.data)
    fit_half, held_out = split(len(rows), request.seed)
    _check_rows(len(held_out), request)
    hf_config, tokenizer = load_config(request.model)
    examples = make_examples(
        rows,
        tokenizer,
        read_template(request.template),
        request.label_field,
        hf_config.max_position_embeddings - 1,
    )
    labels = find_labels(request.labels, examples[0], tokenizer) if request.labels else ()
    if labels:
        check_labels_known(examples, labels)
    layers = _layers(request, hf_config.num_hidden_layers)
    # Prompts cut short add rows to the lens; only those of the half it is fitted on are run.
    order = np.concatenate([fit_half, held_out])
    recording = collect(
        request.model,
        hf_config,
        [examples[index] for index in order],
        labels,
        layers,
        cut_prompts=len(fit_half) if probe == "lens" and not labels else 0,
        seed=request.seed,
    )
    halves = np.arange(len(fit_half)), np.arange(len(fit_half), len(order))
    label_ids = torch.tensor([label.token_id for label in labels]) if labels else None
    target = Target(probe, label_ids, hf_config.rms_norm_eps)
    candidates = fit_exits(recording, target, halves, request.classifier, request.seed, layers)
    depth = hf_config.num_hidden_layers
    exits = list(candidates)
    if request.exit_points is None:
        exits = choose_exits(candidates, depth, request.epsilon, request.delta)
    if request.classifier == "crf" and exits:
        exits = chain(exits)
    points = _levels(exits, depth, request) if exits else {}
    if request.epsilon not in points:
        raise AdaInferError(
            f"no exit point of {request.model} decides these prompts within epsilon "
            f"{request.epsilon:g}: raise --epsilon, give more rows, or try another --probe"
        )
    config = ArtifactConfig(
        base_model=Path(request.model).name if Path(request.model).is_dir() else request.model,
        architecture=hf_config.architectures[0],
        layers=depth,
        hidden_size=hf_config.hidden_size,
        vocab_size=hf_config.vocab_size,
        weights_fingerprint=recording.fingerprint,
        exit_points=tuple(fitted.layer for fitted in exits),
        probe=probe,
        candidates="labels" if labels else "full",
        labels=labels,
        features=FEATURES,
        classifier=request.classifier,
        norm_eps=hf_config.rms_norm_eps,
        epsilon=request.epsilon,
        delta=request.delta,
        levels=tuple(
            Level(
                epsilon=epsilon,
                disagreement=point.errors / point.rows,
                bound=bound_of(point, request.delta),
                layers_saved=point.layers_saved,
            )
            for epsilon, point in sorted(points.items())
        ),
    )
    answers = recording.tokens[: len(examples)]
    details = _details(request, candidates, exits, depth, answers, halves)
    save_artifact(
        request.output,
        config,
        _tensors(exits, [point for _, point in sorted(points.items())], labels),
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


def _probe_kind(request: CalibrationRequest) -> Literal["lens", "label-head", "logit-lens"]:
    if request.probe == "auto":
        return "label-head" if request.labels else "lens"
    if request.probe == "label-head" and not request.labels:
        raise AdaInferError("--probe label-head needs --labels, such as --labels negative,positive")
    return request.probe


def _check_rows(held_out: int, request: CalibrationRequest) -> None:
    """The half that certifies must be able to, even if not one answer differs."""
    needed = rows_needed(request.epsilon, request.delta)
    if held_out < needed:
        raise AdaInferError(
            f"too few rows for the bound: epsilon {request.epsilon:g} at delta "
            f"{request.delta:g} needs at least {2 * needed - 1} rows (half of them held out), "
            f"{request.data} has fewer: give more rows or raise --epsilon"
        )


def _layers(request: CalibrationRequest, depth: int) -> list[int]:
    asked = request.exit_points
    if asked is not None and (
        sorted(set(asked)) != list(asked) or not 0 < asked[0] <= asked[-1] < depth
    ):
        raise AdaInferError(
            f"--exit-points must ascend between 1 and {depth - 1} for this model of {depth} "
            f"layers, got {','.join(map(str, asked))}"
        )
    return candidate_layers(depth, asked)


def _levels(
    exits: Sequence[FittedExit], depth: int, request: CalibrationRequest
) -> dict[float, PathPoint]:
    """Every epsilon of the table that can be certified, and the asked one."""
    points = {
        epsilon: certify(exits, depth, epsilon, request.delta)
        for epsilon in {*EPSILONS, request.epsilon}
    }
    return {epsilon: point for epsilon, point in points.items() if point is not None}


def _tensors(
    exits: Sequence[FittedExit], points: Sequence[PathPoint], labels: Sequence[Label]
) -> dict[str, Tensor]:
    """What ``policy.safetensors`` holds."""
    thresholds = torch.tensor([point.threshold for point in points])
    tensors = {"thresholds": thresholds.unsqueeze(1).repeat(1, len(exits))}
    for fitted in exits:
        name, probe = f"exit.{fitted.layer}", fitted.probe
        tensors[f"{name}.classifier"] = fitted.classifier
        if probe.head_bias is not None:  # a label head
            tensors[f"{name}.head_weight"] = probe.head_weight
            tensors[f"{name}.head_bias"] = probe.head_bias
            continue
        if probe.lens_weight is not None and probe.lens_bias is not None:
            tensors[f"{name}.lens_weight"] = probe.lens_weight
            tensors[f"{name}.lens_bias"] = probe.lens_bias
        if labels and probe.norm_weight is not None:  # else the served model's own are read
            tensors["norm_weight"] = probe.norm_weight
            tensors["head_rows"] = probe.head_weight
    return tensors


def _details(
    request: CalibrationRequest,
    candidates: Sequence[FittedExit],
    exits: Sequence[FittedExit],
    depth: int,
    answers: Ints,
    halves: tuple[Ints, Ints],
) -> dict[str, Any]:
    """``calibration.json``: how it was made, and what each exit point would do alone."""
    _, counts = np.unique(answers[halves[1]], return_counts=True)
    path = walk(exits, lambda fitted: fitted.held_out, depth, threshold_grid(exits))
    return {
        "rows": len(answers),
        "rows_fitted": len(halves[0]),
        "rows_held_out": len(halves[1]),
        "seed": request.seed,
        "template": request.template,
        "labels": list(request.labels),
        "majority_share": float(counts.max() / counts.sum()),
        "agreement": {
            str(fitted.layer): float(fitted.held_out.agrees.mean()) for fitted in candidates
        },
        "risk_curve": [
            {
                "threshold": point.threshold if np.isfinite(point.threshold) else None,
                "disagreement": point.errors / point.rows,
                "bound": bound_of(point, request.delta),
                "layers_saved": point.layers_saved,
            }
            for point in path
        ],
        "provenance": provenance(),
    }
