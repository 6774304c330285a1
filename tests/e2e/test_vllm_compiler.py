"""Segments compiled by vLLM's own compiler, its default on GPUs, reproduce the oracle.

It splits each graph at attention and compiles the rest for ranges of rows. Segments are compiled
one by one here, not as whole modules: so older torch does, and then their graphs share a cache.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters
from vllm import envs
from vllm.compilation.counter import compilation_counter
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.config import CUDAGraphMode
from vllm.forward_context import (
    BatchDescriptor,
    get_forward_context,
    override_forward_context,
    set_forward_context,
)
from vllm.platforms import current_platform

from tests.conftest import tiny_engine
from tests.e2e.patterns import Request, drawn_pattern, drive, states_off, wrong
from tests.e2e.scripted import FULL, drawn, parts
from tests.e2e.static_graphs import StaticGraph
from tests.full import needed
from tests.tiny import LAYERS, tiny_config, tiny_tensors
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.engine.segments.segments import FixedStates

EXIT_POINTS = (0, 2, 3, 4)
EQUAL = ["Segment_2_3_of_6", "Segment_3_4_of_6", "Segment_4_5_of_6"]  # in their graphs
MODULES = [
    *("LastKV_of_6", "Segment_0_0_of_6_embeds", "Segment_0_2_of_6"),
    *(*EQUAL, "Segment_5_6_of_6_finishes"),
]
GRAPHS = LAYERS + len(MODULES)  # without attention: a segment has one more than layers
SIZES = (4, 8, 16, 32, 64, 128)  # of graphs for what is left of a batch
MOST_ROWS = 128  # of a step, and of the one range that graphs are compiled for


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def start(tiny_model: Path, cache: Path, tmp_path_factory: Any) -> Iterator[Callable[..., Any]]:
    """Start an engine; on a CPU vLLM 0.32 leaves all to torch, and its compiler lacks two things.

    These are the sizes to compile for, and the names of CUDA ops, after which a pass looks.
    """
    config = tiny_config(
        tiny_model, exit_points=EXIT_POINTS, probe="pooled-label-head", pooled_from=1
    )
    policy = tmp_path_factory.mktemp("artifact")
    save_artifact(policy, config, tiny_tensors(config), {}, "card\n")
    cls = type(current_platform)
    check = cls.check_and_update_config

    def check_but_compile(vllm_config: Any) -> None:
        compilation = vllm_config.compilation_config
        names = "mode", "backend", "ir_enable_torch_wrap", "cudagraph_mode"
        chosen = {name: getattr(compilation, name) for name in names}
        check(vllm_config)
        vars(compilation).update(chosen)

    def start(directory: Path = cache, graphs: str = "NONE", **switch: Any) -> Any:
        return tiny_engine(
            tiny_model,
            {"artifact": str(policy), **switch},
            enforce_eager=False,
            compilation_config={
                "compile_sizes": [],
                "cache_dir": str(directory),
                "custom_ops": ["none", "+rotary_embedding"],  # as some fusions on GPUs want it
                "cudagraph_mode": graphs,
            },
            max_model_len=512,
            kv_cache_memory_bytes=64 << 20,
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_AOT_COMPILE", "0")
        graph = f"{StaticGraph.__module__}.{StaticGraph.__qualname__}"
        patch.setattr(cls, "get_static_graph_wrapper_cls", classmethod(lambda _: graph))
        envs.disable_envs_cache()  # an engine in this process has filled it
        patch.setattr(cls, "check_and_update_config", staticmethod(check_but_compile))
        patch.setattr(FixFunctionalizationPass, "__call__", lambda _, graph: None)
        yield start
    envs.disable_envs_cache()


@pytest.fixture(scope="module")
def compiled(start: Callable[..., Any]) -> Any:
    """The first engine, which finds nothing in the cache."""
    with compilation_counter.expect(
        num_piecewise_capturable_graphs_seen=GRAPHS,
        num_inductor_compiles=GRAPHS,
        num_compiled_artifacts_loaded=0,
    ):
        return start()


@pytest.fixture(scope="module")
def warm(compiled: Any, start: Callable[..., Any]) -> Any:
    """A second engine, with other settings of ours, which finds everything there."""
    with compilation_counter.expect(num_inductor_compiles=0, num_compiled_artifacts_loaded=GRAPHS):
        return start(epsilon=0.02)


@pytest.mark.parametrize("seed", needed(1, of=range(3)))
def test_drawn_exits_reproduce_the_oracle(compiled, reference, seed):
    assert wrong(reference, *drawn_pattern(compiled, seed)) == []


def keys_of(folder: Path) -> list[str]:
    """Torch's keys of a module's graphs."""
    return re.findall("'cache_key': '(.+?)'", (folder / "vllm_compile_cache.py").read_text())


def test_modules_share_no_compiled_code_even_where_their_graphs_are_equal(compiled, cache):
    folders = sorted(cache.glob("rank_0_0/*"))
    assert [folder.name for folder in folders] == MODULES
    keys = {folder.name: keys_of(folder) for folder in folders}
    assert sum(map(len, keys.values())) == GRAPHS
    assert [name for name in MODULES if keys[name] == keys[EQUAL[0]]] == EQUAL


def test_the_key_of_compiled_code_does_not_depend_on_our_settings(compiled):
    """So that another artifact or epsilon finds it again."""
    model, _, _ = parts(compiled)
    assert model.stack.segments
    for segment in model.stack.segments:
        assert segment.vllm_config.additional_config == {}


def test_code_from_the_cache_reproduces_the_oracle(warm, reference):
    assert wrong(reference, *drawn_pattern(warm, seed=4)) == []


@pytest.mark.full
def test_modules_compiled_ahead_of_time_reproduce_the_oracle_when_new_and_from_disk(
    compiled, start, cache, reference, tmp_path, monkeypatch
):
    """The default on GPUs. Equal graphs of all modules are compiled once.

    The second engine has other settings of ours, and does not need what modules shared.
    """
    modules = len(MODULES)
    distinct = {key for folder in cache.glob("rank_0_0/*") for key in keys_of(folder)}
    assert len(distinct) < GRAPHS
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # vLLM changes it
    envs.disable_envs_cache()
    counters.clear()
    with compilation_counter.expect(num_aot_compiles=modules, num_aot_artifacts_saved=modules):
        new = start(tmp_path)
    looked_up = counters["aot_autograd"]
    assert looked_up["autograd_cache_miss"] == len(distinct)
    assert looked_up["autograd_cache_hit"] == GRAPHS - len(distinct)
    [shared] = tmp_path.rglob("torch_aot_compile/vllm_adainfer")
    shutil.rmtree(shared)
    with compilation_counter.expect(num_aot_artifacts_loaded=modules, num_inductor_compiles=0):
        from_disk = start(tmp_path, epsilon=0.02)
    for engine in new, from_disk:
        assert wrong(reference, *drawn_pattern(engine, 5)) == []


@pytest.fixture(scope="module")
def graphed(compiled: Any, start: Callable[..., Any]) -> Iterator[Any]:
    """An engine whose steps replay piecewise graphs, as vLLM's do on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(current_platform), "support_static_graph_mode", lambda _: True)
        engine = start(graphs="PIECEWISE")
    model, runner, _ = parts(engine)
    model.stack = replace(model.stack, fixed_states=FixedStates(MOST_ROWS))  # a CPU captures none
    forward = model.forward

    def with_graphs(input_ids: Any, *args: Any, **settings: Any) -> Any:
        batch = BatchDescriptor(num_tokens=len(input_ids))
        context = replace(
            get_forward_context(),
            cudagraph_runtime_mode=CUDAGraphMode.PIECEWISE,
            batch_descriptor=batch,
        )
        with override_forward_context(context):
            return forward(input_ids, *args, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", with_graphs)
        for rows in SIZES:  # without metadata, as vLLM captures
            with torch.inference_mode(), set_forward_context(None, runner.vllm_config):
                model.forward(runner.input_ids.gpu[:rows], runner.positions[:rows])
        yield engine


def test_piecewise_graphs_reproduce_the_oracle(graphed, reference):
    """Steps replay them, and so does what is left of them once requests leave.

    Those of all sizes were captured before, in passes without requests.
    """
    StaticGraph.replays.clear()
    captured = {len(graph.captured) for graph in StaticGraph.all if graph.captured}
    assert captured == {len(SIZES)}
    assert wrong(reference, *drawn_pattern(graphed, 6)) == []
    assert StaticGraph.replays.total() > GRAPHS
    assert {*SIZES} <= {*StaticGraph.replays}, "what is left is padded to these"


def test_states_that_stayed_in_a_graphs_memory_would_be_wrong(graphed, reference, monkeypatch):
    """The stand-in shows what `FixedStates` is for."""
    for graph in StaticGraph.all:
        graph.captured.clear()
    monkeypatch.setattr(FixedStates, "put", lambda _, states, rows: states)
    with drawn(graphed) as ran:
        pattern = drive(graphed, [Request([7, 8, 9], max_tokens=2, seed=FULL)])
    assert states_off(reference, pattern.sequence(0), ran["0"])


# THE ROW LIMIT. Last, for what fails in a step takes the engine along.
def test_rows_that_rejoin_on_top_of_a_full_step_reproduce_the_oracle(compiled, reference):
    """Four prompts fill a step and leave; all their rows come back with the second tokens."""
    generator = np.random.default_rng(0)
    rows = MOST_ROWS // 4
    prompts = generator.integers(5, 1000, (4, rows)).tolist()
    requests = [Request(prompt, max_tokens=2, seed=0) for prompt in prompts]
    with drawn(compiled, draw=lambda _, at, __: 0 if at < rows else FULL) as ran:
        pattern = drive(compiled, requests)
    assert {part.layers for parts_ran in ran.values() for part in parts_ran} == {0, LAYERS}
    assert wrong(reference, pattern, ran) == []
