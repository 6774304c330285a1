"""Measure stock vLLM and vllm-adainfer on the same prompts, in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.calibration.data import Example
from vllm_adainfer.offline.evaluation.requests import chosen, label_logprobs, request_params
from vllm_adainfer.offline.evaluation.run import Rounds, Run
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.settings.request import EPSILON_ARG
from vllm_adainfer.stats import stats

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

WARM_UP = 64  # prompts


def measure(
    stock: LLM,
    ours: LLM,
    examples: Sequence[Example],
    config: ArtifactConfig,
    epsilons: Sequence[float],
    repeat: int,
    max_tokens: int = 1,
    adapter: LoRARequest | None = None,
) -> Rounds:
    """Warm up, then run `repeat` rounds: stock once, then vllm-adainfer at each epsilon.

    Args:
        stock: an engine without the plugin.
        ours: an engine with it. Both were started with the `engine_settings` of `config`.
        examples: the prompts.
        config: the artifact's config, which determines what the requests ask for.
        epsilons: the bounds to measure.
        repeat: number of rounds.
        max_tokens: tokens to generate per prompt.
        adapter: LoRA adapter of all requests; None for the base model.

    """

    def run(engine: LLM, epsilon: float | None, prompts: Sequence[Example] = examples) -> Run:
        return _run(engine, prompts, epsilon, config, max_tokens, adapter)

    run(stock, None, examples[:WARM_UP])
    run(ours, epsilons[-1], examples[:WARM_UP])
    rounds = []
    with progress(total=repeat * (1 + len(epsilons)), desc="evaluate", unit="run") as done:
        for _ in range(repeat):
            baseline = run(stock, None)
            done.update()
            by_epsilon = {}
            for epsilon in epsilons:
                by_epsilon[epsilon] = run(ours, epsilon)
                done.update()
            rounds.append((baseline, by_epsilon))
    return rounds


def _run(
    engine: LLM,
    examples: Sequence[Example],
    epsilon: float | None,
    config: ArtifactConfig,
    max_tokens: int,
    adapter: LoRARequest | None,
) -> Run:
    """One pass, starting from an empty prefix cache; `epsilon` is None for stock vLLM."""
    engine.reset_prefix_cache()
    before = None if epsilon is None else stats(engine)
    arguments = None if epsilon is None else {EPSILON_ARG: epsilon}
    params = [request_params(config, one.labels, arguments, max_tokens) for one in examples]
    prompts = [{"prompt_token_ids": example.token_ids} for example in examples]
    start = time.perf_counter()
    outputs = engine.generate(prompts, params, lora_request=adapter, use_tqdm=False)
    seconds = time.perf_counter() - start
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    if config.choices:
        texts = chosen(outputs, config.choices)
    logprobs = label_logprobs(outputs, config.labels) if config.risk == "probability" else None
    if before is None:
        return Run(seconds, texts, logprobs=logprobs)
    return Run.counted(seconds, texts, before, stats(engine), logprobs)
