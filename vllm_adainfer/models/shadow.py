"""Shadow requests: decided early like others, but run to full depth, to compare both answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vllm_adainfer.compat import get_logger
from vllm_adainfer.decision.monitor import DisagreementMonitor
from vllm_adainfer.decision.policy import ExitPolicy
from vllm_adainfer.runtime.layout import Bools, Ints
from vllm_adainfer.runtime.step import StepContext

logger = get_logger(__name__)


@dataclass(frozen=True)
class ShadowAnswers:
    """Early answers of one step's shadow requests, for `compute_logits` to compare.

    Attributes:
        tags: [shadow], the number with which each request was admitted.
        settled: [shadow], False where no exit point settled it: it agrees by running deep.
        requests: int64 [settled], places of the settled ones in the step's batch.
        answers: [settled, answer ids] or [settled, hidden size], as in `Decision`; None where
            nothing has been settled in the step.

    """

    tags: Ints
    settled: Bools
    requests: Tensor
    answers: Tensor | None

    @classmethod
    def of(cls, step: StepContext, answers: Tensor | None) -> ShadowAnswers | None:
        """Those of `step`, whose `answers` [requests, ...] are filled where settled."""
        if step.shadow is None or step.shadow.size == 0:
            return None
        settled = step.settled(step.shadow)
        [requests] = step.on_device(step.shadow[settled])
        return cls(
            tags=step.tags[step.shadow],
            settled=settled,
            requests=requests,
            answers=None if answers is None else answers[requests],
        )

    def disagreed(
        self, logits: Tensor, policy: ExitPolicy, head: Callable[[Tensor], Tensor]
    ) -> Bools:
        """[shadow], whether the early answer differs from that of full depth.

        Args:
            logits: [requests, vocabulary] of the step, the shadow requests' at full depth.
            policy: that decided them.
            head: the stock `compute_logits`, which reads early answers that are states.

        """
        disagreed = np.zeros(len(self.tags), dtype=np.bool_)
        if self.answers is None or len(self.requests) == 0:
            return disagreed
        full = logits[self.requests]
        ids = policy.answer_ids
        if ids is None:
            early_ids, full_ids = head(self.answers).argmax(dim=1), full.argmax(dim=1)
        else:
            # In ascending order, so that a tie goes to the token that the sampler takes, too.
            ids, order = ids.sort()
            early_ids = ids[self.answers[:, order].argmax(dim=1)]
            full_ids = ids[full[:, ids].argmax(dim=1)] if policy.restricted else full.argmax(dim=1)
        disagreed[self.settled] = (early_ids != full_ids).cpu().numpy()
        return disagreed


def watch(monitor: DisagreementMonitor, tags: Ints, disagreed: Bools) -> None:
    """Count compared answers, each [shadow]; a level whose bound is broken is said so, once."""
    for epsilon in monitor.observe(tags, disagreed):
        reading = monitor.as_dict()[epsilon]
        logger.warning(
            "disagreement is above epsilon = %g: %d of %d shadow requests differ from full depth "
            "(%.2f%%; at least %.2f%% at confidence %g%%), so requests at this epsilon run at "
            "full depth from now on: calibrate again, on prompts like those served now",
            epsilon,
            reading["disagreed"],
            reading["checked"],
            100 * reading["rate"],
            100 * reading["low"],
            100 * (1 - monitor.alpha),
        )
