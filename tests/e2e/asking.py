"""Ask an engine in this process."""

from __future__ import annotations

from collections import Counter
from typing import Any

from vllm import SamplingParams

from vllm_adainfer import stats


def greedy(**more: Any) -> SamplingParams:
    """For one greedy token, but for what is asked."""
    return SamplingParams(**{"temperature": 0, "max_tokens": 1, **more})


def outputs(llm: Any, prompts: list[list[int]], params: Any, **more: Any) -> list[Any]:
    """VLLM's outputs for requests that come together."""
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    found: list[Any] = llm.generate(inputs, params, use_tqdm=False, **more)
    return found


def ask(llm: Any, prompts: list[list[int]], params: Any, **more: Any) -> list[Any]:
    """The only completion of each."""
    return [output.outputs[0] for output in outputs(llm, prompts, params, **more)]


def tokens(llm: Any, prompts: list[list[int]], params: Any, **more: Any) -> list[list[int]]:
    """The tokens of each."""
    return [list(answer.token_ids) for answer in ask(llm, prompts, params, **more)]


def ask_and_count(
    llm: Any, prompts: list[list[int]], params: Any, **more: Any
) -> tuple[list[Any], Counter[int]]:
    """The same as `ask`, and how many tokens were decided after which layer."""
    before = Counter(stats(llm)["exit_histogram"])
    found = ask(llm, prompts, params, **more)
    return found, Counter(stats(llm)["exit_histogram"]) - before
