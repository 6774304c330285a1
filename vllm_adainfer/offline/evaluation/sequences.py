"""How exits change generated texts: measures of whole texts, besides the rate per token."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.offline.reports.shares import Share

if TYPE_CHECKING:
    from vllm import LLM

Tokens = Sequence[int]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def rescore(engine: LLM, prompts: Sequence[Tokens], texts: Sequence[Tokens]) -> dict[str, Any]:
    """Score each of `texts` after its prompt, at full depth.

    With the plugin, too, a request for the log-probabilities of its prompt runs at full depth.

    Returns:
        the share of tokens that the full model would not have chosen after the text before them
        (``disagreement``), its 95 % interval, and the ``perplexity`` of the texts.

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
    wrong, total = np.zeros(len(texts)), 0.0
    for place, (output, prompt, text) in enumerate(zip(outputs, prompts, texts, strict=True)):
        for by_token, token in zip(output.prompt_logprobs[len(prompt) :], text, strict=True):
            wrong[place] += by_token[token].rank != 1
            total += by_token[token].logprob
    tokens = np.array([len(text) for text in texts], dtype=np.float64)
    found = Share(wrong, tokens, np.arange(len(texts)))
    return {
        "disagreement": found.value,
        "disagreement_95": found.interval,
        "perplexity": math.exp(-total / tokens.sum()),
    }


def compare(texts: Sequence[Tokens], full: Sequence[Tokens]) -> dict[str, Any]:
    """Compare independent `texts` with those of full depth, pair by pair.

    Returns:
        ``disagreement``, the share of tokens that differ, counted up to each text's first
        difference, after which the two continue different texts: the bound per token is about this
        share; ``same``, the share of texts that are the same to the end; their 95 % intervals; and
        ``first_divergence``, the mean index of the first token that differs, None if none does.

    """
    alone = np.arange(len(texts))
    tokens = differing(texts, full, alone)
    same = Share.of(1 - tokens.hits, alone)
    places = tokens.rows[tokens.hits == 1] - 1
    return {
        "disagreement": tokens.value,
        "disagreement_95": tokens.interval,
        "same": same.value,
        "same_95": same.interval,
        "first_divergence": float(places.mean()) if len(places) else None,
    }


def differing(texts: Sequence[Tokens], full: Sequence[Tokens], groups: Ints) -> Share:
    """The share of tokens that differ, up to each text's first difference.

    `groups` [texts] is the group of each text; groups are independent.
    """
    pairs = [(list(text), list(other)) for text, other in zip(texts, full, strict=True)]
    hits = [text != other for text, other in pairs]
    rows = [
        _first_difference(text, other) + 1 if hit else len(text)
        for hit, (text, other) in zip(hits, pairs, strict=True)
    ]
    return Share(np.array(hits, np.float64), np.array(rows, np.float64), groups)


def _first_difference(text: Tokens, other: Tokens) -> int:
    pairs = enumerate(zip(text, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(text), len(other)))


def is_number(answer: str) -> bool:
    """Whether `answer` is a number, which `has_number` can look for."""
    return _NUMBER.fullmatch(answer) is not None


def has_number(text: str, answer: str) -> bool:
    """Whether the last number in `text` equals the number `answer`, as GSM8K is scored."""
    found = _NUMBER.findall(text)
    return bool(found) and float(found[-1].replace(",", "")) == float(answer.replace(",", ""))
