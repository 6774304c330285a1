"""The self-test finds each fault that would give wrong answers, and what it switches to is right.

Some of the faults are those that a desk check of the GPU path found in earlier versions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adainfer_kernels.backend
import numpy as np
import pytest
import torch
from adainfer_kernels import torch_probe
from torch import Tensor
from vllm import SamplingParams
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.distributed import parallel_state
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

from tests.classifier import classifier
from tests.conftest import tiny_engine
from tests.delta_net import allow_fp32
from tests.e2e.oracle import continuation, same
from tests.e2e.recorded_graphs import Recorded, recorded_engine
from tests.e2e.scripted import parts
from tests.e2e.test_families import SMALL, SWITCH
from tests.families import tiny_checkpoint
from tests.full import needed
from tests.tiny import LAYERS
from tests.triton_on_cpu import IS_V2
from vllm_adainfer import stats
from vllm_adainfer.engine.compat import attention as slots
from vllm_adainfer.engine.cuda_graphs.decode_buffers import DecodeBuffers
from vllm_adainfer.engine.model.batch import CompiledBatch, Execution
from vllm_adainfer.engine.segments import attention
from vllm_adainfer.engine.segments.attention import StepAttention, with_own_builders
from vllm_adainfer.engine.segments.segments import Stack
from vllm_adainfer.engine.self_test.kernels import wrong_kernels
from vllm_adainfer.engine.self_test.scripted_steps import ScriptedSteps
from vllm_adainfer.engine.self_test.self_test import Failure, self_test
from vllm_adainfer.engine.worker.gpu_worker import AdaInferGPUWorker, configuration_of, record_of
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.exits.kv.policies import ExactKV
from vllm_adainfer.exits.loop.forward_pass import ForwardPass

pytestmark = pytest.mark.skipif(not IS_V2, reason="vLLM uses Model Runner V1 on CPUs alone")

Patch = pytest.MonkeyPatch
QUICK = "engine", "small", "mixture"
ENGINES = (*QUICK, "in_16_bits", "graphed", "recurrent", "reads_scores")


@pytest.fixture
def tested(request: pytest.FixtureRequest, monkeypatch: Patch) -> Iterator[Any]:
    """An engine, by the name of its fixture, which later tests find as it was."""
    llm = request.getfixturevalue(request.param)
    model, _, _ = parts(llm)
    graphs = model.graphs
    monkeypatch.setattr(adainfer_kernels.backend, "_auto_is_torch", False)
    yield llm
    model.graphs, model.exits_off, model.execution = graphs, False, Execution.SEGMENT_GRAPHS
    model.loop.stats.failed_parts = ()


@pytest.fixture(scope="module")
def in_16_bits(tiny_model: Path) -> Any:
    """Where rounding moves states, and a fault has to move them further."""
    return tiny_engine(tiny_model, SWITCH, "bfloat16", **SMALL)


@pytest.fixture(scope="module")
def graphed(tiny_model: Path, policy_from_zero: Path) -> Iterator[Any]:
    with recorded_engine(tiny_model, policy_from_zero, "FLEX_ATTENTION", sizes=(2, 8)) as engine:
        yield engine


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


def found(llm: Any) -> tuple[Failure, ...]:
    _, runner, _ = parts(llm)
    return self_test(runner)


def answers_are_right(llm: Any, reference: Any) -> bool:
    """Six tokens after each of three prompts are those of full depth in transformers."""
    generator = np.random.default_rng(5)
    prompts = [generator.integers(5, 1000, size).tolist() for size in (4, 9, 2)]
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    llm.reset_prefix_cache()
    return all(
        same(list(output.outputs[0].token_ids), continuation(reference, prompt, 6, LAYERS))
        for prompt, output in zip(prompts, outputs, strict=True)
    )


@pytest.mark.parametrize("tested", needed(QUICK, of=ENGINES), indirect=True)
def test_nothing_is_found_where_nothing_is_wrong(tested):
    model, _, _ = parts(tested)
    graphs, before = model.graphs, model.loop.stats.as_dict()
    assert found(tested) == ()
    assert (model.graphs, model.exits_off) == (graphs, False)
    assert model.execution is Execution.SEGMENT_GRAPHS
    assert model.loop.stats.as_dict() == before


def next_row(patch: Patch) -> None:
    """Those that stay are taken from the rows beside theirs."""
    regroup = RowLayout.regroup

    def shifted(self: RowLayout, *args: Any) -> tuple[RowLayout, Any]:
        layout, rows = regroup(self, *args)
        return layout, np.roll(rows, 1)

    patch.setattr(RowLayout, "regroup", shifted)


def next_slot(patch: Patch) -> None:
    """Keys and values of a compacted batch go to the slot beside theirs."""
    patch.setattr(attention, "slots_of", lambda *args: slots.slots_of(*args) + 1)


def nobody_rejoins(patch: Patch) -> None:
    """Rows that wait are forgotten."""
    patch.setattr(ExactKV, "waiting", lambda *_: None)


def rejoin_in_reverse(patch: Patch) -> None:
    """Rows that waited take each other's place."""
    rejoin = ExactKV.rejoin

    def reversed_rows(self: ExactKV, *args: Any) -> Any:
        states, policies = rejoin(self, *args)
        return states.rows(torch.arange(states.num_rows - 1, -1, -1)), policies

    patch.setattr(ExactKV, "rejoin", reversed_rows)


def no_last_kv(patch: Patch) -> None:
    """Tokens that yield nothing leave no keys and values in the last layer."""
    patch.setattr(CompiledBatch, "write_last_kv", lambda *_: None)


def short_sequences(patch: Patch) -> None:
    """A compacted batch does not attend to the last tokens."""
    metadata_of = attention.metadata_of

    def shortened(*groups: Any, seq_lens: Any, seq_lens_cpu: Any, **rest: Any) -> Any:
        lens = (seq_lens - 1).clamp(min=1)
        return metadata_of(*groups, seq_lens=lens, seq_lens_cpu=lens, **rest)

    patch.setattr(attention, "metadata_of", shortened)


def metadata_of_the_step(patch: Patch) -> None:
    """A compacted batch attends as the step's first rows do."""
    metadata = StepAttention.metadata

    def of_first_rows(self: StepAttention, layout: RowLayout) -> Any:
        first = np.arange(len(layout.present))
        lens = np.zeros_like(layout.query_lens)
        lens[first] = layout.query_lens[layout.present]
        last = layout.last_positions.copy()
        last[first] = layout.last_positions[layout.present]
        return metadata(self, RowLayout(lens, last))

    patch.setattr(StepAttention, "metadata", of_first_rows)


def not_a_number(patch: Patch) -> None:
    """A compacted batch runs into a NaN."""
    select = ForwardPass._select

    def with_nan(self: ForwardPass, *args: Any) -> None:
        select(self, *args)
        if self.states.hidden.is_floating_point():
            self.states = replace(self.states, hidden=self.states.hidden * torch.nan)

    patch.setattr(ForwardPass, "_select", with_nan)


def no_backend(patch: Patch) -> None:
    """The backend cannot build metadata of a compacted batch."""

    def refused(*_: Any) -> Any:
        raise RuntimeError("no such shape")

    patch.setattr(StepAttention, "metadata", refused)


FAULTS_OF_EXITS = (
    next_row,
    next_slot,
    nobody_rejoins,
    rejoin_in_reverse,
    no_last_kv,
    short_sequences,
    metadata_of_the_step,
    not_a_number,
    no_backend,
)


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS_OF_EXITS, ids=lambda fault: fault.__name__)
def test_where_exits_are_wrong_all_requests_run_all_layers(
    tested, reference, fault, monkeypatch, caplog
):
    fault(monkeypatch)
    assert [failure.part for failure in found(tested)] == ["exits"]
    assert "exits" in caplog.text
    assert "all requests run all layers" in caplog.text
    assert answers_are_right(tested, reference)
    assert stats(tested)["failed_parts"] == ["exits"]


@pytest.mark.full
@pytest.mark.parametrize("tested", ["in_16_bits"], indirect=True)
@pytest.mark.parametrize("fault", FAULTS_OF_EXITS, ids=lambda fault: fault.__name__)
def test_faults_are_larger_than_rounding(tested, fault, monkeypatch):
    fault(monkeypatch)
    assert [failure.part for failure in found(tested)] == ["exits"]


@pytest.mark.parametrize("tested", ["recurrent"], indirect=True)
def test_groups_that_lack_the_recurrent_layers_are_found(tested, monkeypatch):
    """As vLLM's warm-up has them: such a layer takes itself for being profiled."""
    _, runner, _ = parts(tested)
    groups = with_own_builders(
        runner.attn_groups, runner.kv_cache_config, runner.vllm_config, runner.device
    )
    lacking = [[g for g in some if not g.backend.is_ssm()] for some in groups]
    monkeypatch.setattr(runner.model_state, "_own_groups", lacking)
    assert [failure.part for failure in found(tested)] == ["exits"]


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
    assert found(tested) == ()
    monkeypatch.setattr(CompiledBatch, "side_batch", with_the_steps_mask)
    assert [failure.part for failure in found(tested)] == ["exits"]


@pytest.mark.full
@pytest.mark.parametrize("tested", ["graphed"], indirect=True)
def test_without_exits_there_are_no_graphs_of_segments(tested, reference, monkeypatch):
    """They would find no metadata for the whole batch."""
    model, _, _ = parts(tested)
    next_row(monkeypatch)
    assert [failure.part for failure in found(tested)] == ["exits"]
    assert model.graphs is None
    assert answers_are_right(tested, reference)


@pytest.mark.full
@pytest.mark.parametrize("tested", ["reads_scores"], indirect=True)
def test_without_exits_a_classifier_scores_as_before(tested, monkeypatch):
    def scores() -> Tensor:
        prompts = [{"prompt_token_ids": list(range(5, 9 + 7 * place))} for place in range(3)]
        outputs = tested.encode(prompts, pooling_task="classify", use_tqdm=False)
        return torch.stack([output.outputs.data for output in outputs])

    before = scores()
    next_row(monkeypatch)
    assert [failure.part for failure in found(tested)] == ["exits"]
    torch.testing.assert_close(scores(), before)


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_without_exits_vllms_graphs_are_kept_if_they_are_right(tested, monkeypatch):
    model, runner, _ = parts(tested)
    compilation = runner.vllm_config.compilation_config
    monkeypatch.setattr(compilation, "cudagraph_mode", CUDAGraphMode.PIECEWISE)
    next_row(monkeypatch)
    assert [failure.part for failure in found(tested)] == ["exits"]
    assert model.exits_off
    assert model.execution is Execution.VLLM_GRAPHS


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_where_the_test_itself_cannot_run_all_requests_run_all_layers(
    tested, reference, monkeypatch, caplog
):
    monkeypatch.setattr(ScriptedSteps, "_tables", lambda *_: [])
    assert [failure.part for failure in found(tested)] == ["exits"]
    assert "the test itself failed: IndexError" in caplog.text
    monkeypatch.undo()
    assert answers_are_right(tested, reference)


def unstaged(name: str) -> Callable[[Patch], None]:
    """A batch does not put this into the graphs' buffers."""

    def put_back(patch: Patch) -> None:
        stage = DecodeBuffers.stage

        def without(self: DecodeBuffers, *args: Any) -> None:
            part = getattr(self, name)
            before = [one.clone() for one in part] if isinstance(part, list) else part.clone()
            stage(self, *args)
            for one, was in zip(part, before, strict=True):
                one.copy_(was)

        patch.setattr(DecodeBuffers, "stage", without)

    put_back.__name__ = f"unstaged{name}"
    return put_back


def padding_has_a_slot(patch: Patch) -> None:
    """Padded rows write keys and values where the first row has its own."""
    stage = DecodeBuffers.stage

    def with_slots(self: DecodeBuffers, layout: RowLayout, attention: Any, padded: int) -> None:
        stage(self, layout, attention, padded)
        self._slots[:, layout.num_rows : padded] = self._slots[:, :1]

    patch.setattr(DecodeBuffers, "stage", with_slots)


def captured_over_its_input(patch: Patch) -> None:
    """A segment's graph was captured on top of the memory that it reads."""
    load = DecodeBuffers.load

    def overwritten(self: DecodeBuffers, segment: int, states: HiddenStates) -> None:
        load(self, segment, states)
        if segment:
            self._after[segment - 1].hidden.mul_(0.5)

    patch.setattr(DecodeBuffers, "load", overwritten)


FAULTS_OF_GRAPHS = (
    *map(unstaged, ("positions", "_seq_lens", "_slots", "_tables")),
    padding_has_a_slot,
    captured_over_its_input,
)


@pytest.mark.parametrize("tested", ["graphed"], indirect=True)
@pytest.mark.parametrize(
    "fault",
    needed([captured_over_its_input], of=FAULTS_OF_GRAPHS),
    ids=lambda fault: fault.__name__,
)
def test_where_graphs_of_segments_are_wrong_steps_run_without(
    tested, reference, fault, monkeypatch
):
    fault(monkeypatch)
    assert [failure.part for failure in found(tested)] == ["segment_graphs"]
    Recorded.replays.clear()
    assert answers_are_right(tested, reference)
    assert not Recorded.replays


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
    parts_found = [failure.part for failure in found(tested)]
    assert parts_found == ["vllm_graphs", "compiled_code"][:expected]
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
    assert [failure.part for failure in found(tested)] == ["kernels"]
    _, runner, _ = parts(tested)
    states = torch.empty(16, runner.model.hidden_size)
    assert wrong_kernels(runner.model.loop.policies, states) is None  # now that it is avoided


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_where_a_kernel_does_not_compile_probes_run_in_torch(tested, monkeypatch):
    def refused(*_: Any) -> Any:
        raise RuntimeError("no such architecture")

    monkeypatch.setattr("vllm_adainfer.engine.self_test.self_test.wrong_kernels", refused)
    [failure] = found(tested)
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
    assert [failure.part for failure in found(tested)] == ["kernels"]


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_a_device_that_has_passed_is_not_tested_again(tested, monkeypatch, tmp_path):
    """Until anything of it changes; a failure is found anew at each start."""
    _, runner, _ = parts(tested)
    runs = []
    result: tuple[str, ...] = ("exits",)

    def counted(_: Any) -> tuple[str, ...]:
        runs.append(1)
        return result

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr("vllm_adainfer.engine.worker.gpu_worker.self_test", counted)
    worker = object.__new__(AdaInferGPUWorker)
    worker.model_runner = runner
    for result, expected in ((("exits",), 1), (("exits",), 2), ((), 3), ((), 3)):  # noqa: B007
        worker.self_test()
        assert len(runs) == expected
    for name, value in (
        ("torch.cuda.get_device_name", lambda _: "another GPU"),
        ("vllm.__version__", "0.32.1"),
        ("vllm_adainfer.engine.worker.gpu_worker.digest_of", lambda _: 7),
    ):
        monkeypatch.setattr(name, value)
        assert not record_of(configuration_of(runner)).exists()
