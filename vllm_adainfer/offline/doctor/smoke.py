"""A smoke test for ``vllm-adainfer doctor``: start an engine and send it a few requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.artifact.files import load_details
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.served_schema import served_schema
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.doctor.finding import Finding, fail, ok, skip
from vllm_adainfer.offline.evaluation.measure import run
from vllm_adainfer.offline.evaluation.requests import (
    engine_settings,
    most_tokens,
    request_params,
)
from vllm_adainfer.offline.evaluation.run import Run
from vllm_adainfer.offline.pretrained import Model
from vllm_adainfer.settings.request import EXIT_ARG
from vllm_adainfer.stats import stats

if TYPE_CHECKING:
    from vllm import LLM

SENTENCES = (
    "A warm and clever film that I would gladly see again.",
    "The plot is thin and the jokes fall flat.",
    "What is the capital of Portugal?",
    "The bus leaves at nine from the station.",
    "Never have two hours felt so long.",
    "Who wrote the first book about the sea?",
)


def examine_engine(model: Model, artifact: str, config: ArtifactConfig) -> Iterator[Finding]:
    """Start an engine with an artifact that fits; run short requests with exits and without."""
    from vllm.platforms import current_platform

    tokens, schema = most_tokens(config, 1), None
    longest = model.longest_prompt(tokens)
    examples = smoke_examples(config.shared, model.tokenizer, longest)
    switch = {"artifact": artifact}
    try:
        if config.objects is not None:
            schema = served_schema(config.objects, load_details(artifact))
        settings = {**engine_settings(config), **model.engine_settings}
        engine = start_engine(model.path, examples, switch, tokens, **settings)
    except AdaInferError as error:
        yield fail(f"engine: {error}")
        return
    try:
        yield _model_class(engine)
        if current_platform.is_cuda_alike():
            counted = stats(engine)
            yield self_test_found(counted["failed_parts"], counted["not_tested"])
        asked = [
            request_params(config, None, extra, schema=schema) for extra in (None, {EXIT_ARG: 0})
        ]
        early, full = (
            run(engine, examples, [params] * len(examples), config, True, model.lora_request)
            for params in asked
        )
        yield exits_found(early, full, config.layers)
        yield full_depth_found(full, config.layers)
    except AdaInferError as error:  # from `stats`
        yield fail(f"engine: {error}")
    finally:
        stop_engine(engine)


def smoke_examples(shared: SharedTokens, tokenizer: Any, longest: int) -> list[Example]:
    """`SENTENCES` as prompts that the policy serves, cut to the `longest` that one may be."""
    room = longest - len(shared.start) - len(shared.end)
    return [
        Example("doctor", line, [*shared.start, *own[:room], *shared.end], None)
        for line in SENTENCES
        for own in [tokenizer.encode(line, add_special_tokens=False)]
    ]


def exits_found(early: Run, full: Run, depth: int) -> Finding:
    """The number of requests that exited, and of answers that are the same as at full depth."""
    count = len(early.texts)
    exits = {layer: some for layer, some in sorted(early.exit_histogram.items()) if layer < depth}
    if not exits:
        return ok(
            f"exits: none of {count} short requests exited; they are unlike the prompts of the "
            "calibration: `vllm-adainfer evaluate` measures how many of yours do"
        )
    layers = ", ".join(f"{layer} ({some})" for layer, some in exits.items())
    same = sum(map(list.__eq__, early.texts, full.texts))
    return ok(
        f"exits: {sum(exits.values())} of {count} short requests exited, after layers {layers} of "
        f"{depth}; {same} of {count} answers are the same as at full depth (the bound is for "
        "prompts like those of the calibration, and these are not)"
    )


def self_test_found(failed_parts: list[str], not_tested: str) -> Finding:
    """Whether fast paths were right on this device, see `engine/self_test`."""
    untested = f"; layers not tested: {not_tested}" if not_tested else ""
    if failed_parts:
        return fail(
            f"self-test: {', '.join(failed_parts)} gave wrong results on this device and are off; "
            f"answers are right, but slower{untested}: please report this with the engine's log"
        )
    if not_tested:
        return skip(f"self-test: not tested: {not_tested}")
    return ok("self-test: kernels, exits and graphs match the plain reference on this device")


def full_depth_found(full: Run, depth: int) -> Finding:
    """Whether requests that must not exit ran all layers."""
    count, complete = len(full.texts), full.exit_histogram.get(depth, 0)
    requests = f'requests with "{EXIT_ARG}": 0'
    # A choice may have more tokens than one, if its first token leaves it undecided.
    if set(full.exit_histogram) != {depth} or complete < count or full.layers_saved:
        return fail(
            f"full depth: only {complete} of {count} {requests} ran all {depth} layers: please "
            "report this with the output above"
        )
    return ok(f"full depth: {count} of {count} {requests} ran all {depth} layers")


def _model_class(engine: LLM) -> Finding:
    """The model class that runs, and where it runs.

    An AdaInferError if the engine runs stock vLLM, without our counters.
    """
    from vllm.platforms import current_platform

    stats(engine)
    vllm_config = engine.llm_engine.vllm_config
    [model_class] = vllm_config.model_config.hf_config.architectures
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    mode = vllm_config.compilation_config.cudagraph_mode
    graphs = "without CUDA graphs"
    if current_platform.is_cuda() and mode.name != "NONE":
        graphs = f"with CUDA graphs (vLLM's own, {mode.name}, and those of decode segments)"
    where = "a CPU" if current_platform.is_cpu() else "a GPU"
    return ok(f"engine: {model_class} runs on {where}, with Model Runner {runner}, {graphs}")
