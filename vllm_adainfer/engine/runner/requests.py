"""The requests that a worker runs, and the step contexts made of them, for runners V1 and V2."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import KVCacheConfig, SlidingWindowSpec, iter_layer_specs

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.engine.admission.admission import FULL_DEPTH, Admission, Admitted
from vllm_adainfer.engine.admission.resolved import UNLIMITED, Resolved, resolved_of
from vllm_adainfer.engine.runner.adapters import LoadedAdapters, StepAdapters
from vllm_adainfer.exits.accounting.report import INTERVAL, StepNote, snapshot_of
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.loop.loop import Loop
from vllm_adainfer.exits.loop.step import StepContext
from vllm_adainfer.settings.engine import read_settings

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest


class RunningRequests:
    """Admits requests when they arrive and says what each may do in a step.

    Attributes:
        admission: decides.
        adapters: that the worker has loaded.
        lora_manager: vLLM's, of the worker; None where LoRA is off.

    """

    lora_manager: Any = None

    def __init__(self, vllm_config: VllmConfig, loop: Loop) -> None:
        """`loop` runs them."""
        settings = read_settings(vllm_config.additional_config)
        assert settings is not None
        self.admission = Admission.from_config(vllm_config, settings)
        self.adapters = LoadedAdapters()
        self._loop = loop
        self._window = UNLIMITED
        self._admitted: dict[str, Admitted] = {}
        # Without a guard nobody reads which tokens are complete, see `GuardedScheduler`.
        self._scheduler_asks = (
            vllm_config.cache_config.enable_prefix_caching and not self.admission.is_recording
        )
        self._ran: StepContext | None = None
        self._next_report = 0.0

    def use_kv_cache(self, config: KVCacheConfig) -> None:
        """Note how many tokens the layer with the smallest sliding window sees."""
        groups = config.kv_cache_groups
        specs = [spec for group in groups for spec in iter_layer_specs(group.kv_cache_spec)]
        windows = [spec.sliding_window for spec in specs if isinstance(spec, SlidingWindowSpec)]
        self._window = min(windows, default=UNLIMITED)

    def add(self, new: Any) -> None:
        """Admit a request of vLLM's `NewRequestData`, as the scheduler has decided about it.

        No scheduler has seen those that vLLM warms up with.
        """
        params, adapter = new.sampling_params, new.lora_request
        resolved = resolved_of(params)
        if resolved is None:
            resolved = self.admission.resolve(new.req_id, params, adapter)
        prompt = new.prompt_token_ids or ()
        self._admitted[new.req_id] = self._admit(resolved, prompt, adapter)

    def use_admission(self, admission: Admission) -> None:
        """Let `admission` decide from now on, also about requests that are already running."""
        self.admission = admission
        for request_id, request in self._admitted.items():
            self._admitted[request_id] = self._admit(
                request.resolved, request.prompt, request.adapter
            )

    def _admit(
        self, resolved: Resolved, prompt: Sequence[int], adapter: LoRARequest | None
    ) -> Admitted:
        fingerprint = None if adapter is None else self.adapters.fingerprint_of(adapter)
        return self.admission.admit(resolved, prompt, adapter, fingerprint)

    def lost_kv(self, request_id: str) -> None:
        """The request was preempted: it starts again, without its blocks."""
        self._loop.forget(request_id)

    def remove(self, request_id: str) -> None:
        """The request has ended, or comes back as a new one."""
        self._admitted.pop(request_id, None)
        self._loop.forget(request_id)

    def ended(self, request_ids: Iterable[str]) -> None:
        """These requests get no more tokens."""
        for request_id in request_ids:
            self._loop.ended(request_id)

    def knows(self, request_id: str) -> bool:
        """Whether this is a real request, not part of a dummy batch."""
        return request_id in self._admitted

    def describe(
        self,
        request_ids: Sequence[str],
        query_lens: Ints,
        computed: Ints,
        yields_token: Bools,
        device: torch.device,
    ) -> StepContext:
        """The step that is about to run.

        Args:
            request_ids: vLLM's, in order of the batch.
            query_lens: [requests], rows of each.
            computed: [requests], tokens of each that have been through the stack before.
            yields_token: [requests], whether this step yields a token.
            device: of the rows.

        """
        if self.adapters.take_changed():
            self.use_admission(self.admission)
        admitted = [self._admitted[request_id] for request_id in request_ids]
        last = computed + query_lens - 1
        prompt = np.array([len(request.prompt) for request in admitted])
        rows = np.array([request.threshold_row for request in admitted])
        max_tokens = np.array([request.resolved.max_tokens for request in admitted])
        full_prefill = np.array([request.resolved.force_full_depth_prefill for request in admitted])
        rows[full_prefill & (computed < prompt)] = FULL_DEPTH
        certified = np.array([request.certified_tokens for request in admitted])
        rows[last + 2 - prompt > certified] = FULL_DEPTH  # the number of this step's token
        chooses = subsets = record_rows = None
        if self.admission.has_choices:
            chooses = np.array([request.has_choice_policy for request in admitted])
        if self.admission.has_pools:
            subsets = np.array([request.subset for request in admitted])
        if self.admission.is_recording:
            record_rows = np.array([request.record_row for request in admitted])
        if self._loop.stats.weights_differ:
            rows[:] = FULL_DEPTH
        overdue = self._loop.kv.overdue()
        if overdue:
            rows[[request_id in overdue for request_id in request_ids]] = FULL_DEPTH
        continues = last + 2 - prompt < max_tokens  # once this step's token is appended
        if self._loop.kv.defers:
            # vLLM frees blocks beyond the window that waiting rows still need.
            rows[continues & (last + 1 >= self._window)] = FULL_DEPTH
        shadow, tightened = None, self._loop.tightened()
        if tightened is not None:
            shadow = np.array([request.resolved.is_shadow for request in admitted])
            rows[tightened[rows] & ~shadow] = FULL_DEPTH
        self._ran = StepContext(
            request_ids=request_ids,
            layout=RowLayout(query_lens, last),
            yields_token=yields_token,
            threshold_rows=rows,
            continues=continues,
            is_shadow=shadow,
            subsets=subsets,
            record_rows=record_rows,
            ends_early=chooses,
            all_rows_count=any(request.resolved.wants_prompt_logprobs for request in admitted),
            device=device,
        )
        return self._ran

    def adapters_of(self, step: StepContext) -> StepAdapters | None:
        """The adapters of a step's requests, None where LoRA is off."""
        if self.lora_manager is None:
            return None
        adapters = [self._admitted[request_id].adapter for request_id in step.request_ids]
        return StepAdapters(self.lora_manager, adapters)

    def take_note(self) -> StepNote | None:
        """The note to the scheduler after a step, None if there was no step."""
        step, self._ran = self._ran, None
        if step is None:
            return None
        now = time.monotonic()
        if due := now >= self._next_report:
            self._next_report = now + INTERVAL
        complete = self._complete(step) if self._scheduler_asks else None
        return StepNote(complete, snapshot_of(self._loop.stats) if due else None)

    def note_at_rest(self) -> StepNote:
        """The note to the scheduler when no work is left."""
        return StepNote(None, snapshot_of(self._loop.stats))

    def _complete(self, step: StepContext) -> dict[str, int]:
        ended = set(step.lacking_kv[~step.continues[step.lacking_kv]].tolist())
        ends = (step.layout.last_positions + 1).tolist()
        return {
            request_id: 0
            if place in ended
            else ends[place] - self._loop.kv.missing(request_id, ends[place])
            for place, request_id in enumerate(step.request_ids)
            if self._admitted[request_id].resolved.may_exit
        }
