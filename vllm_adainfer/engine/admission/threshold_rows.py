"""Which row of its policy's thresholds applies to a request, numbered across all policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TypeAlias

from vllm_adainfer.artifact.artifact import all_parts
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.kinds import NotCovered
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.policy.policy_set import first_threshold_rows
from vllm_adainfer.policy.questions import KnownQuestions

logger = get_logger(__name__)

# `threshold_row`, `last_token_row` and `not_covered` of a `Running`.
Rows: TypeAlias = tuple[int, int, NotCovered | None]


class ThresholdRows:
    """The threshold rows of an engine's policies.

    Attributes:
        first: the first row of each part of a policy, by its name; as `PolicySet` numbers them.

    """

    def __init__(
        self, configs: Mapping[str, ArtifactConfig], only_known: bool, any_prompt: bool = False
    ) -> None:
        """Number the rows of `configs`.

        `only_known`: only requests with a known question exit. `any_prompt`: prompts exit that lack
        the tokens which those of the calibration share.
        """
        self._shared = {} if any_prompt else {n: config.shared for n, config in configs.items()}
        self._parts = all_parts(configs)
        self._names = {name: tuple(config.parts(name)) for name, config in configs.items()}
        firsts = first_threshold_rows(part.num_threshold_rows for part in self._parts.values())
        self.first = dict(zip(self._parts, firsts, strict=True))
        self._epsilons = [
            level.epsilon
            for part in self._parts.values()
            for _ in range(part.num_threshold_rows // len(part.levels))
            for level in part.levels
        ]
        self._known = {
            name: KnownQuestions(question.ends for question in part.questions)
            for name, part in self._parts.items()
            if part.by_question or only_known
        }

    def of(self, policy: str, epsilon: float | None, prompt: Sequence[int]) -> Rows:
        """Those of a request for a policy, by its bound and its prompt."""
        if policy in self._shared and not self._shared[policy].are_in(prompt):
            return FULL_DEPTH, FULL_DEPTH, "other_prompt"
        if policy in self._known and self._known[policy].asked_by(prompt) is None:
            return FULL_DEPTH, FULL_DEPTH, "unknown_question"
        whole, *last_token = self._names[policy]
        row = last_token_row = FULL_DEPTH
        try:
            row = self._of_part(whole, epsilon, prompt)
        except AdaInferError:  # with what the client asks for, each of its requests logs a line
            logger.warning_once(
                "requests run at full depth where they ask for a stricter bound than the strictest "
                "of policy %s, which is %g",
                policy,
                min(level.epsilon for level in self._parts[whole].levels),
            )
        for part in last_token:
            with suppress(AdaInferError):  # it may certify fewer epsilons
                last_token_row = self._of_part(part, epsilon, prompt)
        return row, last_token_row, None

    def epsilon_of(self, row: int) -> float | None:
        """The bound that a row keeps; None for `FULL_DEPTH`."""
        return None if row == FULL_DEPTH else self._epsilons[row]

    def _of_part(self, name: str, epsilon: float | None, prompt: Sequence[int]) -> int:
        """The row for a prompt in a part; an AdaInferError if that does not certify `epsilon`."""
        part = self._parts[name]
        level = part.level_of(epsilon)
        if level < 0:
            return FULL_DEPTH
        question = None
        if name in self._known:
            question = self._known[name].asked_by(prompt)
            if question is None:
                return FULL_DEPTH
        row = part.threshold_row(level, question)
        return FULL_DEPTH if row is None else self.first[name] + row
