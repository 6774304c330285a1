"""Evaluate: run stock vLLM and vllm-adainfer on the same prompts, interleaved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact_config, load_details
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.adapter import NamedAdapter
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.evaluation.measure import measure
from vllm_adainfer.offline.evaluation.prompts import (
    load_examples,
    load_scored,
    right_answers,
)
from vllm_adainfer.offline.evaluation.report import build_report, write_whole
from vllm_adainfer.offline.evaluation.requests import engine_settings, longest_choice
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Rounds, Run
from vllm_adainfer.offline.evaluation.sequences import compare, rescore
from vllm_adainfer.offline.pretrained import Model, load_model
from vllm_adainfer.offline.reports.installed import check_installed

if TYPE_CHECKING:
    from vllm import LLM


@dataclass(frozen=True)
class EvaluationRequest:
    """The command line's arguments; see `vllm-adainfer evaluate --help`."""

    model: str
    artifact: str
    data: Path
    hf_overrides: Mapping[str, Any] | None = None
    template: str | None = None
    chat_template: str | None = None
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
    model = load_model(request.model, config, request.adapter, request.hf_overrides)
    if request.epsilon is not None:
        config = _with_one_level(config, request.epsilon)
    max_tokens = _max_tokens(request.max_tokens, config)
    generated = longest_choice(config.choices) if config.choices else max_tokens
    longest = model.longest_prompt(generated)
    if config.score_head is not None:
        examples = load_scored(
            request.data,
            request.template,
            request.chat_template,
            request.label_field,
            request.labels,
            config,
            model,
            longest,
        )
    elif request.chat_template is not None:
        raise AdaInferError(
            "--chat-template joins the queries and documents of a reranker, and the artifact is "
            "for a model that generates: drop it"
        )
    else:
        examples = load_examples(
            request.data,
            request.template,
            request.label_field,
            request.labels,
            config,
            model.tokenizer,
            longest,
        )
    rounds, texts = _measure(request, model, config, examples, max_tokens, generated)
    right_in = partial(right_answers, examples, config, model.tokenizer, max_tokens)
    report = build_report(request.artifact, request.data, config, examples, right_in, rounds)
    if texts is not None:
        report |= {"max_tokens": max_tokens, "texts": texts}
    if request.report is not None:
        write_whole(request.report, json.dumps(report, indent=2) + "\n")
    if request.html is not None:
        from vllm_adainfer.offline.evaluation.changed import changed_prompts
        from vllm_adainfer.offline.reports.contents import evaluation_page

        changed, notes = None, list[str]()
        if request.prompts:
            runs = rounds[0][1]
            changed, notes = changed_prompts(
                model, request.artifact, config, examples, runs, max_tokens
            )
        details = load_details(request.artifact)
        write_whole(request.html, evaluation_page(report, config, details, changed, notes).html())
    return report


def _measure(
    request: EvaluationRequest,
    model: Model,
    config: ArtifactConfig,
    examples: Sequence[Example],
    max_tokens: int,
    generated: int,
) -> tuple[Rounds, dict[str, Any] | None]:
    """The runs of both engines, and a comparison of generated texts, None for one token.

    `generated` is the most tokens that a request can generate.
    """
    epsilons = [NEVER_EXIT, *(level.epsilon for level in config.levels)]
    settings = {**engine_settings(config), **model.engine_settings}
    # Ours first, so that an artifact for other weights is refused before stock vLLM compiles.
    switch = {"artifact": request.artifact}
    with ExitStack() as stack:
        ours = start_engine(model.path, examples, switch, generated, **settings)
        stack.callback(stop_engine, ours)
        stock = start_engine(model.path, examples, None, generated, **settings)
        stack.callback(stop_engine, stock)
        adapter, repeat = model.lora_request, request.repeat
        rounds = measure(stock, ours, examples, config, epsilons, repeat, max_tokens, adapter)
        if max_tokens == 1:
            return rounds, None
        scorer = stock if model.adapter is None else None  # see `serves_prompt_logprobs`
        return rounds, _compare_texts(scorer, examples, rounds[0], config.epsilon)


def _with_one_level(config: ArtifactConfig, epsilon: float) -> ArtifactConfig:
    """The config as if `epsilon` were the only bound.

    Raises:
        AdaInferError: `epsilon` was not certified.

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


def _max_tokens(given: int | None, config: ArtifactConfig) -> int:
    """The number of tokens to generate, by default as many as at calibration.

    Raises:
        AdaInferError: more than one, for an artifact that was calibrated on one.

    """
    if given is not None and given > 1 and config.max_tokens == 1:
        raise AdaInferError(
            f"--max-tokens {given}: the artifact was calibrated on one token, so requests for more "
            "would run at full depth: calibrate with --max-tokens"
        )
    return config.max_tokens if given is None else given


def _compare_texts(
    scorer: LLM | None,
    examples: Sequence[Example],
    first_round: tuple[Run, dict[float, Run]],
    epsilon: float,
) -> dict[str, Any]:
    """Compare the texts of stock vLLM, and ours at `epsilon`, with those of never exiting.

    The stock engine `scorer` rescores them; None leaves that out.
    """
    baseline, by_epsilon = first_round
    never, prompts = by_epsilon[NEVER_EXIT].texts, [example.token_ids for example in examples]
    return {
        name: {
            **asdict(compare(texts, never)),
            **({} if scorer is None else {"read_back": rescore(scorer, prompts, texts)}),
        }
        for name, texts in (
            ("stock", baseline.texts),
            ("never_exit", never),
            ("adainfer", by_epsilon[epsilon].texts),
        )
    }
