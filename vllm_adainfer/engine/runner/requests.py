"""The requests a worker runs, and the step contexts made of them, for Model Runner V1 and V2."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, SlidingWindowSpec, iter_layer_specs

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.running import (
    NOT_POOLED,
    UNLIMITED,
    Running,
    params_of,
    resolved_of,
)
from vllm_adainfer.engine.runner.adapters import LoadedAdapters, StepAdapters, changes_head
from vllm_adainfer.engine.runner.admitted_kinds import AdmittedKinds, AdmittedStep
from vllm_adainfer.engine.runner.judgements import Judgements
from vllm_adainfer.engine.runner.ranks import made_by_rank0
from vllm_adainfer.engine.runner.request_table import Columns, RequestTable
from vllm_adainfer.exits.accounting.report import (
    INTERVAL,
    DecidedObject,
    Provenance,
    Snapshot,
    StepNote,
    WhyFullDepth,
    snapshot_of,
)
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.loop.loop import Loop
from vllm_adainfer.exits.loop.step import FULL_DEPTH, NOBODY, StepContext
from vllm_adainfer.settings.engine import read_settings

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class RunningRequests:
    """Admits requests on arrival, and describes steps with what each request may do.

    `lora_manager` is the worker's of vLLM; `window` the smallest sliding window of all layers, in
    tokens; `kinds` those of a server that calibrates itself, on its first rank; and `digests` have,
    by the policy's name, the digest of its artifact's files.
    """

    lora_manager: Any = None
    kinds: AdmittedKinds | None = None

    def __init__(
        self, vllm_config: VllmConfig, loop: Loop, admission: Admission | None = None
    ) -> None:
        """`loop` runs the steps of these requests; `admission` is that of the engine by default."""
        settings = read_settings(vllm_config.additional_config)
        assert settings is not None
        self.admission = admission or Admission.from_config(vllm_config, settings)
        self.adapters = LoadedAdapters()
        self._loop = loop
        self.window = UNLIMITED
        self._requests: dict[str, Running] = {}
        self._table = RequestTable()
        # Only the scheduler's `PrefixCacheGuard` reads which tokens are complete.
        self._reports_complete = (
            vllm_config.cache_config.enable_prefix_caching and not self.admission.is_recording
        )
        self._calibrates_itself = settings.calibrates_itself
        self._audits = settings.audit is not None
        self.digests: Mapping[str, str] = {}
        self._ran: StepContext | None = None
        self._why: dict[int, WhyFullDepth] = {}  # of that step's requests; empty without an audit
        self._next_report = 0.0
        self._judgements = Judgements(loop)

    def use_kv_cache(self, config: KVCacheConfig) -> None:
        """Note the smallest sliding window of all layers, in tokens."""
        groups = config.kv_cache_groups
        specs = [spec for group in groups for spec in iter_layer_specs(group.kv_cache_spec)]
        windows = [spec.sliding_window for spec in specs if isinstance(spec, SlidingWindowSpec)]
        self.window = min(windows, default=UNLIMITED)

    def add(self, new: Any) -> None:
        """Admit a request, vLLM's `NewRequestData`, by the scheduler's record of it.

        Warm-up requests of vLLM have no record: they pass no scheduler.
        """
        adapter, resolved = new.lora_request, resolved_of(new)
        if resolved is None:
            resolved = self.admission.arrival.resolve(new.req_id, params_of(new), adapter)
        request = self._admit(resolved, new.prompt_token_ids or (), adapter)
        if request.not_covered is not None:
            self._loop.stats.by_policy[request.policy].not_covered[request.not_covered] += 1
        self._put(new.req_id, request)
        if request.query is not None:
            self._loop.began(new.req_id, request.query)

    def use_admission(self, admission: Admission) -> None:
        """Decide by `admission` from now on, for running requests too."""
        self.admission = admission
        for request_id, before in self._requests.items():
            now = self._admit(before, before.prompt, before.adapter)
            if now != before:  # another policy reads its prompt, or another adapter ran some of it
                self._loop.carried.forget(request_id)
            self._put(request_id, now)

    def _put(self, request_id: str, request: Running) -> None:
        self._requests[request_id] = request
        self._table.put(request_id, request)

    def _admit(
        self, request: Running, prompt: Sequence[int], adapter: LoRARequest | None
    ) -> Running:
        if adapter is None:
            return self.admission.admit(request, prompt)
        fingerprint = self.adapters.fingerprint_of(adapter)
        # The trainer has the base model's head alone.
        if request.kind is not None and changes_head(adapter.lora_path, fingerprint):
            request = request.changed(kind=None)
        return self.admission.admit(request, prompt, adapter, fingerprint)

    def lost_kv(self, request_id: str) -> None:
        """Forget the KV of a preempted request: it starts again without its blocks."""
        self._loop.forget(request_id)

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended, or that vLLM will add again."""
        self._requests.pop(request_id, None)
        self._table.drop(request_id)
        self._loop.forget(request_id)

    def ended(self, request_ids: Iterable[str], objects: Mapping[str, int]) -> None:
        """Note that these requests get no more tokens, and which `objects` some have written."""
        self._loop.written(objects)
        for request_id in request_ids:
            self._loop.ended(request_id, ran=self.knows(request_id))

    def knows(self, request_id: str) -> bool:
        """Whether this is a real request, not a row of a dummy batch."""
        return request_id in self._requests

    def describe(
        self,
        request_ids: Sequence[str],
        query_lens: Ints,
        computed: Ints,
        yields_token: Bools,
        device: torch.device,
        drafted: Ints | None = None,
    ) -> StepContext:
        """The context of the step that is about to run, whose requests are in batch order.

        `computed` [requests] are the tokens of each that earlier steps have computed; `drafted` how
        many of its last rows have a draft.
        """
        if self.adapters.take_changed():
            self.use_admission(self.admission)
        admission, loop, own = self.admission, self._loop, self._table.of(request_ids)
        last = computed + query_lens - 1
        token = last + 2 - own.prompt_tokens  # that this step samples, the first of a request is 1
        if drafted is not None:
            token -= drafted
        continues = token < own.max_tokens  # once this step's token is appended
        guessed = None
        if admission.has_objects:
            guessed = (own.guessed != 0) & yields_token & (token == 1) & (drafted == own.guessed)
            continues &= ~guessed  # an early answer is the whole object
            own.threshold_row[(own.guessed != 0) & (token > 1)] = FULL_DEPTH  # and nothing less is
        rows, pooled_from = own.threshold_row, None
        if admission.has_pooled:
            pooled_from = own.pooled_from
            self._without_lost_rows(own, request_ids, computed)
        needs_all = (own.force_full_depth_prefill != 0) & (computed < own.prompt_tokens)
        # vLLM frees blocks outside the window, which deferred rows still need. Chunks before the
        # last one are never deferred, and pooled policies read them.
        needs_all |= yields_token & continues & (last + 1 >= self.window)
        stays = None
        if admission.any_stand:
            stands = own.answers_stand != 0
            stays, needs_all = needs_all & stands, needs_all & ~stands
        self.judge()  # it may decide who may exit in this step
        shadow = recorded = tightened = keeps_means = None
        if not self._calibrates_itself and (tightened := loop.tightened()) is not None:
            shadow = own.is_shadow != 0
        self._why.clear()
        reasons = [*self._full_depth(request_ids, own, token, needs_all, tightened)]
        if guessed is not None:
            reasons.append(("not_guessed", (own.guessed != 0) & ~guessed))
        for why, applies in reasons:
            if self._audits:
                self._why |= dict.fromkeys(np.flatnonzero(applies & (rows != FULL_DEPTH)), why)
            rows[applies] = FULL_DEPTH
        if self._calibrates_itself:
            may_exit = yields_token & (token == 1) & (not loop.stats.weights_differ)

            def by_ledger() -> AdmittedStep:
                assert self.kinds is not None, "the first rank has them"
                requests = [self._requests[request_id] for request_id in request_ids]
                return self.kinds.admit(requests, np.flatnonzero(may_exit), query_lens, rows)

            rows, shadow, recorded, wanted = made_by_rank0(by_ledger)
            ends = loop.carried.ends
            wanted[lost_rows(wanted, request_ids, computed, ends)] = NOT_POOLED
            keeps_means = wanted >= 0
        if pooled_from is not None and not admission.is_recording:
            pooled_from[rows == FULL_DEPTH] = NOT_POOLED
        if keeps_means is not None and keeps_means.any():
            pooled_from = wanted if pooled_from is None else np.maximum(pooled_from, wanted)
        self._ran = StepContext(
            request_ids=request_ids,
            layout=RowLayout(query_lens, last),
            yields_token=yields_token,
            threshold_rows=rows,
            continues=continues,
            is_shadow=shadow,
            stays=stays,
            sampled_lens=None if drafted is None else drafted + 1,
            subsets=own.subset if admission.has_pools else None,
            pooled_from=pooled_from,
            texts=[self._requests[one].text for one in request_ids]
            if admission.has_students
            else None,
            guessed=guessed,
            reads_values=None if guessed is None else own.reads_values != 0,
            guess_rows=[self._requests[one].guess_rows for one in request_ids]
            if admission.has_objects
            else None,
            record_rows=own.record_row if admission.is_recording else None,
            recorded=recorded,
            keeps_means=keeps_means,
            ends_early=own.has_choice_policy != 0 if admission.has_choices else None,
            all_rows_count=bool(own.wants_prompt_logprobs.any()),
            device=device,
        )
        return self._ran

    def _full_depth(
        self,
        request_ids: Sequence[str],
        own: Columns,
        token: Ints,
        needs_all: Bools,
        tightened: Bools | None,
    ) -> Iterator[tuple[WhyFullDepth, Bools]]:
        """The requests that run to full depth in a step though their policy serves them, and why.

        `token` says which of its tokens the step samples for each, and `needs_all` whose keys and
        values others need, or later tokens beyond the window; `tightened` as in `Loop.tightened`.
        """
        yield "beyond_bound", token > own.certified_tokens
        yield "keys_needed", needs_all
        if self._loop.stats.weights_differ:
            yield "other_weights", np.ones(len(token), np.bool_)
        if overdue := self._loop.kv.overdue():
            yield "deferred_rows", np.array([one in overdue for one in request_ids])
        if tightened is not None:
            yield "too_many_differ", tightened[own.threshold_row] & (own.is_shadow == 0)

    def _without_lost_rows(self, own: Columns, request_ids: Sequence[str], computed: Ints) -> None:
        """Let requests be decided by their last token of whose prompts some rows never ran."""
        lost = lost_rows(own.pooled_from, request_ids, computed, self._loop.carried.ends)
        own.pooled_from[lost] = NOT_POOLED
        own.threshold_row[lost] = own.last_token_row[lost]

    def adapters_of(self, step: StepContext) -> StepAdapters | None:
        """The adapters of a step's requests; None without LoRA."""
        if self.lora_manager is None:
            return None
        adapters = [self._requests[request_id].adapter for request_id in step.request_ids]
        return StepAdapters(self.lora_manager, adapters)

    @property
    def early_objects(self) -> Ints:
        """The requests of the step that runs whose objects are early, by their places in it."""
        return NOBODY if self._ran is None else self._ran.early_objects

    def take_note(self) -> StepNote | None:
        """The note to the scheduler about the last step; None if there was none."""
        step, self._ran = self._ran, None
        if step is None:
            return None
        self._judgements.step_ended(self.kinds)
        if self._judgements.has_arrived:
            self.judge()
        complete = self._complete(step) if self._reports_complete else None
        counted = self._snapshot() if time.monotonic() >= self._next_report else None
        decided = tuple(self._decided(step)) if self._audits else ()
        return StepNote(complete, counted, decided, self._objects(step))

    def idle_note(self) -> StepNote:
        """The note to the scheduler when no work is left: the counters alone."""
        self.judge()
        return StepNote(None, self._snapshot())

    def unjudged_step(self) -> int | None:
        """The number of the step that has just run, if the device has not compared its answers."""
        return None if self._judgements.has_arrived else self._judgements.last

    def judge(self, last: int | None = None) -> None:
        """Count the comparisons of all steps up to number `last`, by default of all that have run.

        Any thread may call it. It waits for the device.
        """
        self._judgements.judge(self.kinds, last)

    def _snapshot(self) -> Snapshot:
        """The counters for reports; and when the next is due."""
        self._next_report = time.monotonic() + INTERVAL
        with self._judgements.lock:
            stats = self._loop.stats
            if self.kinds is not None:
                stats.changed_at_most, stats.all_changed_at_most = self.kinds.claims()
            return snapshot_of(stats)

    def _decided(self, step: StepContext) -> Iterator[Provenance]:
        """Where the tokens of a step came from."""
        for place, policy, layers, outcome in self._loop.decided(step):
            request_id = step.request_ids[place]
            yield Provenance(
                request_id,
                policy,
                self.digests.get(policy, ""),
                self.admission.epsilon_of(int(step.threshold_rows[place])),
                layers,
                outcome,
                self._requests[request_id].not_covered,
                self._why.get(place),
            )

    def _objects(self, step: StepContext) -> dict[str, DecidedObject]:
        """The objects that a step has decided."""
        return {
            step.request_ids[place]: DecidedObject(
                self._requests[step.request_ids[place]].policy,
                int(step.codes[place]),
                bool(step.left_at[place] >= 0),
                step.value_logprobs.get(place),
            )
            for place in np.flatnonzero(step.codes >= 0).tolist()
        }

    def _complete(self, step: StepContext) -> dict[str, int]:
        """How many tokens of each request that may exit have complete KV."""
        ended = set(step.lacking_kv[~step.continues[step.lacking_kv]].tolist())
        ends = (step.layout.last_positions + 1 - step.drafted).tolist()
        return {
            request_id: 0
            if place in ended
            else ends[place] - self._loop.kv.missing(request_id, ends[place])
            for place, request_id in enumerate(step.request_ids)
            if self._requests[request_id].may_exit
        }


def lost_rows(
    pooled_from: Ints, request_ids: Sequence[str], computed: Ints, ends: Mapping[str, int]
) -> list[int]:
    """Requests of whose prompts some rows that are to be read never ran, by their places.

    `ends` are the positions up to which earlier chunks were read, see `CarriedPrompts`.
    """
    late = np.flatnonzero((pooled_from >= 0) & (computed > pooled_from)).tolist()
    return [place for place in late if ends.get(request_ids[place]) != computed[place]]
