"""Model Runner V1 with a step context: the one method vLLM documents as overridable."""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from vllm_adainfer import compat
from vllm_adainfer.config import read_settings
from vllm_adainfer.runtime.admission import FULL_DEPTH, Admission
from vllm_adainfer.runtime.attention import AttentionNarrower
from vllm_adainfer.runtime.step import StepContext


class AdaInferCPUModelRunner(CPUModelRunner):
    """Tells the model whose rows it is about to run and who may exit."""

    _narrow: AttentionNarrower | None = None
    _left: frozenset[str] | None = None  # requests that left early in the step being run

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = read_settings(self.vllm_config.additional_config)
        assert settings is not None
        self.admission = Admission(settings)
        self._tags: dict[str, int] = {}
        self._shadow: set[str] = set()
        self._wants_prompt: set[str] = set()  # log-probabilities of its prompt's tokens

    def _update_states(self, scheduler_output: Any) -> Any:
        """Admit requests when they arrive, forget them when they end."""
        for request_id in scheduler_output.finished_req_ids:
            self._tags.pop(request_id, None)
            self._shadow.discard(request_id)
            self._wants_prompt.discard(request_id)
        for request in scheduler_output.scheduled_new_reqs:
            self._tags[request.req_id] = self.admission.tag(request.sampling_params)
            if self.admission.is_shadow(request.req_id):
                self._shadow.add(request.req_id)
            params = request.sampling_params
            if params is not None and params.prompt_logprobs is not None:
                self._wants_prompt.add(request.req_id)
        return super()._update_states(scheduler_output)

    def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._narrow is None:
            self._narrow = AttentionNarrower(self)
        num_requests = self.input_batch.num_reqs
        request_ids = self.input_batch.req_ids
        starts = self.query_start_loc.np[: num_requests + 1].astype(np.int64)
        tags = np.fromiter(map(self._tags.__getitem__, request_ids), np.int64, num_requests)
        shadow = None
        monitor = self.model.model.exit_loop.monitor
        if monitor is not None:
            is_shadow = map(self._shadow.__contains__, request_ids)
            shadow = np.fromiter(is_shadow, np.bool_, num_requests)
            tags[monitor.tightened[tags] & ~shadow] = FULL_DEPTH
        step = StepContext(
            query_lens=np.diff(starts),
            sampled=~self.discard_request_mask.np[:num_requests],
            tags=tags,
            narrow=self._narrow,
            shadow=shadow,
            all_rows_count=not self._wants_prompt.isdisjoint(request_ids),
        )
        self.model.model.step = step
        output = super()._model_forward(*args, **kwargs)
        self._left = frozenset(request_ids[place] for place in step.left)
        return output

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """As vLLM's; the output says which requests left early."""
        output = super().sample_tokens(*args, **kwargs)
        left, self._left = self._left, None
        if left is not None:
            compat.note_left_early(output, left)
        return output
