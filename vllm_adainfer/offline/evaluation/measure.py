"""Measure: stock vLLM and vllm-adainfer on the same prompts, in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_adainfer.artifact.config import Choice, Label
from vllm_adainfer.engine.admission.requested_output import OutputKind
from vllm_adainfer.offline.calibration.data import Example
from vllm_adainfer.offline.evaluation.readings import (
    choice_params,
    chosen,
    label_logprobs,
    request_params,
)
from vllm_adainfer.offline.evaluation.run import Run
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.settings.request import EPSILON_ARG
from vllm_adainfer.stats import stats

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

WARM_UP = 64


def measure(
    stock: LLM,
    ours: LLM,
    examples: Sequence[Example],
    labels: Sequence[Label],
    epsilons: Sequence[float],
    repeat: int,
    max_tokens: int = 1,
    what: OutputKind = OutputKind.TOKEN,
    choices: Sequence[Choice] = (),
    adapter: LoRARequest | None = None,
) -> list[tuple[Run, dict[float, Run]]]:
    """Warm up, then run `repeat` rounds: stock once, then vllm-adainfer at each epsilon.

    Args:
        stock: an engine without the plugin.
        ours: an engine with it.
        examples: the prompts.
        labels: the answers are restricted to these, or their probabilities are read; of a request
            those that it names.
        epsilons: of our runs.
        repeat: how many rounds.
        max_tokens: tokens to generate after a prompt.
        what: the requests read; both engines were started with its `engine_settings`.
        choices: that they choose from, if they read a choice.
        adapter: of all requests; None for the base model.

    Returns:
        for each round, stock's run and ours by epsilon.

    """
    asked = labels, choices, max_tokens, what, adapter
    _run(stock, examples[:WARM_UP], None, *asked)
    _run(ours, examples[:WARM_UP], epsilons[-1], *asked)
    rounds = []
    steps = repeat * (1 + len(epsilons))
    with progress(total=steps, desc="evaluate", unit="run") as done:
        for _ in range(repeat):
            baseline = _run(stock, examples, None, *asked)
            done.update()
            by_epsilon = {}
            for epsilon in epsilons:
                by_epsilon[epsilon] = _run(ours, examples, epsilon, *asked)
                done.update()
            rounds.append((baseline, by_epsilon))
    return rounds


def _run(
    engine: LLM,
    examples: Sequence[Example],
    epsilon: float | None,
    labels: Sequence[Label],
    choices: Sequence[Choice],
    max_tokens: int,
    what: OutputKind,
    adapter: LoRARequest | None,
) -> Run:
    """One pass from an empty prefix cache; `epsilon` is None for stock vLLM."""
    engine.reset_prefix_cache()
    before = None if epsilon is None else stats(engine)
    arguments = None if epsilon is None else {EPSILON_ARG: epsilon}
    ids = tuple(label.token_id for label in labels)
    params = [
        choice_params(choices, arguments)
        if choices
        else request_params(what, example.labels or ids, arguments, max_tokens)
        for example in examples
    ]
    prompts = [{"prompt_token_ids": example.token_ids} for example in examples]
    start = time.perf_counter()
    outputs = engine.generate(prompts, params, lora_request=adapter, use_tqdm=False)
    seconds = time.perf_counter() - start
    texts = [list(output.outputs[0].token_ids) for output in outputs]
    if choices:
        texts = chosen(outputs, choices)
    reads_probabilities = what in (OutputKind.AMONG_LABELS, OutputKind.IN_VOCABULARY)
    logprobs = label_logprobs(outputs, labels) if reads_probabilities else None
    if before is None:
        return Run(seconds, texts, logprobs=logprobs)
    return Run.counted(seconds, texts, before, stats(engine), logprobs)
