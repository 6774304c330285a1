"""The exit loop: run a segment, ask the policies, let settled requests leave, run the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.exits.batch import Batch, StackShape
from vllm_adainfer.exits.catch_up import CatchUp
from vllm_adainfer.exits.counters import ExitStats
from vllm_adainfer.exits.decisions import Decisions
from vllm_adainfer.exits.hidden_states import HiddenStates
from vllm_adainfer.exits.kv import KVPolicy
from vllm_adainfer.exits.layout import Bools, Ints
from vllm_adainfer.exits.loop import Loop, ScoredAnswers, StepOutput
from vllm_adainfer.exits.shadow import warn
from vllm_adainfer.exits.step import REGROUP_COST, StepContext
from vllm_adainfer.exits.work import StepWork, Work
from vllm_adainfer.monitoring.monitor import Monitor
from vllm_adainfer.policy.policy_set import PolicySet


class ExitLoop(Loop):
    """Runs a model's stack and lets requests leave it early.

    A request leaves at the first exit point where a policy has called it settled and enough rows
    leave with it to be worth a smaller batch. Until then a settled request stays in. If it reaches
    full depth after all, its early answer is dropped, unless that answer spares the LM head (scores
    of a shortlist, where any token may be the answer). A shadow request always reaches full depth;
    its early answer is returned beside the full one. What later tokens find in the layers that a
    request has skipped is up to the KV policy.
    """

    def __init__(
        self,
        shape: StackShape,
        policies: PolicySet,
        kv: KVPolicy,
        monitors: Mapping[str, Monitor],
        max_rows: int,
        min_rows_saved: int | None = None,
        agreed: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        """Prepare to run a stack that is cut at the exit points of `policies`.

        Args:
            shape: of the stack.
            policies: decide who may leave.
            kv: takes care of the layers that rows skip.
            monitors: watch shadow requests: one for each policy, in the same order, or none.
            max_rows: the most rows that a segment may get: vLLM has compiled for so many, and
                attention backends have buffers for them.
            min_rows_saved: rows that must leave together; None lets them leave where it is faster.
            agreed: makes ranks that computed the same values agree on them.

        """
        self.policies = policies
        self.kv = kv
        self.monitors = monitors
        self._shape = shape
        self._min_rows_saved = min_rows_saved
        self._max_rows = max_rows
        self._agreed = agreed
        self.stats = ExitStats()
        self.reset_counters()

    def use_policies(self, policies: PolicySet, monitors: Mapping[str, Monitor]) -> None:
        """Decide by other policies from the next step on; they leave at the same exit points.

        The counters of a policy that has gone stay.
        """
        self.policies, self.monitors = policies, monitors
        self.stats.serving, self.stats.shadow = policies.names, monitors
        self.work.use_names(policies.names)

    @property
    @override
    def defers(self) -> bool:
        return self.kv.defers

    @property
    def _catch_up(self) -> CatchUp:
        return CatchUp(self.kv, self._shape, self._max_rows)

    @override
    def reset_counters(self) -> None:
        self.stats = ExitStats(
            serving=self.policies.names,
            weights_differ=self.stats.weights_differ,
            shadow=self.monitors,
        )
        self.work = Work(
            self.stats, self.policies.names, self.policies.exit_points, self._shape.depth
        )

    @override
    def overdue(self) -> set[str]:
        return self.kv.overdue()

    @override
    def tightened(self) -> Bools | None:
        if not self.monitors:
            return None
        pairs = zip(self.monitors.values(), self.policies.policies, strict=True)
        return np.concatenate(
            [monitor.tightened_rows(policy.num_tags) for monitor, policy in pairs]
        )

    @override
    def missing(self, request_id: str, end: int) -> int:
        return self.kv.missing(request_id, end)

    @override
    def forget(self, request_id: str) -> None:
        self.kv.forget(request_id)
        self.work.forget(request_id)

    @override
    def ended(self, request_id: str) -> None:
        for name, monitor in self.monitors.items():
            warn(name, monitor, monitor.ended(request_id))

    @override
    def run(self, batch: Batch, input_ids: Tensor, step: StepContext) -> StepOutput:
        # The host's clock tells what a CPU does; of a GPU only what it is told to do.
        if step.device.type != "cpu":
            return self._run(batch, input_ids, step)
        start = time.perf_counter()
        output = self._run(batch, input_ids, step)
        self.stats.seconds += time.perf_counter() - start
        return output

    def _run(self, batch: Batch, input_ids: Tensor, step: StepContext) -> StepOutput:
        owners = self.policies.owners(step.tags)
        self.stats.tokens_decided += step.num_sampled
        work = self.work.step(owners, step.request_ids, step.layout.lens)
        decisions = Decisions(self.policies, owners, step, self._agreed)
        states = HiddenStates(input_ids)
        for segment in range(self._shape.last_segment):
            if segment == self._shape.tail:
                batch, states = self._spare_rows(batch, states, step, work)
            states = self._segment(segment, batch, states, work)
            if segment == len(self.policies.exit_points):  # the last layer is next
                break
            if step.is_open:
                self._ask(decisions, segment, states, step)
            regrouped = self._regroup(segment, batch, states, step, work)
            if regrouped is None:
                continue
            states = regrouped
            if states.num_rows == 0:
                break
            batch = batch.narrowed(step.layout)
        hidden = self._last(batch, states, step, input_ids.shape[0], work)
        work.decided(step.at_full_depth(), self._shape.depth)
        scored = []
        for policy, early, answers in decisions.early():
            if policy.answer_ids is not None:
                [requests] = step.on_device(early)
                scored.append(ScoredAnswers(early, answers[requests], policy.answer_ids))
            else:
                requests, rows = step.on_device(early, step.original_sampled_rows(early))
                hidden[rows] = answers[requests]
        shadows = decisions.of_shadows(self.monitors, self.stats)
        return StepOutput(hidden, tuple(scored), tuple(shadows))

    def _segment(
        self, segment: int, batch: Batch, states: HiddenStates, work: StepWork
    ) -> HiddenStates:
        work.ran(self._shape.segment_layers[segment])
        return batch.run(segment, states)

    def _ask(
        self, decisions: Decisions, exit_index: int, states: HiddenStates, step: StepContext
    ) -> None:
        if step.device.type != "cpu":
            decisions.ask(exit_index, states)
            return
        start = time.perf_counter()
        decisions.ask(exit_index, states)
        self.stats.probe_seconds += time.perf_counter() - start

    def _regroup(
        self,
        exit_index: int,
        batch: Batch,
        states: HiddenStates,
        step: StepContext,
        work: StepWork,
    ) -> HiddenStates | None:
        """The states of the rows that run on below this exit point; None if no row has changed."""
        leaving = step.ready()
        if leaving.size and not self._worth_it(exit_index, leaving, step):
            leaving = leaving[:0]
        waiting = self.kv.waiting(exit_index, step, leaving)
        if leaving.size == 0 and waiting is None:
            return None
        if leaving.size:
            self._let_go(exit_index, leaving, batch, states, step, work)
        if waiting is not None and self._catch_up.needed(leaving, waiting, step):
            self._catch_up.run(exit_index, waiting, batch, step, work)
            waiting = None
        if waiting is not None:
            states = states.rows(slice(0, step.layout.num_rows))  # without padding
            states = HiddenStates.cat([states, self.kv.rejoin(exit_index, step, waiting)])
            work.join(exit_index, waiting.nonzero()[0])
        return states.rows(step.regroup(leaving, waiting))

    def _let_go(
        self,
        exit_index: int,
        leaving: Ints,
        batch: Batch,
        states: HiddenStates,
        step: StepContext,
        work: StepWork,
    ) -> None:
        """Requests leave at this exit point."""
        work.decided(leaving, self.policies.exit_points[exit_index])
        if self.policies.exit_points[exit_index] >= self._shape.kv_layers:
            step.note_all_kv(leaving)
            work.leave(exit_index, leaving)
            return
        continues = step.continues[leaving]
        if (continuing := leaving[continues]).size:
            self.kv.leave(exit_index, continuing, batch, states, step)
        if self.defers:
            work.defer(exit_index, continuing)
            leaving = leaving[~continues]
        work.leave(exit_index, leaving)

    def _worth_it(self, exit_index: int, leaving: Ints, step: StepContext) -> bool:
        """Whether requests that are ready are to leave at this exit point."""
        ready = int(step.layout.lens[leaving].sum())
        if self._min_rows_saved is not None:
            return ready >= self._min_rows_saved
        if ready == step.layout.num_rows:  # no rows are left to regroup
            return True
        point, shape = self.policies.exit_points[exit_index], self._shape
        lacking = max(shape.kv_layers - point, 0)
        spared = step.rows_spared(leaving, self.defers) * lacking
        spared += len(leaving) * (shape.depth - point - lacking)  # which rows for KV leave out, too
        return spared >= REGROUP_COST[step.device.type]

    def _last(
        self, batch: Batch, states: HiddenStates, step: StepContext, rows: int, work: StepWork
    ) -> Tensor:
        """[rows, head size] of the original batch: what the LM head reads of the remaining rows."""
        if states.num_rows == 0:
            return states.hidden.new_empty(rows, self._shape.head_size)
        if self._shape.tail == self._shape.last_segment:
            batch, states = self._spare_rows(batch, states, step, work)
        final = self._segment(self._shape.last_segment, batch, states, work).hidden
        if step.is_original:
            return final
        output = final.new_empty(rows, self._shape.head_size)
        step.scatter(final, output)
        return output

    def _spare_rows(
        self, batch: Batch, states: HiddenStates, step: StepContext, work: StepWork
    ) -> tuple[Batch, HiddenStates]:
        """Where that pays, the batch without rows that decide nothing and are at the tail.

        If that is the last layer, they get their keys and values there, and are counted as if they
        had run it.
        """
        wanted = step.keep_last_rows(self._shape.tail_layers)
        if wanted is None:
            return batch, states
        all_states, states = states, states.rows(wanted)
        is_last_layer = self._shape.own_kv_layers is None
        if is_last_layer:
            batch.write_last_kv(all_states)
        else:
            work.keep_last_rows(step.layout.present, self._shape.tail_layers)
        return batch.beside(step.layout, is_last_layer), states
