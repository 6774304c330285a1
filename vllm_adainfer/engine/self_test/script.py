"""The scripted requests of the self-test: their tokens, and where each of them exits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.exits.loop.step import FULL_DEPTH

# Of prompts; the last comes while the others are generating.
LENGTHS = (3, 20, 17, 1, 9, 6)
TOKENS = 6  # that each request generates, but those of a pooling model


@dataclass(frozen=True)
class Script:
    """The tokens of each request, and where they exit.

    Attributes:
        prompts: the tokens of each prompt.
        answers: [requests], the token that each request is made to generate, again and again.
        arrives: [requests], the step in which each prompt runs.
        exits: [requests, tokens], the exit point (an index) of each generated token, or
            `FULL_DEPTH`.

    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[int, ...]
    arrives: tuple[int, ...]
    exits: Ints

    @classmethod
    def drawn(
        cls, exit_points: int, vocabulary: int, max_requests: int, max_rows: int, tokens: int
    ) -> Script:
        """Random tokens and exits, the same at each start; each request generates `tokens`.

        The first request never exits, the second does at the first exit point. Now and then no
        token exits: deferred rows rejoin, and the next step has one row for each request.
        """
        generator = np.random.default_rng(0)
        lengths = [length for length in LENGTHS[:max_requests] if length < max_rows / 2]
        prompts = [tuple(generator.integers(vocabulary, size=n).tolist()) for n in lengths]
        exits = generator.integers(FULL_DEPTH, exit_points, (len(lengths), tokens))
        exits[0], exits[1:2] = FULL_DEPTH, 0
        if tokens > 1:
            exits[:, 2:4] = exits[:, -1] = FULL_DEPTH
        return cls(
            prompts=tuple(prompts),
            answers=tuple(generator.integers(vocabulary, size=len(lengths)).tolist()),
            arrives=(*[0] * (len(lengths) - 1), min(2, tokens - 1)),
            exits=exits,
        )

    @property
    def tokens(self) -> int:
        """How many tokens each request generates, if it comes in the first step."""
        return self.exits.shape[1]

    @property
    def never_exiting(self) -> Script:
        """The same requests, all at full depth."""
        return replace(self, exits=np.full_like(self.exits, FULL_DEPTH))

    def only(self, requests: list[int]) -> Script:
        """These requests alone."""
        return Script(
            tuple(self.prompts[request] for request in requests),
            tuple(self.answers[request] for request in requests),
            tuple(self.arrives[request] for request in requests),
            self.exits[requests],
        )
