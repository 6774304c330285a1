"""The runs of an evaluation: what engines did with the prompts, and how long they took."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from vllm_adainfer.offline.reports.speedup import Speedup

NEVER_EXIT = 0.0
Logprobs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Run:
    """One pass over all prompts.

    Attributes:
        texts: the generated token ids of each prompt; of an object its number alone, see
            `Objects.code_of`.
        written: of objects, the generated token ids of each prompt; empty for other answers.
        layers_run: token-layers that were executed, of those `possible` at full depth.
        passes_run: layers that were entered by at least one token, summed over the steps.
        exit_histogram: layers run -> number of tokens; empty for stock vLLM.
        logprobs: [prompts, labels], the labels' log-probabilities, if they were requested; of
            objects among those of their fields.

    """

    seconds: float
    texts: list[list[int]]
    layers_run: int = 0
    layers_possible: int = 0
    passes_run: int = 0
    passes_possible: int = 0
    exit_histogram: Mapping[int, int] = field(default_factory=dict)
    logprobs: Logprobs | None = None
    written: Sequence[list[int]] = ()

    @classmethod
    def counted(
        cls,
        seconds: float,
        texts: list[list[int]],
        before: Mapping[str, Any],
        after: Mapping[str, Any],
        logprobs: Logprobs | None = None,
        written: Sequence[list[int]] = (),
    ) -> Run:
        """A pass of an engine with the plugin, given its `stats` before and after."""
        counters = "layers_run", "layers_possible", "passes_run", "passes_possible"
        left = Counter(after["exit_histogram"]) - Counter(before["exit_histogram"])
        spent: dict[str, int] = {name: after[name] - before[name] for name in counters}
        return cls(seconds, texts, exit_histogram=left, logprobs=logprobs, written=written, **spent)

    @property
    def layers_saved(self) -> float:
        """Share of token-layers that were skipped."""
        return 1 - self.layers_run / self.layers_possible

    @property
    def passes_saved(self) -> float:
        """Share of layers, over all steps, that no token entered."""
        return 1 - self.passes_run / self.passes_possible

    @property
    def tokens(self) -> int:
        """Tokens generated for all prompts."""
        return sum(map(len, self.written or self.texts))


Rounds = Sequence[tuple[Run, dict[float, Run]]]
"""For each pass, stock vLLM's run and ours by epsilon, with `NEVER_EXIT` among them."""


@dataclass(frozen=True)
class Times:
    """How long stock vLLM and ours took, in rounds in which all ran in turn.

    Attributes:
        seconds: epsilon -> the seconds of each round; None is stock vLLM.
        requests: the prompts of each round.

    """

    seconds: Mapping[float | None, Sequence[float]]
    requests: Sequence[int]

    @classmethod
    def of(cls, passes: Rounds) -> Times:
        """Those of whole passes, if there were no other rounds."""
        sides = [{None: stock, **ours} for stock, ours in passes]
        seconds = {side: [one[side].seconds for one in sides] for side in sides[0]}
        return cls(seconds, [len(stock.texts) for stock, _ in passes])

    def per_second(self, side: float | None) -> float:
        """Prompts a second, the median of the rounds."""
        pairs = zip(self.requests, self.seconds[side], strict=True)
        return statistics.median(count / seconds for count, seconds in pairs)

    def runs(self, side: float | None) -> list[dict[str, float]]:
        """The rounds, for a report."""
        pairs = zip(self.seconds[side], self.requests, strict=True)
        return [{"seconds": seconds, "requests": count} for seconds, count in pairs]

    def speedup(self, epsilon: float) -> Speedup:
        """Ours at `epsilon` over stock vLLM."""
        return Speedup.of(self.seconds[None], self.seconds[epsilon])


class Measured(NamedTuple):
    """What `measure` found.

    Attributes:
        passes: all prompts on each side.
        times: of rounds in turn.
        again: the answers of stock vLLM in another pass, in other batches.

    """

    passes: Rounds
    times: Times
    again: Sequence[list[int]]
