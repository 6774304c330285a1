from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from tests.running import new_request, running_requests, step_of_one
from tests.tiny import tiny_artifact
from vllm_adainfer.exits.batch.batch import StackShape
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.exits.recording.recorder import Recorder
from vllm_adainfer.exits.recording.recording_loop import RecordingLoop
from vllm_adainfer.settings.instruments import ROW_ARG

WINDOW, ROW = 8, 3
CERTIFIED = 3  # tokens
RECORDS = {"record": [2, 6]}


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_row_waits_at_most_as_long_as_the_smallest_window_keeps_its_blocks(wrapped):
    """Wrapped as by vLLM where layers of one type differ in their heads, as Gemma 4's do."""
    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    windows = [SlidingWindowSpec(**shape, sliding_window=n) for n in (2 * WINDOW, WINDOW)]
    specs = [*windows, FullAttentionSpec(**shape)]
    if wrapped:
        specs = [UniformTypeKVCacheSpecs(block_size=16, kv_cache_specs={"0": s}) for s in specs]
    groups = [SimpleNamespace(kv_cache_spec=spec) for spec in specs]
    running = running_requests(RECORDS)
    running.use_kv_cache(SimpleNamespace(kv_cache_groups=groups))
    assert running.window == WINDOW


def test_recording_keeps_the_tokens_beyond_a_sliding_window():
    """No rows wait there, so none needs the blocks that vLLM frees beyond the window."""
    shape = StackShape(segment_layers=(2, 4, 0), head_size=1)
    running = running_requests(RECORDS, RecordingLoop(shape, Recorder((2, 6), lens=None)))
    spec = SlidingWindowSpec(
        block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32, sliding_window=WINDOW
    )
    running.use_kv_cache(SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)]))
    params = SamplingParams(temperature=0, max_tokens=20, extra_args={ROW_ARG: ROW})
    running.add(new_request(params, [5] * 4))
    for computed in (4, 2 * WINDOW):
        assert step_of_one(running, computed, 1, ends=True).record_rows.tolist() == [ROW]


@pytest.mark.parametrize(
    ("number", "exits"), [(1, True), (CERTIFIED, True), (CERTIFIED + 1, False)]
)
def test_only_as_many_tokens_exit_as_calibration_generated(tiny_model, number, exits, tmp_path):
    """`number` counts the tokens of a text from 1; an audit says why the others do not."""
    texts = {"probe": "logit-lens", "candidates": "full", "labels": (), "max_tokens": CERTIFIED}
    artifact = tiny_artifact(tiny_model, tmp_path / "policy", **texts)
    audit = {"directory": str(tmp_path)}
    switch = {"artifact": str(artifact), "finish_choices": False, "audit": audit}
    running = running_requests(switch)
    running.add(new_request(SamplingParams(temperature=0, max_tokens=20), [5] * 4))
    computed, rows = (0, 4) if number == 1 else (4 + number - 2, 1)
    step = step_of_one(running, computed, rows, ends=True)
    assert (step.threshold_rows[0] != FULL_DEPTH) == exits
    assert running._why == ({} if exits else {0: "beyond_bound"})
