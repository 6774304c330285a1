"""Evaluate: stock vLLM and vllm-adainfer side by side on the same prompts, interleaved."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact import ArtifactConfig, Label, load_artifact
from vllm_adainfer.calibration.calibrate import load_config
from vllm_adainfer.calibration.data import (
    Example,
    check_labels_known,
    find_labels,
    first_token,
    make_examples,
    read_rows,
    read_template,
)
from vllm_adainfer.calibration.engine import start_engine, stop_engine
from vllm_adainfer.calibration.measure import measure
from vllm_adainfer.calibration.report import NEVER_EXIT, build_report, write_whole
from vllm_adainfer.errors import AdaInferError


@dataclass(frozen=True)
class EvaluationRequest:
    """What the command line says; see `vllm-adainfer evaluate --help`."""

    model: str
    artifact: str
    data: Path
    template: str | None = None
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    repeat: int = 3
    report: Path | None = None
    plot: Path | None = None


def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """Measure both engines and write what was asked for.

    Returns:
        the report.

    Raises:
        AdaInferError: input, model and artifact do not fit together, or a file cannot be
            written.

    """
    for path in (request.report, request.plot):
        if path is not None:
            check_file(path)
    config = load_artifact(request.artifact).config
    rows = read_rows(request.data)
    hf_config, tokenizer = load_config(request.model)
    config.check_served_by(hf_config)
    template = read_template(request.template)
    longest = hf_config.max_position_embeddings - 1
    examples = make_examples(rows, tokenizer, template, request.label_field, longest)
    if config.labels:
        _check_labels(config, request, examples, tokenizer)
    epsilons = [NEVER_EXIT, *(level.epsilon for level in config.levels)]
    # Ours first: an artifact for other weights is refused before stock vLLM compiles.
    ours = start_engine(request.model, examples, {"artifact": request.artifact})
    try:
        stock = start_engine(request.model, examples)
        try:
            rounds = measure(stock, ours, examples, config.labels, epsilons, request.repeat)
        finally:
            stop_engine(stock)
    finally:
        stop_engine(ours)
    truth = _true_tokens(examples, config.labels, tokenizer)
    report = build_report(request.artifact, request.data, config, examples, truth, rounds)
    if request.report is not None:
        write_whole(request.report, (json.dumps(report, indent=2) + "\n").encode())
    if request.plot is not None:
        from vllm_adainfer.calibration.plot import report_plot

        write_whole(request.plot, report_plot(report))
    return report


def check_file(path: Path) -> None:
    """Fail before the measurement, not after it."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise AdaInferError(f"cannot write {path}: choose a file in a directory you may write to")


def _check_labels(
    config: ArtifactConfig, request: EvaluationRequest, examples: Sequence[Example], tokenizer: Any
) -> None:
    """The artifact's labels must decide these prompts as they decided the calibration's."""
    names = [label.name for label in config.labels]
    if request.labels and set(request.labels) != set(names):
        raise AdaInferError(
            f"--labels {','.join(request.labels)} are not those of the artifact: {','.join(names)}"
        )
    found = find_labels(names, examples[0], tokenizer)
    if found != config.labels:
        raise AdaInferError(
            "the labels begin with other tokens after this prompt than at calibration: use the "
            "template and model of the calibration"
        )
    check_labels_known(examples, config.labels)


def _true_tokens(
    examples: Sequence[Example], labels: Sequence[Label], tokenizer: Any
) -> list[int] | None:
    """The token each row's label begins with; None where the data has no labels."""
    if any(example.label is None for example in examples):
        return None
    if labels:
        ids = {label.name: label.token_id for label in labels}
        return [ids[str(example.label)] for example in examples]
    return [first_token(example.text, str(example.label), tokenizer) for example in examples]
