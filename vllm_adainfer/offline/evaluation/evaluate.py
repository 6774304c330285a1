"""Evaluate: run stock vLLM and vllm-adainfer on the same prompts, interleaved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import load_artifact_config, load_details
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.adapter import NamedAdapter
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.served_schema import served_schema
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.evaluation.changed import changed_prompts
from vllm_adainfer.offline.evaluation.measure import measure
from vllm_adainfer.offline.evaluation.prompts import load_examples, right_answers
from vllm_adainfer.offline.evaluation.report import build_report, write_whole
from vllm_adainfer.offline.evaluation.requests import engine_settings, most_tokens
from vllm_adainfer.offline.evaluation.rounds import ROUNDS
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.evaluation.same_pass import compare_in_same_pass
from vllm_adainfer.offline.evaluation.sequences import compare, rescore
from vllm_adainfer.offline.pretrained import load_model
from vllm_adainfer.offline.reports.contents import evaluation_page
from vllm_adainfer.offline.reports.page import check_installed

if TYPE_CHECKING:
    from vllm import LLM


def evaluate(
    model: str,
    artifact: str,
    data: Path,
    hf_overrides: Mapping[str, Any] | None = None,
    template: str | None = None,
    chat_template: str | None = None,
    label_field: str = "label",
    labels: tuple[str, ...] = (),
    repeat: int = ROUNDS,
    max_tokens: int | None = None,
    epsilon: float | None = None,
    adapter: NamedAdapter | None = None,
    report: Path | None = None,
    html: Path | None = None,
    prompts: bool = True,
    schema: Path | None = None,
) -> dict[str, Any]:
    """Measure both engines; write the report and the page if asked to. Returns the report.

    The arguments are those of the command line, see `vllm-adainfer evaluate --help`.

    Raises:
        AdaInferError: input, model and artifact do not fit together, or a file cannot be
            written, or a page is asked for and its libraries are missing.

    """
    for path in (report, html):
        if path is not None:
            check_file(path)
    if html is not None:
        check_installed()
    config = load_artifact_config(artifact)
    objects = config.objects
    if objects is None and schema is not None:
        raise AdaInferError("--schema is for objects, which the artifact is not for: drop it")
    details = {} if html is None and objects is None else load_details(artifact)
    text = None if objects is None else served_schema(objects, details, schema)
    loaded = load_model(model, config, adapter, hf_overrides)
    if epsilon is not None:
        config = _with_one_level(config, epsilon)
    count = _max_tokens(max_tokens, config)
    generated = most_tokens(config, count)
    longest = loaded.longest_prompt(generated)
    examples = load_examples(
        data, template, chat_template, label_field, labels, config, loaded, longest, text
    )
    epsilons = [NEVER_EXIT, *(level.epsilon for level in config.levels)]
    settings = {**engine_settings(config), **loaded.engine_settings}
    with ExitStack() as stack:

        def start(switch: dict[str, Any] | None) -> LLM:
            engine = start_engine(loaded.path, examples, switch, generated, **settings)
            stack.callback(stop_engine, engine)
            return engine

        # Ours first, so that an artifact for other weights is refused before stock vLLM compiles.
        ours, stock = start({"artifact": artifact, "compare": True}), start(None)
        lora = loaded.lora_request
        same_pass = compare_in_same_pass(ours, examples, config, epsilons[1:], count, lora)
        measured = measure(stock, ours, examples, config, epsilons, repeat, count, lora)
        rounds = measured.passes
        texts = {}
        if count > 1:
            scorer = stock if loaded.adapter is None else None  # see `serves_prompt_logprobs`
            compared = _compare_texts(scorer, examples, rounds[0], config.epsilon)
            texts = {"max_tokens": count, "texts": compared}
    right_in = partial(right_answers, examples, config, loaded.tokenizer, count)
    found = texts | build_report(
        artifact,
        data,
        config,
        examples,
        right_in,
        rounds,
        measured.times,
        same_pass,
        measured.again,
    )
    if report is not None:
        write_whole(report, json.dumps(found, indent=2) + "\n")
    if html is not None:
        changed, notes = None, list[str]()
        if prompts:
            runs = rounds[0][1]
            changed, notes = changed_prompts(loaded, artifact, config, examples, runs, count)
        write_whole(html, evaluation_page(found, config, details, changed, notes))
    return found


def _with_one_level(config: ArtifactConfig, epsilon: float) -> ArtifactConfig:
    """The config with `epsilon` as its only bound; an AdaInferError if it was not certified."""
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

    An AdaInferError for more than one, if the artifact was calibrated on one, or on objects.
    """
    if given is not None and config.objects is not None:
        raise AdaInferError("requests for an object have room for any of them: drop --max-tokens")
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
            **compare(texts, never),
            **({} if scorer is None else {"read_back": rescore(scorer, prompts, texts)}),
        }
        for name, texts in (
            ("stock", baseline.texts),
            ("never_exit", never),
            ("adainfer", by_epsilon[epsilon].texts),
        )
    }
