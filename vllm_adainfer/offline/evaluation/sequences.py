"""How exits change generated texts: measures of whole texts, beside the rate per token."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM

Tokens = Sequence[int]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class ReadBack:
    """What the full model says, token by token, about texts written with exits.

    Attributes:
        disagreement: share of tokens that are not its own choice after the text before them.
        perplexity: of the texts, given their prompts.

    """

    disagreement: float
    perplexity: float


def read_back(engine: LLM, prompts: Sequence[Tokens], texts: Sequence[Tokens]) -> ReadBack:
    """Let `engine` read each of `texts` after its prompt, at full depth.

    With the plugin too, a request for log-probabilities of its prompt runs at full depth.
    """
    from vllm import SamplingParams

    outputs = engine.generate(
        [
            {"prompt_token_ids": [*prompt, *text]}
            for prompt, text in zip(prompts, texts, strict=True)
        ],
        SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1),
        use_tqdm=False,
    )
    wrong, total, tokens = 0, 0.0, 0
    for output, prompt, text in zip(outputs, prompts, texts, strict=True):
        for by_token, token in zip(output.prompt_logprobs[len(prompt) :], text, strict=True):
            wrong += by_token[token].rank != 1
            total += by_token[token].logprob
            tokens += 1
    return ReadBack(wrong / tokens, math.exp(-total / tokens))


@dataclass(frozen=True)
class Comparison:
    """How texts differ from those of full depth.

    Attributes:
        disagreement: share of tokens that differ, up to each text's first difference (after that,
            the two continue different texts). The bound per token is on this.
        same: share of texts that are the same to the end.
        first_divergence: mean position of the first token that differs, over the texts that
            differ; None if none does.

    """

    disagreement: float
    same: float
    first_divergence: float | None


def compare(texts: Sequence[Tokens], full: Sequence[Tokens]) -> Comparison:
    """Compare each of `texts` with that of full depth at the same index."""
    pairs = list(zip(texts, full, strict=True))
    places = [_first_difference(*pair) for pair in pairs if list(pair[0]) != list(pair[1])]
    equal = sum(len(text) for text, other in pairs if list(text) == list(other))
    return Comparison(
        disagreement=len(places) / (equal + sum(places) + len(places)),
        same=1 - len(places) / len(texts),
        first_divergence=sum(places) / len(places) if places else None,
    )


def _first_difference(text: Tokens, other: Tokens) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def is_number(answer: str) -> bool:
    """Whether `answer` is a number, so that `has_number` can score texts."""
    return _NUMBER.fullmatch(answer) is not None


def has_number(text: str, answer: str) -> bool:
    """Whether the last number in `text` is `answer`, a number: the way GSM8K is scored."""
    found = _NUMBER.findall(text)
    return bool(found) and float(found[-1].replace(",", "")) == float(answer.replace(",", ""))
