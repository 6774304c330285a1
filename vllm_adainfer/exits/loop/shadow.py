"""Shadow requests: settled early like others, but run to full depth to compare both answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.exits.accounting.counters import PolicyStats
from vllm_adainfer.monitoring.monitor import Monitor, MonitorStatus
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import ExitPolicy

logger = logging.getLogger("vllm.adainfer.exits.shadow")  # vLLM shows only loggers under "vllm."


@dataclass(frozen=True)
class ShadowAnswers:
    """Early answers of one policy's shadow requests in a step, to compare with full depth.

    Attributes:
        name: the policy's name.
        policy: the policy that decided them.
        monitor: the policy's monitor.
        stats: the policy's counters.
        request_ids: [shadow], vLLM's ids.
        levels: [shadow], the level of each request among the monitor's.
        settled: [shadow], False where no exit point settled the request: then both answers agree.
        requests: int64 [settled], places of the settled requests in the step's batch.
        answers: the early answer of each settled request; None where the policy decided nothing.
        broadcast: see `ExitLoop`.

    """

    name: str
    policy: ExitPolicy
    monitor: Monitor
    stats: PolicyStats
    request_ids: Sequence[str]
    levels: Ints
    settled: Bools
    requests: Tensor
    answers: Answers | None
    broadcast: Callable[[Tensor], Tensor]

    def compare(self, logits: Tensor, head: Callable[[Tensor], Tensor]) -> None:
        """Compare with full depth and count; warn of a broken bound.

        Args:
            logits: [requests, vocabulary] of the step, the shadow requests' at full depth.
            head: vLLM's own `compute_logits`, which reads early answers that are states.

        """
        disagreed = np.zeros(len(self.levels), dtype=np.bool_)
        if self.answers is not None and len(self.requests):
            found = self.policy.disagrees(self.answers, logits[self.requests], head)
            if found.moves is not None:
                self.stats.moved(found.moves.tolist())
            # On all ranks the same: it may tighten a level, which decides who leaves later.
            disagreed[self.settled] = self.broadcast(found.wrong).cpu().numpy()
        epsilons = self.monitor.epsilons
        self.stats.shadow_checked.update(epsilons[self.levels].tolist())
        self.stats.shadow_disagreed.update(epsilons[self.levels[disagreed]].tolist())
        exceeded = self.monitor.observe(self.request_ids, self.levels, disagreed)
        warn(self.name, self.monitor, exceeded)


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
