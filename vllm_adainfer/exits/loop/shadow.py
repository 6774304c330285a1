"""Shadow requests: settled early like others, but run to full depth to compare both answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import AnyArray, Bools, Ints
from vllm_adainfer.exits.accounting.counters import PolicyStats
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.policy.exit_policy import ExitPolicy
from vllm_adainfer.promise.first_documents import relevance
from vllm_adainfer.transfers import HostCopy, upload
from vllm_adainfer.watch.units import Queries
from vllm_adainfer.watch.watch import Reading, Watch

logger = logging.getLogger("vllm.adainfer.exits.shadow")  # vLLM shows only loggers under "vllm."


@dataclass(frozen=True)
class Judgement:
    """A comparison that is counted once its results are on the host.

    Attributes:
        results: what the device sends.
        judge: counts them; waits for those that have not arrived.

    """

    results: Sequence[HostCopy]
    judge: Callable[[], None]

    @property
    def has_arrived(self) -> bool:
        """Whether `judge` would not wait."""
        return all(one.has_arrived for one in self.results)


@dataclass(frozen=True)
class ShadowAnswers:
    """Early answers of one policy's shadow requests in a step, to compare with full depth.

    Attributes:
        name: the policy's name.
        policy: the policy that decided them.
        monitor: the policy's monitor.
        stats: the policy's counters.
        request_ids: [shadow], vLLM's ids.
        levels: [shadow], the level of each request among the monitor's; `NO_LEVEL` for a document
            that no policy may decide.
        settled: [shadow], False where no exit point settled the request: then both answers agree.
        everyone: [shadow], places of all of them in the step's batch.
        requests: int64 [settled], those of the settled ones.
        subsets: [shadow], see `UndecidedRows.subsets`.
        answers: the early answer of each settled request; None where the policy decided nothing.
        send: see `ExitLoop`.

    """

    name: str
    policy: ExitPolicy
    monitor: Watch
    stats: PolicyStats
    request_ids: Sequence[str]
    levels: Ints
    settled: Bools
    everyone: Ints
    requests: Tensor
    subsets: Ints | None
    answers: Answers | None
    send: Callable[[Tensor], HostCopy]

    def compare(self, logits: Tensor, head: Callable[[Tensor], Tensor]) -> Judgement:
        """Compare with full depth; `judge` counts, and warns of a broken bound.

        `logits` [requests, vocabulary] are the step's, where shadow requests are at full depth.
        `head` is vLLM's own `compute_logits`, which reads early answers that are states.
        """
        if self.monitor.queries is not None:
            return self._compare_documents(self.monitor.queries, logits, head)
        wrong = moved = labels = None
        if self.answers is not None and len(self.requests):
            promise = self.policy.promise
            early = self.policy.early(self.answers, head)
            full = self.policy.full_depth(logits[self.requests], self.answers)
            moves = promise.moves(early, full)
            moved = None if moves is None else HostCopy(moves)
            # On all ranks the same: it may tighten a level, which decides who leaves later.
            wrong = self.send(promise.wrong(early, full))
        if self.monitor.labels:
            labels = self.send(self._labels(logits))

        def judge() -> None:
            disagreed = np.zeros(len(self.levels), dtype=np.bool_)
            if wrong is not None:
                disagreed[self.settled] = wrong.array()
            if moved is not None:
                self.stats.moved(moved.tensor().tolist())
            self._count(disagreed)
            if labels is not None:
                self._count_labels(*labels.array())

        return Judgement([one for one in (wrong, moved, labels) if one is not None], judge)

    def _count(self, disagreed: Bools) -> None:
        """Count answers, whether each is another than at full depth."""
        epsilons = self.monitor.epsilons
        self.stats.shadow_checked.update(epsilons[self.levels].tolist())
        self.stats.shadow_disagreed.update(epsilons[self.levels[disagreed]].tolist())
        exceeded = self.monitor.observe(self.request_ids, self.levels, disagreed)
        warn(self.name, self.monitor, exceeded)

    def _compare_documents(
        self, queries: Queries, logits: Tensor, head: Callable[[Tensor], Tensor]
    ) -> Judgement:
        """Note the scores of documents; their queries are counted later, see `Queries`."""
        everyone, places = upload((self.everyone, np.flatnonzero(self.settled)), logits.device)
        full = relevance(self.policy.full_depth(logits[everyone], None))
        early = full.clone()
        if self.answers is not None and len(self.requests):
            early[places] = relevance(self.policy.early(self.answers, head))
        sent = self.send(torch.stack([early, full]))

        def judge() -> None:
            early_scores, scores = sent.array().astype(np.float64)
            self.stats.moved(np.abs(early_scores - scores)[self.settled].tolist())
            queries.compared(self.request_ids, self.levels, early_scores, scores)

        return Judgement([sent], judge)

    def _labels(self, logits: Tensor) -> Tensor:
        """[2, shadow], the labels of early answers, and those of full depth."""
        subsets, settled = () if self.subsets is None else (self.subsets,), self.settled
        everyone, places, *bits = upload(
            (self.everyone, np.flatnonzero(settled), *subsets), logits.device
        )
        full = self.policy.best_labels(logits[everyone], bits[0] if bits else None)
        early = full.clone()
        if self.answers is not None and len(self.requests):
            early[places] = self.answers.scores.argmax(dim=1)
        return torch.stack([early, full])

    def _count_labels(self, early: AnyArray, full: AnyArray) -> None:
        """Count answers for each promise about one label; warn of a broken one."""
        epsilons = self.monitor.epsilons[self.levels]
        for watch in self.monitor.labels:
            assert watch.about is not None
            promise, column = watch.about
            about = promise.chosen_by(early, full) == column
            changed = (early != full)[about]
            keys = [(e, promise.kind, promise.label) for e in epsilons[about].tolist()]
            self.stats.labels_checked.update(keys)
            self.stats.labels_changed.update(compress(keys, changed.tolist()))
            ids = [*compress(self.request_ids, about.tolist())]
            warn(self.name, watch, watch.observe(ids, self.levels[about], changed))


def warn(policy: str, watch: Watch, broken: Sequence[Reading]) -> None:
    """Log which bounds of a policy do not hold now."""
    consequence = (
        "so requests at this {} run at full depth from now on: calibrate again, on prompts like "
        "those served now"
    )
    for reading in broken:
        if watch.about is not None:
            promise, _ = watch.about
            which = "that full depth answers with it, the early answer is another"
            if promise.kind == "precision":
                which = "that are answered with it, the answer is another at full depth"
            logger.warning(
                "policy %s: the %s of %s is broken (at most %g%% was promised): of the shadow "
                "requests %s %s, %s",
                policy,
                promise.kind,
                promise.label,
                100 * promise.epsilon,
                which,
                _counts(reading),
                consequence.format("level"),
            )
            continue
        logger.warning(
            "policy %s: disagreement is above epsilon = %g (confidence %g%%): %s %s, %s",
            policy,
            reading.epsilon,
            100 * (1 - watch.alpha),
            watch.promise.broken,
            _counts(reading),
            consequence.format("epsilon")
            if reading.tightened
            else "which the accuracy lost may reach but need not; the right answers are not known "
            "here, so nothing was closed: evaluate on labelled prompts like those served now",
        )


def _counts(reading: Reading) -> str:
    """How often answers differed lately, and since start."""
    return (
        f"in {reading.latest_disagreed} of the latest {reading.latest_checked} comparisons "
        f"({reading.disagreed} of {reading.checked} since start)"
    )
