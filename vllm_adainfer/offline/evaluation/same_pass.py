"""Early answers beside full depth in the same pass, where a promise is made.

Between two passes rounding changes answers, too, as their batches differ. So every prompt runs to
full depth once more as a shadow request, which compares what an exit would have answered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.measure import run
from vllm_adainfer.offline.evaluation.requests import request_params
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.promise.promise import Unit
from vllm_adainfer.settings.instruments import COMPARE_ARG
from vllm_adainfer.settings.request import EPSILON_ARG, EXIT_ARG
from vllm_adainfer.stats import stats

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

Counts = tuple[int, int]  # compared, and of those changed


@dataclass(frozen=True)
class SamePass:
    """The comparisons at one epsilon.

    Attributes:
        compared: answers; of texts, their tokens. Neither of a prompt that nothing could decide
            early, such as one split between steps, nor of an object that full depth has not ended.
        broken: those of them that break the promise.
        labels: the same of each promise about one label, by its name, such as "recall of unsafe".

    """

    compared: int
    broken: int
    labels: Mapping[str, Counts] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The share that breaks the promise; there must be answers that were compared."""
        return self.broken / self.compared

    def plus(self, other: SamePass, sign: int = 1) -> SamePass:
        """These comparisons and the others; with a `sign` of -1, these without the others."""
        labels = dict(self.labels)
        for name, (compared, changed) in other.labels.items():
            own = labels.get(name, (0, 0))
            labels[name] = own[0] + sign * compared, own[1] + sign * changed
        return SamePass(
            self.compared + sign * other.compared, self.broken + sign * other.broken, labels
        )


def compare_in_same_pass(
    engine: LLM,
    examples: Sequence[Example],
    config: ArtifactConfig,
    epsilons: Sequence[float],
    max_tokens: int = 1,
    adapter: LoRARequest | None = None,
) -> dict[float, SamePass]:
    """The comparisons at each epsilon, by an engine whose switch says ``compare``.

    Empty for promises about queries: which requests are the documents of one is known in a server
    alone.
    """
    if config.promise.unit is Unit.QUERY:
        return {}

    def ask(prompts: Sequence[Example], arguments: dict[str, Any]) -> None:
        params = [
            request_params(config, one.labels, arguments, max_tokens, one.schema) for one in prompts
        ]
        run(engine, prompts, params, config, False, adapter)

    found = {}
    for epsilon in progress(epsilons, desc="early beside full depth", unit="run"):
        before = _counted(engine, epsilon)
        ask(examples, {EPSILON_ARG: epsilon, COMPARE_ARG: True})
        ask(examples[:1], {EXIT_ARG: 0})  # texts count when the next step hears that they ended
        found[epsilon] = _counted(engine, epsilon).plus(before, -1)
    return found


def _counted(engine: LLM, epsilon: float) -> SamePass:
    """What the engine has compared since it started, whichever part of the policy decided it."""
    total = SamePass(0, 0)
    for policy in stats(engine)["policies"].values():
        if (checks := policy.get("shadow", {}).get(epsilon)) is not None:
            labels = {
                name: (one["checked"], one["disagreed"])
                for name, one in checks.get("labels", {}).items()
            }
            total = total.plus(SamePass(checks["checked"], checks["disagreed"], labels))
    return total
