"""Model Runner V1 with a step context: the one method vLLM documents as overridable."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_adainfer import compat
from vllm_adainfer.config import read_settings
from vllm_adainfer.runtime.admission import FULL_DEPTH, UNLIMITED, Admission, Admitted
from vllm_adainfer.runtime.attention import AttentionNarrower
from vllm_adainfer.runtime.layout import RowLayout
from vllm_adainfer.runtime.step import StepContext


class AdaInferCPUModelRunner(CPUModelRunner):
    """Tells the model whose rows it is about to run and who may exit."""

    _narrow: AttentionNarrower | None = None
    _complete: dict[str, int] | None = None  # of the step being run, see `_complete_tokens`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = read_settings(self.vllm_config.additional_config)
        assert settings is not None
        self.admission = Admission(settings)
        self._admitted: dict[str, Admitted] = {}
        # See `AdaInferScheduler`: otherwise no guard reads what is complete.
        self._scheduler_asks = (
            self.cache_config.enable_prefix_caching and not self.admission.records
        )

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As vLLM's; then the model's exit loop is built of what was loaded."""
        super().load_model(*args, **kwargs)
        self.model.build_exit_loop(self.vllm_config)

    @cached_property
    def _window(self) -> int:
        """Tokens that the layer with the smallest sliding window sees."""
        specs = [group.kv_cache_spec for group in self.kv_cache_config.kv_cache_groups]
        windows = [spec.sliding_window for spec in specs if isinstance(spec, SlidingWindowSpec)]
        return min(windows, default=UNLIMITED)

    def _update_states(self, scheduler_output: Any) -> Any:
        """Admit requests when they arrive, forget them when they end."""
        kv = self.model.exit_loop.kv
        for request_id in scheduler_output.finished_req_ids:
            self._admitted.pop(request_id, None)
            kv.forget(request_id)
        for request_id in scheduler_output.preempted_req_ids or ():
            kv.forget(request_id)  # with the blocks that it lost
        for new in scheduler_output.scheduled_new_reqs:
            self._admitted[new.req_id] = self.admission.admit(new.req_id, new.sampling_params)
        return super()._update_states(scheduler_output)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._narrow is None:
            self._narrow = AttentionNarrower(self)
        step = self._describe_step(self._narrow)
        self.model.step = step
        output = super()._model_forward(*args, **kwargs)
        if self._scheduler_asks:
            self._complete = self._complete_tokens(step)
        return output

    def _describe_step(self, narrow: AttentionNarrower) -> StepContext:
        batch, loop = self.input_batch, self.model.exit_loop
        count, request_ids = batch.num_reqs, batch.req_ids
        admitted = [self._admitted[request_id] for request_id in request_ids]
        lens = np.diff(self.query_start_loc.np[: count + 1].astype(np.int64))
        first = batch.num_computed_tokens_cpu[:count].astype(np.int64)
        last, prompt = first + lens - 1, batch.num_prompt_tokens[:count]
        tags = np.array([request.tag for request in admitted])
        max_tokens = np.array([request.max_tokens for request in admitted])
        tags[np.array([request.deep_prompt for request in admitted]) & (first < prompt)] = (
            FULL_DEPTH
        )
        for request_id in loop.kv.overdue().intersection(request_ids):
            tags[batch.req_id_to_index[request_id]] = FULL_DEPTH
        goes_on = last + 2 - prompt < max_tokens  # once this step's token is appended
        if loop.kv.defers:
            # Of a sequence beyond the window vLLM frees blocks that rows which wait still need.
            tags[goes_on & (last + 1 >= self._window)] = FULL_DEPTH
        shadow = None
        if loop.monitor is not None:
            shadow = np.array([request.is_shadow for request in admitted])
            tags[loop.monitor.tightened[tags] & ~shadow] = FULL_DEPTH
        return StepContext(
            request_ids=request_ids,
            layout=RowLayout(lens, last),
            sampled=~self.discard_request_mask.np[:count],
            tags=tags,
            goes_on=goes_on,
            narrow=narrow,
            shadow=shadow,
            all_rows_count=any(request.wants_prompt for request in admitted),
        )

    def _complete_tokens(self, step: StepContext) -> dict[str, int]:
        """Of each request that may exit, how many first tokens the cache has as at full depth."""
        kv = self.model.exit_loop.kv
        ended = set(step.left[~step.goes_on[step.left]].tolist())
        ends = (step.layout.last_positions + 1).tolist()
        return {
            request_id: 0 if place in ended else ends[place] - kv.missing(request_id, ends[place])
            for place, request_id in enumerate(step.request_ids)
            if self._admitted[request_id].tag != FULL_DEPTH
        }

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; the output says what is complete in the KV cache."""
        output = super().sample_tokens(*args, **kwargs)
        complete, self._complete = self._complete, None
        if complete is not None:
            compat.note_complete(output, complete)
        return output
