"""Evaluate: run stock vLLM and vllm-adainfer on the same prompts, interleaved."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact_config, load_details
from vllm_adainfer.engine.admission.requested_output import OutputKind, RequestedOutput
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.adapter import NamedAdapter, adapter_for
from vllm_adainfer.offline.calibration.batch_files import are_requests, read_requests
from vllm_adainfer.offline.calibration.choices import common_choices, find_choices, with_labels
from vllm_adainfer.offline.calibration.data import (
    Example,
    Row,
    check_labels_known,
    find_labels,
    first_token,
    make_examples,
    read_rows,
    read_template,
)
from vllm_adainfer.offline.calibration.engine import start_engine, stop_engine
from vllm_adainfer.offline.evaluation.measure import measure
from vllm_adainfer.offline.evaluation.readings import engine_settings, room_for, what_is_read
from vllm_adainfer.offline.evaluation.report import build_report, write_whole
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.evaluation.sequences import (
    Tokens,
    compare,
    has_number,
    is_number,
    read_back,
)
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.reports.installed import check_installed

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class EvaluationRequest:
    """The command line's arguments; see `vllm-adainfer evaluate --help`."""

    model: str
    artifact: str
    data: Path
    template: str | None = None
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    repeat: int = 3
    max_tokens: int | None = None
    epsilon: float | None = None
    adapter: NamedAdapter | None = None
    report: Path | None = None
    html: Path | None = None
    prompts: bool = True


def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """Measure both engines; write the report and the page if asked to.

    Returns:
        the report.

    Raises:
        AdaInferError: input, model and artifact do not fit together, or a file cannot be
            written, or a page is asked for and its libraries are missing.

    """
    for path in (request.report, request.html):
        if path is not None:
            check_file(path)
    if request.html is not None:
        check_installed()
    config = load_artifact_config(request.artifact)
    adapter = adapter_for(config, request.adapter)
    rows = read_rows(request.data)
    hf_config, tokenizer = load_config_and_tokenizer(request.model)
    config.check_served_by(hf_config)
    if request.epsilon is not None:
        config = _only(config, request.epsilon)
    max_tokens = _max_tokens(request.max_tokens, config)
    room = room_for(config.choices) if config.choices else max_tokens
    longest = hf_config.max_position_embeddings - room
    if are_requests(rows):
        examples = _requests(request, config, rows, tokenizer, longest)
    else:
        template = read_template(request.template)
        examples = make_examples(rows, tokenizer, template, request.label_field, longest)
        if config.choices:
            examples = _with_choices(config, request, examples, tokenizer)
        elif config.labels:
            _check_labels(config, request, examples, tokenizer)
    epsilons = [NEVER_EXIT, *(level.epsilon for level in config.levels)]
    what = what_is_read(config)
    settings = engine_settings(what, config.labels)
    if adapter is not None:
        settings |= adapter.engine_settings
    # Ours first, so that an artifact for other weights is refused before stock vLLM compiles.
    switch = {"artifact": request.artifact}
    ours = start_engine(request.model, examples, switch, room, **settings)
    try:
        stock = start_engine(request.model, examples, None, room, **settings)
        try:
            rounds = measure(
                stock,
                ours,
                examples,
                config.labels,
                epsilons,
                request.repeat,
                max_tokens,
                what,
                config.choices,
                adapter and adapter.request,
            )
            texts = None
            if max_tokens > 1:
                reader = None if adapter is not None else stock  # see `compat`
                texts = _read_texts(reader, examples, rounds[0], config.epsilon)
        finally:
            stop_engine(stock)
    finally:
        stop_engine(ours)
    right_in = partial(_right, examples, config, tokenizer, max_tokens)
    report = build_report(request.artifact, request.data, config, examples, right_in, rounds)
    if texts is not None:
        report |= {"max_tokens": max_tokens, "texts": texts}
    if request.report is not None:
        write_whole(request.report, (json.dumps(report, indent=2) + "\n").encode())
    if request.html is not None:
        from vllm_adainfer.offline.evaluation.changed import Model, changed_prompts
        from vllm_adainfer.offline.reports.contents import evaluation_page

        changed, notes = None, list[str]()
        if request.prompts:
            model = Model(request.model, hf_config, tokenizer, adapter)
            changed, notes = changed_prompts(
                model, request.artifact, config, examples, rounds[0][1], max_tokens
            )
        details = load_details(request.artifact)
        write_whole(request.html, evaluation_page(report, config, details, changed, notes).html())
    return report


def _only(config: ArtifactConfig, epsilon: float) -> ArtifactConfig:
    """The config as if `epsilon` were the only bound that was certified.

    Raises:
        AdaInferError: it was not.

    """
    found = [level for level in config.levels if level.epsilon == epsilon]
    if not found:
        certified = ", ".join(f"{level.epsilon:g}" for level in config.levels)
        raise AdaInferError(
            f"--epsilon {epsilon:g} was not certified for this artifact: choose one of {certified}"
        )
    return config.model_copy(update={"levels": tuple(found), "epsilon": epsilon})


def check_file(path: Path) -> None:
    """Check that a file can be written, before the measurement starts."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise AdaInferError(f"cannot write {path}: choose a file in a directory that is writable")


def _requests(
    request: EvaluationRequest,
    config: ArtifactConfig,
    rows: Sequence[Row],
    tokenizer: Any,
    longest: int,
) -> list[Example]:
    """Prompts from requests, each about labels that the policy serves.

    Raises:
        AdaInferError: one is about others, or the command line names labels or a template.

    """
    if request.template is not None or request.labels or config.max_tokens > 1:
        raise AdaInferError(
            f"{request.data} holds requests, which bring their prompts, labels and one token each: "
            "drop --template and --labels, and take an artifact for labels"
        )
    examples = read_requests(rows, tokenizer, config.vocab_size, longest)
    if config.choices:
        texts = [choice.text for choice in config.choices]
        examples, _ = common_choices(examples, texts)
        return _with_choices(config, request, examples, tokenizer)
    for example in examples:
        wanted = RequestedOutput(OutputKind.TOKEN, frozenset(example.labels or ()))
        if not wanted.is_promised_by(config):
            raise AdaInferError(
                f"{example.place} is about the labels "
                f"{', '.join(map(repr, map(tokenizer.decode, example.labels or ())))}, which this "
                "policy does not serve: calibrate with --label-pool"
            )
    return examples


def _with_choices(
    config: ArtifactConfig, request: EvaluationRequest, examples: Sequence[Example], tokenizer: Any
) -> list[Example]:
    """The examples with labels as choices are written; check that these are the artifact's."""
    texts = [choice.text for choice in config.choices]
    if request.labels:
        raise AdaInferError("the artifact is for choices, which it names itself: drop --labels")
    if find_choices(texts, tokenizer, config.vocab_size).texts != config.choices:
        raise AdaInferError(
            "this model's tokenizer writes the choices with other tokens than at calibration: use "
            "the model of the calibration"
        )
    return with_labels(examples, texts)


def _check_labels(
    config: ArtifactConfig, request: EvaluationRequest, examples: Sequence[Example], tokenizer: Any
) -> None:
    """Check that the labels begin with the same tokens as at calibration."""
    names = [label.name for label in config.labels]
    if request.labels and set(request.labels) != set(names):
        raise AdaInferError(
            f"--labels {','.join(request.labels)} are not those of the artifact: {','.join(names)}"
        )
    found = find_labels(names, examples[0], tokenizer)
    if found != config.labels:
        raise AdaInferError(
            "after this prompt the labels begin with other tokens than at calibration: use the "
            "template and the model of the calibration"
        )
    check_labels_known(examples, config.labels)


def _max_tokens(asked: int | None, config: ArtifactConfig) -> int:
    """How many tokens to generate: by default as many as at calibration.

    Raises:
        AdaInferError: more than one, for an artifact that was calibrated on one.

    """
    if asked is not None and asked > 1 and config.max_tokens == 1:
        raise AdaInferError(
            f"--max-tokens {asked}: the artifact was calibrated on one token, so requests for more "
            "would run at full depth: calibrate with --max-tokens"
        )
    return config.max_tokens if asked is None else asked


def _read_texts(
    reader: LLM | None,
    examples: Sequence[Example],
    first_round: tuple[Run, dict[float, Run]],
    epsilon: float,
) -> dict[str, Any]:
    """Compare whole texts with those of never exiting: stock's, and ours at `epsilon`.

    `reader` reads them back, a stock engine; without one that is left out.
    """
    baseline, by_epsilon = first_round
    never, prompts = by_epsilon[NEVER_EXIT].texts, [example.token_ids for example in examples]
    return {
        name: {
            **asdict(compare(texts, never)),
            **({} if reader is None else {"read_back": asdict(read_back(reader, prompts, texts))}),
        }
        for name, texts in (
            ("stock", baseline.texts),
            ("never_exit", never),
            ("adainfer", by_epsilon[epsilon].texts),
        )
    }


def _right(
    examples: Sequence[Example],
    config: ArtifactConfig,
    tokenizer: Any,
    max_tokens: int,
    texts: Sequence[Tokens],
) -> list[bool] | None:
    """Which answers are right, by the label's first token or by a text's last number.

    None if a row has no label, or if texts are generated and a label is not a number.
    """
    if any(example.label is None for example in examples):
        return None
    answers = [str(example.label) for example in examples]
    if config.choices:
        written = {choice.text: list(choice.token_ids) for choice in config.choices}
        pairs = zip(texts, answers, strict=True)
        return [list(text) == written[answer] for text, answer in pairs]
    if max_tokens > 1:
        if not all(map(is_number, answers)):
            return None
        decoded = map(tokenizer.decode, texts)
        return [*map(has_number, decoded, answers)]
    if examples[0].labels is not None:  # of a request, the right token
        truth = [int(answer) for answer in answers]
    elif config.labels:
        ids = {label.name: label.token_id for label in config.labels}
        truth = [ids[answer] for answer in answers]
    else:
        truth = [
            first_token(example.text, answer, tokenizer)
            for example, answer in zip(examples, answers, strict=True)
        ]
    return [text[0] == token for text, token in zip(texts, truth, strict=True)]
