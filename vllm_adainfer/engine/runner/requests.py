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
from vllm_adainfer.engine.admission.admitted import NOT_POOLED, Admitted
from vllm_adainfer.engine.admission.resolved import UNLIMITED, Resolved, params_of, resolved_of
from vllm_adainfer.engine.admission.threshold_rows import FULL_DEPTH
from vllm_adainfer.engine.runner.adapters import LoadedAdapters, StepAdapters
from vllm_adainfer.engine.runner.own_kinds import OwnKinds
from vllm_adainfer.exits.accounting.decided import Provenance
from vllm_adainfer.exits.accounting.report import INTERVAL, StepNote, snapshot_of
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.loop.loop import Loop
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.settings.engine import read_settings

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class RunningRequests:
    """Admits requests on arrival, and describes steps with what each request may do.

    Attributes:
        admission: decides which policy a request gets.
        adapters: the fingerprints of the adapters that the worker has loaded.
        lora_manager: the worker's LoRA manager of vLLM; None without LoRA.
        window: the smallest sliding window of all layers, in tokens.
        kinds: those of a server that calibrates itself; None for any other.
        digests: the digest of the files of each policy's artifact, by the policy's name.

    """

    lora_manager: Any = None
    kinds: OwnKinds | None = None

    def __init__(self, vllm_config: VllmConfig, loop: Loop) -> None:
        """`loop` runs the steps of these requests."""
        settings = read_settings(vllm_config.additional_config)
        assert settings is not None
        self.admission = Admission.from_config(vllm_config, settings)
        self.adapters = LoadedAdapters()
        self._loop = loop
        self.window = UNLIMITED
        self._admitted: dict[str, Admitted] = {}
        # Only the scheduler's `PrefixCacheGuard` reads which tokens are complete.
        self._reports_complete = (
            vllm_config.cache_config.enable_prefix_caching and not self.admission.is_recording
        )
        self._audits = settings.audit is not None
        self.digests: Mapping[str, str] = {}
        self._ran: StepContext | None = None
        self._next_report = 0.0

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
            resolved = self.admission.resolve(new.req_id, params_of(new), adapter)
        prompt = new.prompt_token_ids or ()
        admitted = self._admit(resolved, prompt, adapter)
        if admitted.not_covered is not None:
            stats = self._loop.stats.by_policy[admitted.policy]
            stats.not_covered[admitted.not_covered] += 1
        self._admitted[new.req_id] = admitted
        if resolved.query is not None:
            self._loop.began(new.req_id, resolved.query)

    def use_admission(self, admission: Admission) -> None:
        """Decide by `admission` from now on, for running requests too."""
        self.admission = admission
        for request_id, before in self._admitted.items():
            now = self._admit(before.resolved, before.prompt, before.adapter)
            if now != before:  # another policy reads its prompt, or another adapter ran some of it
                self._loop.carried.forget(request_id)
            self._admitted[request_id] = now

    def _admit(
        self, resolved: Resolved, prompt: Sequence[int], adapter: LoRARequest | None
    ) -> Admitted:
        fingerprint = None if adapter is None else self.adapters.fingerprint_of(adapter)
        return self.admission.admit(resolved, prompt, adapter, fingerprint)

    def lost_kv(self, request_id: str) -> None:
        """Forget the KV of a preempted request: it starts again without its blocks."""
        self._loop.forget(request_id)

    def remove(self, request_id: str) -> None:
        """Forget a request that has ended, or that vLLM will add again."""
        self._admitted.pop(request_id, None)
        self._loop.forget(request_id)

    def ended(self, request_ids: Iterable[str]) -> None:
        """Note that these requests get no more tokens."""
        for request_id in request_ids:
            self._loop.ended(request_id, ran=self.knows(request_id))

    def knows(self, request_id: str) -> bool:
        """Whether this is a real request, not a row of a dummy batch."""
        return request_id in self._admitted

    def describe(
        self,
        request_ids: Sequence[str],
        query_lens: Ints,
        computed: Ints,
        yields_token: Bools,
        device: torch.device,
    ) -> StepContext:
        """The context of the step that is about to run.

        Args:
            request_ids: the request ids, in batch order.
            query_lens: [requests], the rows of each request.
            computed: [requests], the tokens of each request that earlier steps have computed.
            yields_token: [requests], whether this step samples a token for the request.
            device: the device of the rows.

        """
        if self.adapters.take_changed():
            self.use_admission(self.admission)
        admitted = [self._admitted[request_id] for request_id in request_ids]
        last = computed + query_lens - 1
        prompt = np.array([len(request.prompt) for request in admitted])
        rows = np.array([request.threshold_row for request in admitted])
        pooled_from = self._whole_prompts(admitted, request_ids, computed, rows)
        max_tokens = np.array([request.resolved.max_tokens for request in admitted])
        full_prefill = np.array([request.resolved.force_full_depth_prefill for request in admitted])
        completes = full_prefill & (computed < prompt)  # keys and values that others need
        certified = np.array([request.certified_tokens for request in admitted])
        rows[last + 2 - prompt > certified] = FULL_DEPTH  # left: which token of the request this is
        chooses = subsets = record_rows = texts = None
        if self.admission.has_choices:
            chooses = np.array([request.has_choice_policy for request in admitted])
        if self.admission.has_pools:
            subsets = np.array([request.subset for request in admitted])
        if self.admission.has_students:
            texts = [request.text for request in admitted]
        if self.admission.is_recording:
            record_rows = np.array([request.record_row for request in admitted])
        if self._loop.stats.weights_differ:
            rows[:] = FULL_DEPTH
        overdue = self._loop.kv.overdue()
        if overdue:
            rows[[request_id in overdue for request_id in request_ids]] = FULL_DEPTH
        continues = last + 2 - prompt < max_tokens  # once this step's token is appended
        # vLLM frees blocks outside the window, which deferred rows still need. Chunks before the
        # last one are never deferred, and pooled policies read them.
        completes |= yields_token & continues & (last + 1 >= self.window)
        stays = None
        if self.admission.any_stand:
            stands = np.array([request.answers_stand for request in admitted])
            stays, completes = completes & stands, completes & ~stands
        rows[completes] = FULL_DEPTH
        shadow = recorded = None
        if self.kinds is not None:
            serves = not self._loop.stats.weights_differ
            first = np.flatnonzero(serves & yields_token & (last + 1 == prompt))
            shadow, recorded = self.kinds.admit_by_ledger(admitted, first, query_lens, rows)
        elif (tightened := self._loop.tightened()) is not None:
            shadow = np.array([request.resolved.is_shadow for request in admitted])
            rows[tightened[rows] & ~shadow] = FULL_DEPTH
        if pooled_from is not None and not self.admission.is_recording:
            pooled_from[rows == FULL_DEPTH] = NOT_POOLED
        self._ran = StepContext(
            request_ids=request_ids,
            layout=RowLayout(query_lens, last),
            yields_token=yields_token,
            threshold_rows=rows,
            continues=continues,
            is_shadow=shadow,
            stays=stays,
            subsets=subsets,
            pooled_from=pooled_from,
            texts=texts,
            record_rows=record_rows,
            recorded=recorded,
            ends_early=chooses,
            all_rows_count=any(request.resolved.wants_prompt_logprobs for request in admitted),
            device=device,
        )
        return self._ran

    def _whole_prompts(
        self,
        admitted: Sequence[Admitted],
        request_ids: Sequence[str],
        computed: Ints,
        threshold_rows: Ints,
    ) -> Ints | None:
        """`StepContext.pooled_from`; None if nothing is pooled.

        A request of which some rows that belong to the mean never ran gets the threshold row of its
        policy's heads for the last token.
        """
        if not self.admission.has_pooled:
            return None
        pooled_from = np.array([request.pooled_from for request in admitted])
        for place in np.flatnonzero((pooled_from >= 0) & (computed > pooled_from)).tolist():
            if self._loop.carried.end(request_ids[place]) != computed[place]:
                pooled_from[place] = NOT_POOLED
                threshold_rows[place] = admitted[place].last_token_row
        return pooled_from

    def adapters_of(self, step: StepContext) -> StepAdapters | None:
        """The adapters of a step's requests; None without LoRA."""
        if self.lora_manager is None:
            return None
        adapters = [self._admitted[request_id].adapter for request_id in step.request_ids]
        return StepAdapters(self.lora_manager, adapters)

    def take_note(self) -> StepNote | None:
        """The note to the scheduler about the last step; None if there was none."""
        step, self._ran = self._ran, None
        if step is None:
            return None
        if self.kinds is not None:
            self.kinds.step_ended(self._loop.take_misses())
            self._loop.tighten(self.kinds.closed)
        now = time.monotonic()
        if due := now >= self._next_report:
            self._next_report = now + INTERVAL
        complete = self._complete(step) if self._reports_complete else None
        counted = snapshot_of(self._loop.stats) if due else None
        return StepNote(complete, counted, tuple(self._decided(step)) if self._audits else ())

    def idle_note(self) -> StepNote:
        """The note to the scheduler when no work is left: the counters alone."""
        return StepNote(None, snapshot_of(self._loop.stats))

    def _decided(self, step: StepContext) -> Iterator[Provenance]:
        """Where the tokens of a step came from."""
        for token in self._loop.decided(step):
            yield Provenance(
                step.request_ids[token.place],
                token.policy,
                self.digests.get(token.policy, ""),
                self.admission.epsilon_of(int(step.threshold_rows[token.place])),
                token.layers,
                token.outcome,
                self._admitted[step.request_ids[token.place]].not_covered,
            )

    def _complete(self, step: StepContext) -> dict[str, int]:
        """How many tokens of each request that may exit have complete KV."""
        ended = set(step.lacking_kv[~step.continues[step.lacking_kv]].tolist())
        ends = (step.layout.last_positions + 1).tolist()
        return {
            request_id: 0
            if place in ended
            else ends[place] - self._loop.kv.missing(request_id, ends[place])
            for place, request_id in enumerate(step.request_ids)
            if self._admitted[request_id].resolved.may_exit
        }
