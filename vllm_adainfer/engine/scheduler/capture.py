"""Captures a sample of the requests that reach the scheduler, as calibration data.

The engine core sees every request in the form the model gets, whichever endpoint received it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from typing_extensions import override

from vllm_adainfer.engine.admission.requested_output import (
    changes_scores,
    requested_schema,
    requested_scores,
)
from vllm_adainfer.engine.admission.traffic_sample import GroupSample
from vllm_adainfer.engine.compat.requests import request_group, short_id
from vllm_adainfer.engine.compat.structured_outputs import choices_of
from vllm_adainfer.engine.scheduler.line_files import LineFiles
from vllm_adainfer.engine.scheduler.observer import Observer
from vllm_adainfer.settings.engine import Capture as CaptureSettings

if TYPE_CHECKING:
    from vllm.v1.request import Request

QUEUED = 256  # lines that may wait for the disk: whole prompts


class Capture(Observer):
    """Captures requests; a captured one runs exactly as it would otherwise."""

    def __init__(self, settings: CaptureSettings, engine: int, model: str) -> None:
        """Open the directory of `settings`, for this `engine` among those that write to it."""
        self._sample = GroupSample(settings.rate, "capture")
        self._model = model
        self._lines = LineFiles("capture", settings, engine, QUEUED)

    @override
    def arrived(self, request: Request) -> None:
        group = request_group(request.request_id)
        # All documents of a query, or none: a bound on its order needs them all.
        together = group if request.pooling_params is not None else None
        if together is not None:  # a client may use its id for several queries
            group = self._sample.first_of(request.request_id, together)
        if self._sample.has(request.request_id, together):
            found = line_of(request, self._model)
            if found is not None:
                url, body = found
                self._lines.put(batch_line(short_id(request.request_id), url, body, group))

    @override
    def close(self) -> None:
        self._lines.close()


def batch_line(custom_id: str, url: str, body: dict[str, Any], group: str | None) -> dict[str, Any]:
    """A line of vLLM's batch files; `group` is that of requests that came together."""
    line: dict[str, Any] = {"custom_id": custom_id, "method": "POST", "url": url, "body": body}
    return line if group is None else {**line, "group": group}


def line_of(request: Request, model: str) -> tuple[str, dict[str, Any]] | None:
    """The endpoint and the body of an equivalent request, or None if there is none."""
    if (
        request.prompt_token_ids is None
        or request.prompt_embeds is not None
        or request.mm_features
        or request.lora_request is not None
        or request.resumable  # its prompt is still being sent
    ):
        return None
    if request.pooling_params is not None:
        if requested_scores(request.pooling_params) is None:
            return None
        return "/classify", {"model": model, "input": request.prompt_token_ids}
    body = body_of(request, model)
    return None if body is None else ("/v1/completions", body)


def body_of(request: Request, model: str) -> dict[str, Any] | None:
    """The equivalent body of ``/v1/completions``, or None if there is no equivalent.

    Settings that only affect how a token is drawn (``top_p``, ``top_k``, ``min_p``, ``seed``) are
    omitted.
    """
    params = request.sampling_params
    if params is None:
        return None
    if changes_scores(params):  # a line cannot state that, and no policy serves it
        return None
    body = {
        "model": model,
        "prompt": request.prompt_token_ids,
        "max_tokens": request.max_tokens,
        "temperature": params.temperature,
        "allowed_token_ids": params.allowed_token_ids,
        "logprob_token_ids": params.logprob_token_ids,
        "logprobs": params.num_logprobs,  # vLLM requires it with `logprob_token_ids`
    }
    if params.structured_outputs is not None:
        outputs = params.structured_outputs
        if requested_schema(params) is not None:
            body["structured_outputs"] = {"json": outputs.json}
        elif (choices := choices_of(outputs.choice, outputs.grammar)) is not None:
            body["structured_outputs"] = {"choice": choices}
        else:
            return None
    return {key: value for key, value in body.items() if value is not None}
