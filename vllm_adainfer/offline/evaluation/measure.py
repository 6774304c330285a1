"""Measure stock vLLM and vllm-adainfer on the same prompts, in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.collect import best_column
from vllm_adainfer.offline.evaluation.requests import (
    chosen,
    class_logprobs,
    label_logprobs,
    request_params,
    value_logprobs,
)
from vllm_adainfer.offline.evaluation.rounds import slice_of, turns
from vllm_adainfer.offline.evaluation.run import Measured, Run, Times
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.settings.request import EPSILON_ARG
from vllm_adainfer.stats import stats

if TYPE_CHECKING:
    from vllm import LLM, PoolingParams, SamplingParams
    from vllm.lora.request import LoRARequest

WARM_UP = 64  # prompts


def measure(
    stock: LLM,
    ours: LLM,
    examples: Sequence[Example],
    config: ArtifactConfig,
    epsilons: Sequence[float],
    rounds: int,
    max_tokens: int = 1,
    adapter: LoRARequest | None = None,
) -> Measured:
    """Warm up, run all prompts once on each side, then time sides in turn, in short rounds.

    The sides are stock vLLM, and ours at each epsilon. Stock vLLM runs all prompts once more, the
    last one first, so that other batches round. Each of `rounds` takes a third of the prompts, the
    same for all sides, see `slice_of`.

    Both engines were started with the `engine_settings` of `config`, the artifact's, which
    determines what the requests ask for.
    """
    sides = [None, *epsilons]

    def once(epsilon: float | None, prompts: Sequence[Example]) -> Run:
        extra_args = None if epsilon is None else {EPSILON_ARG: epsilon}
        engine = stock if epsilon is None else ours
        params = [
            request_params(config, one.labels, extra_args, max_tokens, one.schema)
            for one in prompts
        ]
        return run(engine, prompts, params, config, engine is ours, adapter)

    once(None, examples[:WARM_UP])
    once(epsilons[-1], examples[:WARM_UP])
    answers = {side: once(side, examples) for side in progress(sides, desc="answers", unit="run")}
    again = once(None, examples[::-1]).texts[::-1]
    seconds: dict[float | None, list[float]] = {side: [] for side in sides}
    for number, side in turns(sides, rounds):
        seconds[side].append(once(side, slice_of(examples, number, WARM_UP)).seconds)
    requests = [len(slice_of(examples, number, WARM_UP)) for number in range(rounds)]
    by_epsilon = {epsilon: answers[epsilon] for epsilon in epsilons}
    return Measured([(answers[None], by_epsilon)], Times(seconds, requests), again)


def run(
    engine: LLM,
    examples: Sequence[Example],
    params: Sequence[SamplingParams | PoolingParams],
    config: ArtifactConfig,
    counted: bool,
    adapter: LoRARequest | None,
) -> Run:
    """Run prompts, starting from an empty prefix cache.

    `counted`: whether the engine has the plugin, which counts layers; an AdaInferError if it runs
    stock vLLM.
    """
    engine.reset_prefix_cache()
    before = stats(engine) if counted else None
    prompts = [{"prompt_token_ids": example.token_ids} for example in examples]
    start, written = time.perf_counter(), list[list[int]]()
    if config.score_head is None:
        outputs = engine.generate(prompts, params, lora_request=adapter, use_tqdm=False)
        seconds = time.perf_counter() - start
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        if (objects := config.objects) is not None:
            written = texts
            texts = [[objects.code_of(output.outputs[0].text)] for output in outputs]
        if config.choices:
            texts = chosen(outputs, config.choices)
        logprobs = None
        if outputs[0].outputs[0].logprobs and objects is None:
            logprobs = label_logprobs(outputs, config.labels)
        elif outputs[0].outputs[0].logprobs and objects is not None:
            codes = [code for [code] in texts]
            logprobs = value_logprobs(outputs, objects, codes, engine.get_tokenizer())
    else:
        scored = engine.encode(prompts, params, pooling_task="classify", use_tqdm=False)
        seconds = time.perf_counter() - start
        texts = [[best_column(output.outputs.data)] for output in scored]
        logprobs = class_logprobs(scored)
    if before is None:
        return Run(seconds, texts, logprobs=logprobs, written=written)
    return Run.counted(seconds, texts, before, stats(engine), logprobs, written)
