"""The exit loop: run a segment, ask the policy, let settled requests leave, go on with the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from vllm.forward_context import get_forward_context

from vllm_adainfer.decision.monitor import DisagreementMonitor
from vllm_adainfer.decision.policy import ExitPolicy
from vllm_adainfer.models.batch import Batch, CompiledBatch
from vllm_adainfer.models.decisions import Decisions
from vllm_adainfer.models.segments import Stack
from vllm_adainfer.models.shadow import ShadowAnswers
from vllm_adainfer.runtime.kv import KVPolicy
from vllm_adainfer.runtime.layout import Ints
from vllm_adainfer.runtime.step import StepContext
from vllm_adainfer.runtime.stream import Stream
from vllm_adainfer.stats import ExitStats

if TYPE_CHECKING:
    from vllm_adainfer.models.segment_graphs import SegmentGraphs

# Compacting a batch takes as long as so many rows x layers, by the type of device. On CPUs 6 to 60
# were measured with a 135M model; a larger model's layers take longer, so that it gains from fewer.
# The number for GPUs is an estimate from what a 1B model's layers and a dozen launches should take.
CUT_WORK = {"cpu": 64, "cuda": 2048}


@dataclass(frozen=True)
class ScoredAnswers:
    """Requests whose answer the policy gave as scores of some tokens, for `compute_logits`.

    Attributes:
        requests: [answered], places in the step's batch.
        scores: fp32 [answered, answer ids].

    """

    requests: Ints
    scores: Tensor


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
        policy: ExitPolicy,
        kv: KVPolicy,
        min_rows_saved: int | None,
        monitor: DisagreementMonitor | None = None,
    ) -> None:
        """`stack` is cut at ``policy.exit_points``; a `monitor` asks for shadow requests.

        `min_rows_saved` rows leave together, None where that is faster.
        """
        self.policy = policy
        self.kv = kv
        self.monitor = monitor
        self.stats = ExitStats(shadow=monitor)
        self.stack = stack
        self.graphs: SegmentGraphs | None = None  # where the runner has captured some
        self._min_rows_saved = min_rows_saved
        self._depth = stack.depth

    def run(
        self, positions: Tensor, input_ids: Tensor, step: StepContext
    ) -> tuple[Tensor, ScoredAnswers | None, ShadowAnswers | None]:
        """Run one step.

        Args:
            positions: int64 [rows], maybe padded: rows at the end belong to nobody.
            input_ids: int32 or int64 [rows].
            step: which rows are whose, and which requests may exit.

        Returns:
            [rows, head size] for the stock `compute_logits` (only the rows that decide a request
            are sure to be defined), the answers given as scores, if any, and what shadow requests
            would have answered.

        """
        stats, policy = self.stats, self.policy
        stats.layers_possible += step.layout.num_rows * self._depth
        stats.passes_possible += self._depth
        stats.tokens_decided += step.num_sampled
        came = CompiledBatch(self.stack, positions, get_forward_context())
        batch = self._graphed(step) or came
        decisions = Decisions(policy, step)
        stream = Stream(input_ids)
        for index in range(len(self.stack.segments) - 1):
            stream = self._segment(index, batch, stream, step)
            if index == len(policy.exit_points):  # it ends where the last layer begins
                break
            decisions.ask(index, stream)
            regrouped = self._regroup(index, stream, step)
            if regrouped is None:
                continue
            stream = regrouped
            if stream.num_rows == 0:
                break
            batch = self._graphed(step) or came.narrowed(step)
        whole = self._last(batch, stream, step, positions.shape[0])
        answers = decisions.answers
        shadow = ShadowAnswers.of(step, answers)
        early = step.left
        stats.exit_histogram[self._depth] += step.num_sampled - early.size
        if policy.answer_ids is not None and not policy.restricted:
            early = step.answered()  # those that stayed need no LM head either
        if answers is None or early.size == 0:
            return whole, None, shadow
        if policy.answer_ids is not None:
            [requests] = step.on_device(early)
            return whole, ScoredAnswers(early, answers[requests]), shadow
        requests, rows = step.on_device(early, step.original_sampled_rows(early))
        whole[rows] = answers[requests]
        return whole, None, shadow

    def _graphed(self, step: StepContext) -> Batch | None:
        """The batch as it is now, if there are CUDA graphs for it."""
        return None if self.graphs is None else self.graphs.batch(step.layout, step.narrow)

    def _segment(self, index: int, batch: Batch, stream: Stream, step: StepContext) -> Stream:
        num_layers = self.stack.segments[index].num_layers
        self.stats.layers_run += step.layout.num_rows * num_layers
        self.stats.passes_run += num_layers
        return batch.run(index, stream)

    def _regroup(self, exit_index: int, stream: Stream, step: StepContext) -> Stream | None:
        """The rows that go on below this exit point; None if they are those that came to it."""
        leaving = step.ready()
        if leaving.size and not self._worth_a_cut(exit_index, leaving, step):
            leaving = leaving[:0]
        waiting = self.kv.waiting(exit_index, step, leaving)
        if leaving.size == 0 and waiting is None:
            return None
        self.stats.exit_histogram[self.policy.exit_points[exit_index]] += leaving.size
        going_on = leaving[step.goes_on[leaving]]
        if going_on.size:
            self.kv.leave(exit_index, going_on, stream, step)
        if waiting is not None:
            stream = stream.rows(slice(0, step.layout.num_rows))  # those of nobody go
            stream = Stream.cat([stream, self.kv.rejoin(exit_index, step, waiting)])
        return stream.rows(step.regroup(leaving, waiting))

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
            ready * (self._depth - self.policy.exit_points[exit_index])
            >= CUT_WORK[step.device.type]
        )

    def _last(self, batch: Batch, stream: Stream, step: StepContext, rows: int) -> Tensor:
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
        final = self._segment(len(self.stack.segments) - 1, batch, stream, step).hidden
        if step.as_it_came and decisive is None:
            return final
        whole = final.new_empty(rows, self.stack.width)
        step.put_back(final, None if decisive is None else decisive.here, whole)
        return whole
