"""The CUDA graphs that vLLM chooses in the end never hold the whole model.

A CPU's config takes the platform for CUDA, as far as it asks; no engine starts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.config.compilation import PassConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.platforms.interface import PlatformEnum
from vllm.v1.worker.gpu_worker import Worker

from vllm_adainfer.engine.worker import worker
from vllm_adainfer.engine.worker.gpu_worker import AdaInferGPUWorker
from vllm_adainfer.errors import AdaInferError

SCRIPT = {"adainfer": {"exit_script": [2]}}
FULL, PIECEWISE, NONE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE, CUDAGraphMode.NONE
PASSES = [one.name for one in fields(PassConfig) if one.name.startswith(("fuse_", "enable_"))]
FUSED = {"pass_config": {"fuse_attn_quant": True}}


@pytest.fixture
def mode_on_cuda(tiny_model, monkeypatch) -> Callable[..., CUDAGraphMode]:
    """The final mode with some compilation config, of stock or with exits."""
    platform = type(current_platform)
    monkeypatch.setattr(platform, "_enum", PlatformEnum.CUDA)
    monkeypatch.setattr(platform, "device_type", "cuda")
    monkeypatch.setattr(platform, "support_static_graph_mode", lambda _: True)
    # vLLM's for CUDA chooses the worker alone, and ours is chosen before it.
    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(lambda _: None))
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    # It asks for Triton, which a CPU has only in Triton's interpreter.
    monkeypatch.setattr(VllmConfig, "_validate_v2_model_runner", lambda _: None)

    def mode(
        compilation: dict[str, Any], additional: dict[str, Any] = SCRIPT, **settings: Any
    ) -> CUDAGraphMode:
        settings = {"dtype": "bfloat16", "compilation_config": compilation, **settings}
        config = EngineArgs(
            model=str(tiny_model), additional_config=additional, **settings
        ).create_engine_config()
        found: CUDAGraphMode = config.compilation_config.cudagraph_mode
        return found

    return mode


@pytest.mark.parametrize("name", [None, *PASSES])
def test_with_no_pass_do_graphs_hold_the_whole_model(mode_on_cuda, name):
    """Such a pass is refused; the others leave the graphs piecewise."""
    compilation = {} if name is None else {"pass_config": {name: True}}
    if mode_on_cuda(compilation, {}) == FULL:
        with pytest.raises(ValueError, match=f"with {name} CUDA graphs hold the whole model"):
            mode_on_cuda(compilation)
    else:
        assert mode_on_cuda(compilation) == PIECEWISE


@pytest.mark.parametrize(
    ("compilation", "sentence"),
    [
        (FUSED, "run all layers: set it to false in the pass_config"),
        ({**FUSED, "cudagraph_mode": "FULL"}, "run all layers: set it to false in the pass_config"),
        ({"splitting_ops": []}, "splitting_ops without attention .*: drop splitting_ops from"),
        ({"splitting_ops": ["vllm::some_op"]}, "splitting_ops without attention"),
    ],
)
def test_what_would_change_the_graphs_later_is_refused(mode_on_cuda, compilation, sentence):
    with pytest.raises(ValueError, match=sentence):
        mode_on_cuda(compilation)


@pytest.mark.parametrize("compilation", [FUSED, {"splitting_ops": []}])
@pytest.mark.parametrize(
    "without", [{"enforce_eager": True}, {"optimization_level": 0}, {"cudagraph_mode": "NONE"}]
)
def test_where_there_are_no_graphs_nothing_is_refused(mode_on_cuda, compilation, without):
    if "cudagraph_mode" in without:
        assert mode_on_cuda({**compilation, **without}) == NONE
    else:
        assert mode_on_cuda(compilation, **without) == NONE


def started(monkeypatch: pytest.MonkeyPatch, mode: CUDAGraphMode, kind: str = "generate") -> None:
    """Start a worker, as far as to its device."""
    monkeypatch.setattr(Worker, "init_device", lambda _: None)
    monkeypatch.setattr(worker, "end_with_starter", lambda: None)
    one = object.__new__(AdaInferGPUWorker)
    one.model_config = SimpleNamespace(runner_type=kind, logits_processors=None)
    one.vllm_config = SimpleNamespace(
        compilation_config=SimpleNamespace(cudagraph_mode=mode), model_config=one.model_config
    )
    one.init_device()


@pytest.mark.parametrize("mode", [one for one in CUDAGraphMode if one.has_full_cudagraphs()])
def test_a_worker_does_not_start_with_graphs_of_the_whole_model(monkeypatch, mode):
    with pytest.raises(AdaInferError, match=rf"graphs of the whole model \({mode.name}\)"):
        started(monkeypatch, mode)


@pytest.mark.parametrize(
    ("mode", "kind", "warns"),
    [(PIECEWISE, "generate", False), (NONE, "generate", True), (NONE, "pooling", False)],
)
def test_a_worker_warns_if_decode_steps_run_without_graphs(monkeypatch, caplog, mode, kind, warns):
    started(monkeypatch, mode, kind)
    assert ("decode steps run without graphs of segments" in caplog.text) == warns
