"""The exit loop: run a segment, ask the policy, let settled requests leave, go on with the rest."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from vllm.forward_context import get_forward_context

from vllm_adainfer.engine.compiled_batch import Batch, CompiledBatch
from vllm_adainfer.engine.segments import Stack
from vllm_adainfer.exits.counters import ExitStats
from vllm_adainfer.exits.decisions import Decisions
from vllm_adainfer.exits.kv import KVPolicy
from vllm_adainfer.exits.layout import Ints, RowLayout
from vllm_adainfer.exits.residual import Stream
from vllm_adainfer.exits.shadow import ShadowAnswers, warn
from vllm_adainfer.exits.step import StepContext
from vllm_adainfer.exits.work import StepWork, Work
from vllm_adainfer.policy.monitor import Monitor
from vllm_adainfer.policy.policy_set import PolicySet

if TYPE_CHECKING:
    from vllm_adainfer.engine.segment_graphs import SegmentGraphs

# Compacting a batch takes as long as so many rows x layers, by the type of device. On CPUs 6 to 60
# were measured with a 135M model; a larger model's layers take longer, so that it gains from fewer.
# The number for GPUs is an estimate from what a 1B model's layers and a dozen launches should take.
CUT_WORK = {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class ScoredAnswers:
    """Requests whose answer a policy gave as scores of some tokens, for `compute_logits`.

    Attributes:
        requests: [answered], places in the step's batch.
        scores: fp32 [answered, answer ids].
        answer_ids: int64, those tokens.

    """

    requests: Ints
    scores: Tensor
    answer_ids: Tensor


@dataclass(frozen=True)
class StepOutput:
    """What a step has given.

    Attributes:
        hidden: [rows, head size] for the stock `compute_logits`; only the rows that decide a
            request are sure to be defined.
        scored: the answers given as scores, of each policy that gave some.
        shadows: what shadow requests would have answered, of each policy that has some.

    """

    hidden: Tensor
    scored: tuple[ScoredAnswers, ...] = ()
    shadows: tuple[ShadowAnswers, ...] = ()


class ExitLoop:
    """Runs a model's stack over one step's batch.

    A request leaves at the first exit point where the policy has called it settled and enough
    rows leave with it to be worth a smaller batch. Until then a settled request stays in. If it
    reaches full depth after all, the answer it settled on is dropped, unless it spares the LM head
    (scores of a shortlist, where any token may be the answer). A shadow request always gets there;
    its early answer is returned beside it. What later tokens find in the layers that a request
    has skipped is the KV policy's part.
    """

    def __init__(
        self,
        stack: Stack,
        policies: PolicySet,
        kv: KVPolicy,
        min_rows_saved: int | None,
        monitors: Mapping[str, Monitor],
        max_rows: int,
    ) -> None:
        """`stack` is cut at ``policies.exit_points``.

        `min_rows_saved` rows leave together, None where that is faster. `monitors` ask for shadow
        requests: one for each policy, in their order, or none. No segment ever gets more than
        `max_rows` rows: vLLM has compiled for so many, and backends have buffers for them.
        """
        self.policies = policies
        self.kv = kv
        self.monitors = monitors
        self.stack = stack
        self.graphs: SegmentGraphs | None = None  # where the runner has captured some
        self._min_rows_saved = min_rows_saved
        self._max_rows = max_rows
        self._depth = stack.depth
        self.reset_counters()

    def reset_counters(self) -> None:
        """Start all counters from 0."""
        stats, policies = ExitStats(shadow=self.monitors), self.policies
        self.work = Work(stats, policies.names, policies.exit_points, self._depth)

    @property
    def stats(self) -> ExitStats:
        """What has been counted."""
        return self.work.stats

    def forget(self, request_id: str) -> None:
        """A request has ended, or its keys and values were thrown away."""
        self.kv.forget(request_id)
        self.work.forget(request_id)

    def ended(self, request_id: str) -> None:
        """A request has no more tokens; whether or not it ever ran."""
        for name, monitor in self.monitors.items():
            warn(name, monitor, monitor.ended(request_id))

    def run(self, positions: Tensor, input_ids: Tensor, step: StepContext) -> StepOutput:
        """Run one step.

        Args:
            positions: int64 [rows], maybe padded: rows at the end belong to nobody.
            input_ids: int32 or int64 [rows].
            step: which rows are whose, and which requests may exit.

        """
        # The host's clock tells what a CPU does; of a GPU only what it is told to do.
        if step.device.type != "cpu":
            return self._run(positions, input_ids, step)
        start = time.perf_counter()
        output = self._run(positions, input_ids, step)
        self.stats.seconds += time.perf_counter() - start
        return output

    def _run(self, positions: Tensor, input_ids: Tensor, step: StepContext) -> StepOutput:
        policies, owners = self.policies, self.policies.owners(step.tags)
        self.stats.tokens_decided += step.num_sampled
        work = self.work.step(owners, step.request_ids, step.layout.lens)
        came = CompiledBatch(self.stack, positions, get_forward_context())
        batch = self._graphed(step) or came
        decisions = Decisions(policies, owners, step)
        stream = Stream(input_ids)
        for index in range(len(self.stack.segments) - 1):
            stream = self._segment(index, batch, stream, work)
            if index == len(policies.exit_points):  # it ends where the last layer begins
                break
            self._ask(decisions, index, stream, step)
            regrouped = self._regroup(index, stream, step, work, came)
            if regrouped is None:
                continue
            stream = regrouped
            if stream.num_rows == 0:
                break
            batch = self._graphed(step) or came.narrowed(step)
        whole = self._last(batch, stream, step, positions.shape[0], work)
        work.decided(step.stayed(), self._depth)
        scored = []
        for policy, early, answers in decisions.early():
            if policy.answer_ids is not None:
                [requests] = step.on_device(early)
                scored.append(ScoredAnswers(early, answers[requests], policy.answer_ids))
            else:
                requests, rows = step.on_device(early, step.original_sampled_rows(early))
                whole[rows] = answers[requests]
        return StepOutput(whole, tuple(scored), tuple(decisions.of_shadows()))

    def _graphed(self, step: StepContext) -> Batch | None:
        """The batch as it is now, if there are CUDA graphs for it."""
        return None if self.graphs is None else self.graphs.batch(step.layout, step.narrow)

    def _segment(self, index: int, batch: Batch, stream: Stream, work: StepWork) -> Stream:
        work.ran(self.stack.segments[index].num_layers)
        return batch.run(index, stream)

    def _ask(self, decisions: Decisions, index: int, stream: Stream, step: StepContext) -> None:
        if step.device.type != "cpu":
            decisions.ask(index, stream)
            return
        start = time.perf_counter()
        decisions.ask(index, stream)
        self.stats.probe_seconds += time.perf_counter() - start

    def _regroup(
        self,
        exit_index: int,
        stream: Stream,
        step: StepContext,
        work: StepWork,
        came: CompiledBatch,
    ) -> Stream | None:
        """The rows that go on below this exit point; None if they are those that came to it."""
        leaving = step.ready()
        if leaving.size and not self._worth_a_cut(exit_index, leaving, step):
            leaving = leaving[:0]
        waiting = self.kv.waiting(exit_index, step, leaving)
        if leaving.size == 0 and waiting is None:
            return None
        if leaving.size:
            self._let_go(exit_index, leaving, stream, step, work)
        if waiting is not None and self._would_be_too_many(leaving, waiting, step):
            self._catch_up(exit_index, waiting, step, work, came)
            waiting = None
        if waiting is not None:
            stream = stream.rows(slice(0, step.layout.num_rows))  # those of nobody go
            stream = Stream.cat([stream, self.kv.rejoin(exit_index, step, waiting)])
            work.join(exit_index, waiting.nonzero()[0])
        return stream.rows(step.regroup(leaving, waiting))

    def _let_go(
        self, exit_index: int, leaving: Ints, stream: Stream, step: StepContext, work: StepWork
    ) -> None:
        """Requests leave at this exit point."""
        work.decided(leaving, self.policies.exit_points[exit_index])
        goes_on = step.goes_on[leaving]
        if (going_on := leaving[goes_on]).size:
            self.kv.leave(exit_index, going_on, stream, step)
        if self.kv.defers:
            work.defer(exit_index, going_on)
            leaving = leaving[~goes_on]
        work.leave(exit_index, leaving)

    def _would_be_too_many(self, leaving: Ints, waiting: Ints, step: StepContext) -> bool:
        """Whether the batch without `leaving` but with rows `waiting` [requests] is too large."""
        stay = step.layout.num_rows - int(step.layout.lens[leaving].sum())
        return stay + int(waiting.sum()) > self._max_rows

    def _catch_up(
        self,
        exit_index: int,
        waiting: Ints,
        step: StepContext,
        work: StepWork,
        came: CompiledBatch,
    ) -> None:
        """Run waiting rows through the rest of the stack by themselves, before the batch goes on.

        They are all those of requests that have rows `waiting` [requests] here. Rows below later
        exit points have earlier positions, so they run first. This builds attention metadata, so
        the batch needs its own to be built again afterwards.
        """
        last = step.layout.last_positions - step.layout.lens
        others = np.flatnonzero(waiting == 0)
        parts: list[tuple[int, RowLayout]] = []
        for index in range(exit_index, len(self.policies.exit_points)):
            lens = self.kv.waiting(index, step, others)
            if lens is not None:
                parts.append((index, RowLayout(lens, last)))
                last = last - lens
        for index, layout in reversed(parts):
            stream = self.kv.rejoin(index, step, layout.lens)
            starts = range(0, layout.num_rows, self._max_rows)
            for start in starts:
                rows = slice(start, min(start + self._max_rows, layout.num_rows))
                batch, here = came.narrowed_to(layout.part(rows), step), stream.rows(rows)
                for segment in range(index + 1, len(self.stack.segments) - 1):
                    here = batch.run(segment, here)
                batch.write_last_kv(here)
            layers = self._depth - self.policies.exit_points[index]
            work.ran_apart(work.take(index, layout.here), layers, len(starts))

    def _worth_a_cut(self, exit_index: int, leaving: Ints, step: StepContext) -> bool:
        """Whether requests that are ready are to leave at this exit point."""
        ready = int(step.layout.lens[leaving].sum())
        if self._min_rows_saved is not None:
            return ready >= self._min_rows_saved
        if ready == step.layout.num_rows:  # nothing to compact
            return True
        if self.kv.defers:  # rows that will run these layers later spare nothing by leaving now
            ready = int(step.layout.lens[leaving[~step.goes_on[leaving]]].sum())
        return (
            ready * (self._depth - self.policies.exit_points[exit_index])
            >= CUT_WORK[step.device.type]
        )

    def _last(
        self, batch: Batch, stream: Stream, step: StepContext, rows: int, work: StepWork
    ) -> Tensor:
        """What the LM head reads of the remaining rows, among all `rows` of the batch as it came.

        Where that pays, rows that decide no request get keys and values of the last layer alone.
        """
        if stream.num_rows == 0:
            return stream.hidden.new_empty(rows, self.stack.width)
        decisive = step.decisive()
        if decisive is not None:
            assert isinstance(batch, CompiledBatch), "in graphs each request has one row"
            [wanted] = step.on_device(step.sampled_rows(decisive.here))
            every, stream = stream, stream.rows(wanted)
            batch.write_last_kv(every)
            batch = batch.narrowed_to(decisive, step)
        # All rows are counted, as if they had run the layer.
        final = self._segment(len(self.stack.segments) - 1, batch, stream, work).hidden
        if step.as_it_came and decisive is None:
            return final
        whole = final.new_empty(rows, self.stack.width)
        step.put_back(final, None if decisive is None else decisive.here, whole)
        return whole
