"""The base of the exit loop and of the recording loop, which run a model's stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.artifact.config import policy_of
from vllm_adainfer.exits.accounting.counters import ExitStats
from vllm_adainfer.exits.accounting.report import DecidedToken
from vllm_adainfer.exits.batch.batch import Batch
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.pooling import CarriedPrompts
from vllm_adainfer.exits.loop.shadow import Judgement, ShadowAnswers, warn
from vllm_adainfer.exits.loop.shadow_objects import ShadowObjects
from vllm_adainfer.exits.loop.step import NOBODY, RecordedRequests, StepContext
from vllm_adainfer.policy.answers import Answers
from vllm_adainfer.watch.watch import Watch

# Requests whose answers are scores: their places in the step's batch, [answered], and the answers.
ScoredRequests: TypeAlias = tuple[Ints, Answers]


@dataclass(frozen=True)
class StepOutput:
    """The result of a step.

    Attributes:
        hidden: [rows, head size], the input of vLLM's own `compute_logits`; defined only in the
            rows that yield a token.
        scored: answers that are scores, by policy.
        shadows: early answers of shadow requests, by policy.
        sampled_lens: as in `StepContext`.
        objects: the requests whose answers are objects, which no logits tell of: their places.

    """

    hidden: Tensor
    scored: tuple[ScoredRequests, ...] = ()
    shadows: tuple[ShadowAnswers, ...] = ()
    sampled_lens: Ints | None = None
    objects: Ints = field(default_factory=lambda: NOBODY)

    def requests_of(self, rows: int) -> Ints:
        """The request that each of so many sampled rows, all of them in order, belongs to."""
        if self.sampled_lens is None:
            return np.arange(rows)
        return np.repeat(np.arange(len(self.sampled_lens)), self.sampled_lens)

    def sampled_row_of(self, requests: Ints) -> Ints:
        """The row of each of `requests`, which have one each, among all sampled rows."""
        if self.sampled_lens is None:
            return requests
        ends: Ints = np.cumsum(self.sampled_lens)
        return ends[requests] - 1


# Gets requests; copies of their states, each [requests, width]: after each exit point, and last the
# LM head's input; and the means over their prompts at each exit point, likewise.
StateKeeper: TypeAlias = Callable[[RecordedRequests, Sequence[Tensor], Sequence[Tensor]], None]


class Loop(ABC):
    """Runs a model's stack, step by step.

    Attributes:
        stats: the counters so far.
        kv: takes care of the layers that exited rows have skipped.
        carried: what earlier chunks of unfinished prompts add to their means.
        monitors: watch shadow requests, by policy; empty where there are none.
        shadow_objects: early objects of shadow requests that still write their own.

    """

    stats: ExitStats
    kv: ExactKV
    carried: CarriedPrompts
    monitors: Mapping[str, Watch] = MappingProxyType({})
    shadow_objects: ShadowObjects

    def __init__(self) -> None:
        """Begin without anything that waits."""
        self.carried = CarriedPrompts()
        self.shadow_objects = ShadowObjects()
        self._judgements: list[Judgement] = []

    @abstractmethod
    def run(self, batch: Batch, input_ids: Tensor, step: StepContext) -> StepOutput:
        """Run one step of the requests in `step`, with the rows that it came with.

        `input_ids` are int32 or int64 [rows], possibly with padding at the end.
        """

    @abstractmethod
    def reset_counters(self) -> None:
        """Start all counters from 0."""

    def decided(self, step: StepContext) -> Iterator[DecidedToken]:
        """How each token of a step that has run was decided; nothing where nobody decides."""
        return iter(())

    def tightened(self) -> Bools | None:
        """True for threshold rows whose requests run at full depth unless they are shadow requests.

        None where there is no monitor, so that no request is a shadow request.
        """
        return None

    def judge_later(self, judgement: Judgement) -> None:
        """Keep a comparison of the step that has just run."""
        self._judgements.append(judgement)

    def take_judgements(self) -> Sequence[Judgement]:
        """Those of `judge_later` since the last call, in order."""
        taken, self._judgements = self._judgements, []
        return taken

    def take_misses(self) -> Mapping[str, int]:
        """By policy, the changed answers that ledgers are still to count."""
        misses = Counter[str]()
        for part, monitor in self.monitors.items():
            misses[policy_of(part)] += sum(changed for *_, changed in monitor.take_counted())
        return misses

    def tighten(self, policies: Collection[str]) -> None:
        """Show that requests of `policies` run at full depth, by their ledgers."""
        for part, monitor in self.monitors.items() if policies else ():
            if policy_of(part) in policies:
                monitor.tightened[:] = True

    def forget(self, request_id: str) -> None:
        """A request has ended, or its keys and values were thrown away."""
        self.carried.forget(request_id)
        self.kv.forget(request_id)

    def began(self, request_id: str, query: str) -> None:
        """A document of a shadow query begins to run, see `Queries.began`."""
        for monitor in self.monitors.values():
            if monitor.queries is not None:
                monitor.queries.began(request_id, query)

    def written(self, objects: Mapping[str, int]) -> None:
        """Requests have written these objects at full depth, see `ByField.code`; negative for none.

        Call it before `ended`.
        """
        for request_id, code in objects.items():
            self.shadow_objects.compare(request_id, code, self.monitors, self.stats.by_policy)

    def ended(self, request_id: str, ran: bool = True) -> None:
        """A request has ended; `ran` is False if it never ran."""
        self.shadow_objects.forget(request_id)
        for name, monitor in self.monitors.items():
            for watch in (monitor, *monitor.labels):
                warn(name, watch, watch.ended(request_id, ran))
            if monitor.queries is not None:
                self.stats.by_policy[name].queries_counted(monitor.take_counted())
