"""The exit loop: run a segment, let policies decide, let settled requests leave, run the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from torch import Tensor
from typing_extensions import override

from vllm_adainfer.arrays import AnyArray, Bools, Ints
from vllm_adainfer.exits.accounting.clock import StepTimes
from vllm_adainfer.exits.accounting.counters import ExitStats
from vllm_adainfer.exits.accounting.layers import LayerAccounting
from vllm_adainfer.exits.accounting.report import DecidedToken, Outcome
from vllm_adainfer.exits.batch.batch import Batch, StackShape
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.decisions import Decisions
from vllm_adainfer.exits.loop.forward_pass import COMPACTION_COST, ForwardPass
from vllm_adainfer.exits.loop.loop import Loop, StateKeeper, StepOutput
from vllm_adainfer.exits.loop.schedule import DecodeSchedule, DecodeTimes
from vllm_adainfer.exits.loop.step import NOBODY, StepContext
from vllm_adainfer.policy.policy_set import PolicySet
from vllm_adainfer.transfers import HostCopy
from vllm_adainfer.watch.watch import Watch


class ExitLoop(Loop):
    """Runs a model's stack and lets requests leave it early.

    A request leaves at the first exit point where a policy has settled it and enough rows leave
    with it to be worth a smaller batch. Until then it stays in. If it reaches full depth after all,
    its early answer is dropped, unless the policy's answers stand. A shadow request always reaches
    full depth, and both answers are compared. The KV policy takes care of what later tokens find in
    the layers that a request has skipped. `keep_states` gets the states of `StepContext.recorded`,
    and `times` count where the time of steps is to be known.
    """

    def __init__(
        self,
        shape: StackShape,
        policies: PolicySet,
        kv: ExactKV,
        monitors: Mapping[str, Watch],
        max_rows: int,
        min_rows_saved: int | None = None,
        compaction_cost: int = COMPACTION_COST,
        read: Callable[[Tensor], AnyArray] = lambda values: values.cpu().numpy(),
        send: Callable[[Tensor], HostCopy] = HostCopy,
        decode_times: DecodeTimes | None = None,
    ) -> None:
        """Prepare to run a stack of this shape, cut at the exit points of `policies`.

        Args:
            shape, policies, kv: the stack's, who decides, and who takes care of skipped layers.
            monitors: one for each policy, in the same order, or none.
            max_rows: the most rows that a segment may get: vLLM has compiled for so many, and
                attention backends have buffers for them.
            min_rows_saved: rows that must leave together; None lets them leave where it is faster.
            compaction_cost: the token-layers that a smaller batch must save to be faster.
            read: copies a tensor to the host: the first rank's on every rank, so that all agree.
            send: the same, without waiting for the copy.
            decode_times: of the device, if decode steps ask at one exit point; None if at all.

        """
        super().__init__()
        self._decode_times = decode_times
        self._schedules: dict[int, DecodeSchedule] = {}  # by policy, an index into `policies`
        self.policies = policies
        self.kv = kv
        self.monitors = monitors
        self._shape = shape
        self._min_rows_saved = min_rows_saved
        self._compaction_cost = compaction_cost
        self._max_rows = max_rows
        self._read, self._send = read, send
        self.keep_states: StateKeeper | None = None
        self.times: StepTimes | None = None
        self._first = 0 if shape.segment_layers[0] else 1  # segment with layers
        self._owners = NOBODY  # of the last step's requests, see `ForwardPass`
        self.stats = ExitStats()
        self.reset_counters()

    def use_policies(self, policies: PolicySet, monitors: Mapping[str, Watch]) -> None:
        """Decide by other policies, with the same exit points, from the next step on.

        The counters of a policy that has gone stay.
        """
        self.policies, self.monitors = policies, monitors
        self.carried.clear()  # other policies may read prompts at other exit points
        self._schedules.clear()
        self.stats.serving, self.stats.shadow = policies.names, monitors
        self.accounting.use_names(policies.names)

    @override
    def reset_counters(self) -> None:
        names = self.policies.names
        self.stats = ExitStats(
            serving=names,
            weights_differ=self.stats.weights_differ,
            failed_parts=self.stats.failed_parts,
            not_tested=self.stats.not_tested,
            shadow=self.monitors,
        )
        self.accounting = LayerAccounting(self.stats, names)

    @override
    def tightened(self) -> Bools | None:
        if not self.monitors:
            return None
        pairs = zip(self.monitors.values(), self.policies.policies, strict=True)
        return np.concatenate(
            [monitor.tightened_rows(policy.num_threshold_rows) for monitor, policy in pairs]
        )

    @override
    def forget(self, request_id: str) -> None:
        self.carried.forget(request_id)
        for exit_index, policies in self.kv.forget(request_id):
            below = self._shape.depth - self._shape.depth_after(exit_index)
            self.accounting.skipped(self.accounting.tokens(policies), below)

    @override
    def decided(self, step: StepContext) -> Iterator[DecidedToken]:
        names, depth = self.policies.names, self._shape.depth
        owners = self._owners
        early = set(step.exited.tolist())
        answered = step.answered()  # some may have stayed
        early.update(answered[self.policies.answers_stand[owners[answered]]].tolist())
        shadow = set(() if step.shadow is None else step.shadow.tolist())
        for place in np.flatnonzero(step.yields_token).tolist():
            left_at = int(step.left_at[place])
            layers = depth if left_at < 0 else self._shape.depth_after(left_at)
            outcome: Outcome = "early" if place in early else "full_depth"
            if place in shadow:
                outcome = "shadow"
            yield place, names[owners[place]], layers, outcome

    @override
    def run(self, batch: Batch, input_ids: Tensor, step: StepContext) -> StepOutput:
        start, deciding = time.perf_counter(), 0.0
        owners = self._owners = self.policies.owners(step.threshold_rows)
        forward = ForwardPass(
            self._shape,
            step,
            owners,
            batch,
            input_ids,
            self.kv,
            self.accounting,
            self._compaction_cost,
        )
        decisions = Decisions(self.policies, forward, self.carried, self._read)
        self.stats.tokens_decided += step.num_sampled
        schedule, asks, means = self._schedule_of(step), True, list[Tensor]()
        only = None if schedule is None else schedule.next()
        for segment in range(self._shape.last_segment):
            if segment == self._shape.tail:
                forward.drop_unsampled()
            with self._timed_layers(segment, forward):
                forward.run(segment)
            if segment == len(self.policies.exit_points):  # the last layer is next
                break
            forward.record()
            # Who was not asked at one exit point is asked at no later one: what a policy promises
            # is the answer of the first that settles a request. With a schedule, that of any.
            if schedule is not None:
                asks = segment == only
            asks = asks and step.is_open and self._may_pay(segment, forward)
            if asks or decisions.has_chunks:
                began = time.perf_counter()
                decisions.decide(segment)
                deciding += time.perf_counter() - began
                if schedule is not None and asks:
                    lens = forward.layout.query_lens
                    schedule.asked(segment, int(lens.sum()), int(lens[step.ready()].sum()))
            if step.keeps_means is not None and (step.recorded or decisions.has_chunks):
                with self._timed_means(step.recorded_rows()):
                    means.append(decisions.recorded_means(segment))
            self._regroup(segment, forward)
            if forward.layout.num_rows == 0:
                break
        hidden = forward.finish()
        if step.recorded is not None:
            assert self.keep_states is not None
            [rows] = step.on_device(step.layout.last_rows(step.recorded.places))
            states = [*forward.recorded, hidden.index_select(0, rows)]
            self.keep_states(step.recorded, states, means)
        self.carried.step_ended(step)
        scored = decisions.place(hidden)
        shadows = tuple(decisions.of_shadows(self.monitors, self.stats, self._send))
        self.shadow_objects.decided(step, owners, self.policies, self.monitors)
        if step.device.type == "cpu":  # elsewhere the host's clock says nothing about the device
            self.stats.seconds += time.perf_counter() - start
            self.stats.probe_seconds += deciding
        return StepOutput(hidden, scored, shadows, step.sampled_lens, step.early_objects)

    def _schedule_of(self, step: StepContext) -> DecodeSchedule | None:
        """Where a step asks; None if it asks at every exit point.

        A decode step asks once if all of its policies may be asked anywhere.
        """
        times = self._decode_times
        if times is None or (step.layout.query_lens > 1).any():
            return None
        owners = self._owners[step.may_leave()]
        if not owners.size or not self.policies.any_exit_point[owners].all():
            return None
        owner, depth = int(owners[0]), self._shape.depth
        if owner not in self._schedules:
            left = [depth - layer for layer in self.policies.exit_points]
            self._schedules[owner] = DecodeSchedule(left, times)
        return self._schedules[owner]

    def _timed_layers(self, segment: int, forward: ForwardPass) -> AbstractContextManager[None]:
        """Time the first segment with layers, where the step's rows are still together."""
        if self.times is None or segment != self._first:
            return nullcontext()
        layers = self._shape.segment_layers[segment]
        return self.times.layers.timing(forward.layout.num_rows * layers)

    def _timed_means(self, rows: int) -> AbstractContextManager[None]:
        return self.times.means.timing(rows) if self.times is not None and rows else nullcontext()

    def _regroup(self, exit_index: int, forward: ForwardPass) -> None:
        """Let settled requests leave if that pays, and rows that wait here rejoin the others."""
        leaving = forward.step.ready()
        if leaving.size and not self._pays(exit_index, leaving, forward):
            leaving = NOBODY
        waiting = forward.waiting(exit_index, leaving)
        if leaving.size or waiting is not None:
            forward.regroup(exit_index, leaving, waiting, self._max_rows)

    def _may_pay(self, exit_index: int, forward: ForwardPass) -> bool:
        """Whether to run the probes here. Not if no request could leave even if all were settled.

        Such requests run to full depth, which satisfies every bound, except those of policies whose
        answers stand. Shadow requests are probed, too: their answers are compared though they stay.
        """
        step = forward.step
        if step.num_shadow or self.policies.answers_stand[forward.owners].any():
            return True
        rows = int(forward.layout.query_lens[step.may_leave()].sum())
        if rows == forward.layout.num_rows:
            return True
        rows += self.kv.taken  # they may rejoin those
        if self._min_rows_saved is not None:
            return rows >= self._min_rows_saved
        layers = self._shape.depth - self._shape.depth_after(exit_index)
        return rows * layers >= forward.compaction_cost

    def _pays(self, exit_index: int, leaving: Ints, forward: ForwardPass) -> bool:
        """Whether requests that are ready are to leave at this exit point."""
        step, lens = forward.step, forward.layout.query_lens
        ready = int(lens[leaving].sum())
        if self._min_rows_saved is not None:
            return ready >= self._min_rows_saved
        if ready == forward.layout.num_rows:  # no rows are left to compact
            return True
        depth, shape = self._shape.depth_after(exit_index), self._shape
        # Rows of a request that goes on only run the layers later, but not those without keys
        # and values.
        for_good = int(lens[step.ending(leaving)].sum())
        with_kv = max(shape.kv_layers - depth, 0)
        saved = for_good * with_kv + len(leaving) * (shape.depth - depth - with_kv)
        return saved >= forward.compaction_cost
