"""Shadow requests: decided early like others, but run to full depth, to compare both answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.exits.counters import PolicyStats
from vllm_adainfer.exits.layout import Bools, Ints
from vllm_adainfer.monitoring.monitor import Monitor, MonitorStatus
from vllm_adainfer.policy.choice_policy import ChoicePolicy
from vllm_adainfer.policy.exit_policy import ExitPolicy
from vllm_adainfer.policy.probability_policy import ProbabilityPolicy

logger = logging.getLogger("vllm.adainfer.exits.shadow")  # vLLM's logging shows "vllm." alone


@dataclass(frozen=True)
class ShadowAnswers:
    """Early answers of one policy's shadow requests in a step, to compare with full depth.

    Attributes:
        name: of the policy.
        policy: that decided them.
        monitor: that watches this policy.
        stats: the policy's counters.
        request_ids: [shadow], vLLM's.
        levels: [shadow], of each request among the monitor's.
        settled: [shadow], False where no exit point settled the request: then both answers agree.
        requests: int64 [settled], places of the settled requests in the step's batch.
        answers: [settled, answer ids] or [settled, hidden size], as in `Decision`; None where
            nothing was settled in the step.
        agreed: see `ExitLoop`.

    """

    name: str
    policy: ExitPolicy
    monitor: Monitor
    stats: PolicyStats
    request_ids: Sequence[str]
    levels: Ints
    settled: Bools
    requests: Tensor
    answers: Tensor | None
    agreed: Callable[[Tensor], Tensor]

    def compare(self, logits: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Compare with full depth and count; warn of a bound that is broken.

        Args:
            logits: [requests, vocabulary] of the step, the shadow requests' at full depth.
            head: vLLM's own `compute_logits`, which reads early answers that are states.

        """
        disagreed = self._disagreed(logits, head)
        epsilons = self.monitor.epsilons
        self.stats.shadow_checked.update(epsilons[self.levels].tolist())
        self.stats.shadow_disagreed.update(epsilons[self.levels[disagreed]].tolist())
        exceeded = self.monitor.observe(self.request_ids, self.levels, disagreed)
        warn(self.name, self.monitor, exceeded)

    def _disagreed(self, logits: Tensor, head: Callable[[Tensor], Tensor]) -> Bools:
        """[shadow], whether the early answer differs from full depth's, or moves too far from it.

        All ranks get the same: it may tighten a level, which decides who leaves in later steps.
        """
        disagreed = np.zeros(len(self.levels), dtype=np.bool_)
        if self.answers is None or len(self.requests) == 0:
            return disagreed
        full = logits[self.requests]
        ids = self.policy.answer_ids
        if isinstance(self.policy, ProbabilityPolicy):
            wrong, moved = self.policy.compare(self.answers, full)
            self.stats.moved(moved.tolist())
            disagreed[self.settled] = self.agreed(wrong).cpu().numpy()
            return disagreed
        if isinstance(self.policy, ChoicePolicy):
            differs = self.policy.differs(self.answers, full)
            disagreed[self.settled] = self.agreed(differs).cpu().numpy()
            return disagreed
        if ids is None:
            early_ids, full_ids = head(self.answers).argmax(dim=1), full.argmax(dim=1)
        else:
            # In ascending order, so that a tie goes to the token that the sampler takes, too.
            ids, order = ids.sort()
            early_ids = ids[self.answers[:, order].argmax(dim=1)]
            full_ids = full.argmax(dim=1)
            if self.policy.restricted:  # to the request's own labels, if the policy has a pool
                outside = self.answers[:, order].isneginf()
                full_ids = ids[full[:, ids].masked_fill(outside, -torch.inf).argmax(dim=1)]
        disagreed[self.settled] = self.agreed(early_ids != full_ids).cpu().numpy()
        return disagreed


def warn(policy: str, monitor: Monitor, exceeded: Sequence[MonitorStatus]) -> None:
    """Log which levels of a policy now disagree more often than their epsilon."""
    probabilities = monitor.risk == "probability"
    for reading in exceeded:
        consequence = (
            "so requests at this epsilon run at full depth from now on: calibrate again, on "
            "prompts like those served now"
            if reading.tightened
            else "which the accuracy lost may reach but need not; the right answers are not known "
            "here, so nothing was closed: evaluate on labelled prompts like those served now"
        )
        further = " or have a probability that moves too far" if probabilities else ""
        logger.warning(
            "policy %s: disagreement is above epsilon = %g: %d of %d early answers of shadow "
            "requests differ from full depth%s (%.2f%%; at least %.2f%% at confidence %g%%), %s",
            policy,
            reading.epsilon,
            reading.disagreed,
            reading.checked,
            further,
            100 * reading.rate,
            100 * reading.low,
            100 * (1 - monitor.alpha),
            consequence,
        )
