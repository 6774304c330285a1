"""The self-test finds faults that would give wrong answers; what it switches to is right."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adainfer_kernels.backend
import pytest
import torch
from adainfer_kernels import torch_probe
from torch import Tensor
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.distributed import parallel_state
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from tests.classifier import classifier
from tests.conftest import tiny_engine
from tests.delta_net import allow_fp32
from tests.e2e.faults import FAULTS_OF_EXITS, answers_are_right, found, next_row
from tests.e2e.scripted import parts
from tests.e2e.test_families import SMALL, SWITCH
from tests.families import tiny_checkpoint
from tests.full import needed
from tests.triton_on_cpu import IS_V2
from vllm_adainfer import stats
from vllm_adainfer.engine.model.batch import CompiledBatch, Execution
from vllm_adainfer.engine.segments.attention import with_own_builders
from vllm_adainfer.engine.segments.segments import Stack
from vllm_adainfer.engine.self_test.kernels import wrong_kernels
from vllm_adainfer.engine.self_test.scripted_requests import Script
from vllm_adainfer.engine.self_test.scripted_steps import Rows, ScriptedSteps
from vllm_adainfer.engine.self_test.self_test import MOST, differences, self_test
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.loop.step import FULL_DEPTH

pytestmark = pytest.mark.skipif(not IS_V2, reason="vLLM uses Model Runner V1 on CPUs alone")

QUICK = "engine", "small", "mixture"
ENGINES = (*QUICK, "in_16_bits", "recurrent", "reads_scores")


@pytest.fixture(scope="module")
def in_16_bits(tiny_model: Path) -> Any:
    """Where rounding moves states, and a fault has to move them further."""
    return tiny_engine(tiny_model, SWITCH, "bfloat16", **SMALL)


def of_family(name: str, directory: Path) -> Any:
    allow_fp32()
    if parallel_state._EP is None:
        # vLLM makes this group for mixtures alone, and with the first engine of a process.
        parallel_state._EP = parallel_state._TP
    return tiny_engine(tiny_checkpoint(name, directory / name), SWITCH, **SMALL)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return of_family("qwen3.5", tmp_path_factory.mktemp("recurrent"))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return of_family("qwen3-moe", tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def reads_scores(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A classifier, which generates nothing."""
    model = classifier(tiny_model, tmp_path_factory.mktemp("classifier") / "softmax", 3)
    settings = {"max_model_len": 512, "kv_cache_memory_bytes": 64 << 20}
    return tiny_engine(model, SWITCH, runner="pooling", **settings)


@pytest.mark.parametrize("tested", needed(QUICK, of=ENGINES), indirect=True)
def test_nothing_is_found_where_nothing_is_wrong(tested):
    model, _, _ = parts(tested)
    graphs, before = model.graphs, model.loop.stats.as_dict()
    assert found(tested) == []
    assert (model.graphs, model.exits_off) == (graphs, False)
    assert model.execution is Execution.SEGMENT_GRAPHS
    assert model.loop.stats.as_dict() == before


@pytest.mark.parametrize(
    "tested", ["engine", pytest.param("in_16_bits", marks=pytest.mark.full)], indirect=True
)
@pytest.mark.parametrize("fault", FAULTS_OF_EXITS, ids=lambda fault: fault.__name__)
def test_where_exits_are_wrong_all_requests_run_all_layers(
    request, tested, reference, fault, monkeypatch, caplog
):
    """Also in 16 bits, where rounding moves states."""
    fault(monkeypatch)
    assert found(tested) == ["exits"]
    assert "all requests run all layers" in caplog.text
    assert stats(tested)["failed_parts"] == ["exits"]
    if request.node.callspec.params["tested"] == "engine":
        assert answers_are_right(tested, reference)


@pytest.mark.parametrize("tested", ["recurrent"], indirect=True)
def test_groups_that_lack_the_recurrent_layers_are_found(tested, monkeypatch):
    """As vLLM's warm-up has them: such a layer takes itself for being profiled."""
    _, runner, _ = parts(tested)
    groups = with_own_builders(
        runner.attn_groups, runner.kv_cache_config, runner.vllm_config, runner.device
    )
    lacking = [[g for g in some if not g.backend.is_ssm()] for some in groups]
    monkeypatch.setattr(runner.model_state, "_own_groups", lacking)
    assert found(tested) == ["exits"]


@pytest.mark.parametrize("tested", ["mixture"], indirect=True)
def test_the_padding_mask_of_other_rows_is_found(tested, monkeypatch):
    """Routers give rows that are padding no experts; a CPU's do not look, so this one does."""
    run_experts, side_batch = MoERunner._forward_impl, CompiledBatch.side_batch

    def masked(layer: Any, hidden: Tensor, *args: Any, **settings: Any) -> Any:
        output = run_experts(layer, hidden, *args, **settings)
        mask = get_forward_context().is_padding
        if mask is not None:
            output[mask[: len(output)].nonzero().squeeze(1)] = 0
        return output

    def with_the_steps_mask(self: CompiledBatch, *args: Any, **settings: Any) -> CompiledBatch:
        batch = side_batch(self, *args, **settings)
        rows = len(self.positions)  # of the step, which was padded
        mask = torch.arange(256) >= rows
        return replace(batch, context=replace(batch.context, is_padding=mask))

    monkeypatch.setattr(MoERunner, "_forward_impl", masked)
    assert found(tested) == []
    monkeypatch.setattr(CompiledBatch, "side_batch", with_the_steps_mask)
    assert found(tested) == ["exits"]


@pytest.mark.full
@pytest.mark.parametrize("tested", ["reads_scores"], indirect=True)
def test_without_exits_a_classifier_scores_as_before(tested, monkeypatch):
    def scores() -> Tensor:
        prompts = [{"prompt_token_ids": list(range(5, 9 + 7 * place))} for place in range(3)]
        outputs = tested.encode(prompts, pooling_task="classify", use_tqdm=False)
        return torch.stack([output.outputs.data for output in outputs])

    before = scores()
    next_row(monkeypatch)
    assert found(tested) == ["exits"]
    torch.testing.assert_close(scores(), before)


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_without_exits_vllms_graphs_are_kept_if_they_are_right(tested, monkeypatch):
    model, runner, _ = parts(tested)
    compilation = runner.vllm_config.compilation_config
    monkeypatch.setattr(compilation, "cudagraph_mode", CUDAGraphMode.PIECEWISE)
    next_row(monkeypatch)
    assert found(tested) == ["exits"]
    assert model.exits_off
    assert model.execution is Execution.VLLM_GRAPHS


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_where_the_test_itself_cannot_run_all_requests_run_all_layers(
    tested, reference, monkeypatch, caplog
):
    monkeypatch.setattr(ScriptedSteps, "_tables", lambda *_: [])
    assert found(tested) == ["exits"]
    assert "the test itself failed: IndexError" in caplog.text
    monkeypatch.undo()
    assert answers_are_right(tested, reference)


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
@pytest.mark.parametrize(
    ("errs", "expected"),
    [
        (lambda context: context.cudagraph_runtime_mode is CUDAGraphMode.PIECEWISE, 1),
        (lambda context: not context.skip_compiled, 2),
    ],
    ids=["vLLM's graphs", "compiled code"],
)
def test_where_vllms_graphs_or_compiled_code_are_wrong_layers_run_without(
    tested, reference, errs, expected, monkeypatch
):
    """The engine is eager; its layers err where another would have run so."""
    model, runner, _ = parts(tested)
    compilation, run, forward = runner.vllm_config.compilation_config, Stack.run, model.forward
    monkeypatch.setattr(compilation, "cudagraph_mode", CUDAGraphMode.PIECEWISE)
    monkeypatch.setattr(compilation, "mode", CompilationMode.VLLM_COMPILE)

    def with_graphs(*args: Any, **settings: Any) -> Tensor:
        context = get_forward_context()
        monkeypatch.setattr(context, "cudagraph_runtime_mode", CUDAGraphMode.PIECEWISE)
        return forward(*args, **settings)

    def erring(self: Stack, index: int, positions: Tensor, states: HiddenStates) -> HiddenStates:
        after = run(self, index, positions, states)
        return replace(after, hidden=after.hidden * 1.1) if errs(get_forward_context()) else after

    monkeypatch.setattr(model, "forward", with_graphs)
    monkeypatch.setattr(Stack, "run", erring)
    assert found(tested) == ["vllm_graphs", "compiled_code"][:expected]
    assert model.execution is (Execution.COMPILED if expected == 1 else Execution.EAGER)
    assert answers_are_right(tested, reference)


def wrong_probe(change: Callable[[dict[str, Any]], None]) -> SimpleNamespace:
    """The torch backend with a change of its results, in place of Triton's."""

    def score(*args: Any) -> Any:
        result = torch_probe.score(*args)
        values = dict(vars(result))
        change(values)
        return replace(result, **values)

    def settle(readout: Tensor, head: Any, classifier: Tensor, threshold: Tensor) -> Any:
        result = score(readout, head, None, classifier, threshold, True)
        return result.settled, result.scores

    return SimpleNamespace(score=score, settle=settle, readout=torch_probe.readout)


FAULTS_OF_KERNELS = {
    "the second score is the best": lambda values: values.update(top2=values["top1"]),
    "the sum lacks a tile": lambda values: values.update(lse=values["lse"] - 0.3),
    "another token": lambda values: values.update(top1_id=values["top1_id"] ^ 1),
    "all are settled": lambda values: values["settled"] is None or values["settled"].fill_(True),
    "scores of the row beside": lambda values: values.update(
        scores=None if values["scores"] is None else values["scores"].roll(1, 0)
    ),
}


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS_OF_KERNELS)
def test_where_a_kernel_is_wrong_probes_run_in_torch(tested, fault, monkeypatch):
    load, wrong = adainfer_kernels.backend.load_backend, wrong_probe(FAULTS_OF_KERNELS[fault])

    def loaded(backend: Any, device: torch.device, of: str = "probe") -> Any:
        usable = backend == "auto" and not adainfer_kernels.backend._auto_is_torch
        return wrong if usable else load("torch", device, of)

    monkeypatch.setattr(sys.modules["adainfer_kernels.probe"], "load_backend", loaded)
    assert found(tested) == ["kernels"]
    _, runner, _ = parts(tested)
    states = torch.empty(16, runner.model.hidden_size)
    assert wrong_kernels(runner.model.loop.policies, states) is None  # now that it is avoided


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_where_a_kernel_does_not_compile_probes_run_in_torch(tested, monkeypatch):
    def refused(*_: Any) -> Any:
        raise RuntimeError("no such architecture")

    monkeypatch.setattr("vllm_adainfer.engine.self_test.self_test.wrong_kernels", refused)
    [failure] = self_test(parts(tested)[1]).failures
    assert (failure.part, failure.why) == ("kernels", "RuntimeError: no such architecture")
    assert adainfer_kernels.backend._auto_is_torch


@pytest.mark.parametrize("tested", ["small"], indirect=True)
def test_wrong_sums_of_prompts_are_found(tested, monkeypatch):
    from adainfer_kernels import torch_pooling

    pool = torch_pooling.pool

    def forgets_the_last_row(hidden: Tensor, residual: Any, starts: Any, ends: Any, carried: Any):
        last, sums = pool(hidden, residual, starts, ends, carried)
        return last, sums - last

    def loaded(backend: Any, device: torch.device, of: str) -> Any:
        return SimpleNamespace(pool=forgets_the_last_row if backend == "auto" else pool)

    monkeypatch.setattr(sys.modules["adainfer_kernels.pooling"], "load_backend", loaded)
    assert found(tested) == ["kernels"]


@pytest.mark.parametrize("tested", needed(QUICK, of=ENGINES), indirect=True)
def test_vllms_own_model_which_the_reference_is_judged_by_computes_the_same(tested):
    model, runner, _ = parts(tested)
    script = Script.drawn(
        exit_points=len(model.loop.policies.exit_points),
        vocabulary=500,
        max_requests=4,
        max_rows=64,
        tokens=1 if runner.is_pooling_model else 3,
    )
    steps = ScriptedSteps(runner)
    in_full, stock = (
        steps.run(script.never_exiting, Execution.EAGER, rows)
        for rows in (Rows.IN_FULL, Rows.STOCK)
    )
    assert stock.keys() == {token for token in in_full if token[-1] == FULL_DEPTH}
    assert differences(stock, in_full, MOST if runner.dtype == torch.bfloat16 else 1e-3) is None
