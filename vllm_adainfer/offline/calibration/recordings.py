"""Run the model at full depth on the prompts of a calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_adainfer.offline.calibration.fit.choose import candidate_layers
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.calibration.prompts import Prompts
from vllm_adainfer.offline.calibration.record.collect import record, recording_engine
from vllm_adainfer.offline.calibration.record.own_states import OwnStates
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.pretrained import engine_settings


def record_prompts(request: CalibrationRequest, prompts: Prompts) -> Rows:
    """Run the model at full depth."""
    options, hf_config, examples = request.options, prompts.hf_config, prompts.examples
    layers = candidate_layers(hf_config.num_hidden_layers, options.exit_points, prompts.probe)
    lens_prompts = len(prompts.split.fit) if prompts.probe == "lens" else 0
    adapter, choices = request.adapter, prompts.choices
    answers = [label.token_id for label in prompts.labels]
    if choices is not None:
        answers = choices.first_tokens.token_ids.tolist()
    settings = _engine_settings(request)
    with recording_engine(
        request.model,
        hf_config,
        examples,
        layers,
        lens_prompts,
        options.max_tokens,
        prompts.pooled_from,
        **settings,
    ) as engine:
        rows = record(
            engine, examples, answers, layers, options.max_tokens, adapter and adapter.request
        )
    return rows if choices is None else replace(rows, tokens=choices.decided_by(rows.tokens))


def _engine_settings(request: CalibrationRequest) -> dict[str, Any]:
    return engine_settings(
        request.adapter, request.hf_overrides, request.quantization, request.kv_cache_dtype
    )


def record_own_states(
    request: CalibrationRequest, prompts: Prompts, layers: Sequence[int]
) -> OwnStates:
    """Run the model once more, for the states of all tokens after `layers`, which branches read."""
    adapter, examples = request.adapter, prompts.examples
    settings = _engine_settings(request)
    with recording_engine(
        request.model,
        prompts.hf_config,
        examples,
        layers,
        pooled_from=prompts.pooled_from,
        branches=layers,
        **settings,
    ) as engine:
        states = record(engine, examples, (), layers, adapter=adapter and adapter.request)
    assert states.own_states is not None
    return states.own_states
