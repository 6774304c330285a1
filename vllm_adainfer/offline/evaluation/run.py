"""One run of an evaluation: what an engine did with all prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_adainfer.offline.evaluation.probabilities import Logprobs

NEVER_EXIT = 0.0


@dataclass(frozen=True)
class Run:
    """One pass over all prompts: how long it took, and the tokens of each answer.

    `logprobs` are the labels' log-probabilities, [prompts, labels], if they were read.
    """

    seconds: float
    texts: list[list[int]]
    layers_run: int = 0
    layers_possible: int = 0
    passes_run: int = 0
    passes_possible: int = 0
    exit_histogram: Mapping[int, int] | None = None
    logprobs: Logprobs | None = None

    @classmethod
    def counted(
        cls,
        seconds: float,
        texts: list[list[int]],
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        logprobs: Logprobs | None = None,
    ) -> Run:
        """A pass of ours, given the engine's `stats` before and after it."""
        counters = "layers_run", "layers_possible", "passes_run", "passes_possible"
        left = Counter(after["exit_histogram"]) - Counter(before["exit_histogram"])
        spent: dict[str, int] = {name: after[name] - before[name] for name in counters}
        return cls(seconds, texts, exit_histogram=left, logprobs=logprobs, **spent)

    @property
    def layers_saved(self) -> float:
        """Share of rows x layers that were not executed."""
        return 1 - self.layers_run / self.layers_possible

    @property
    def passes_saved(self) -> float:
        """Share of layers x steps that no row entered."""
        return 1 - self.passes_run / self.passes_possible

    @property
    def tokens(self) -> int:
        """Tokens generated, over all answers."""
        return sum(map(len, self.texts))
