"""Exits on a GPU: compiled segments, CUDA graphs, each attention backend, against the oracle.

Tests use one engine after the other: when one starts, vLLM drops the graphs of all that are in the
process (`CUDAGraphWrapper.clear_all_graphs`), and an earlier one would capture them in a request.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.lora.request import LoRARequest

from tests import conftest
from tests.adapters import merged, save_adapter
from tests.conftest import small_engine, tiny_engine
from tests.e2e.patterns import TIED, drawn_pattern, wrong_of
from tests.e2e.scripted import parts
from tests.e2e.test_equal_to_stock import answers_of_engines, job
from tests.tiny import tiny_llama
from vllm_adainfer.engine.self_test.self_test import Outcome, self_test

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SWITCH = {"exit_script": [2, 4], "min_rows_saved": 1}
IN_FP32 = "TRITON_ATTN", "FLEX_ATTENTION"
SMALL: dict[str, Any] = {"enforce_eager": False, "gpu_memory_utilization": 0.05}
# So that requests preempt each other, as in `small_engine`.
CACHE = {"max_model_len": 320, "num_gpu_blocks_override": 12, "kv_cache_memory_bytes": 8 << 20}


@dataclass(frozen=True)
class Served:
    """An engine as it is served, compiled and with graphs, and what it is compared with.

    Attributes:
        llm: the engine.
        oracles: the same weights in plain transformers; with an adapter, by its name.
        in_16_bits: whether it computes in bfloat16.
        adapters: those that requests may have; None for the base model.

    """

    llm: Any
    oracles: dict[str | None, Any]
    in_16_bits: bool = True
    adapters: Sequence[LoRARequest | None] = (None,)


def of_bfloat16(reference: Any) -> Any:
    """The oracle with the weights that an engine in bfloat16 has."""
    return copy.deepcopy(reference).bfloat16().float()


def default(model: Path, reference: Any, **settings: Any) -> Served:
    """With vLLM's own backend, but for `settings`."""
    llm = tiny_engine(model, SWITCH, "bfloat16", **CACHE, **SMALL, **settings)
    return Served(llm, {None: of_bfloat16(reference)})


def flashinfer(folder: Path) -> Served:
    """FlashInfer has no kernels for heads as small as those of the tiny model."""
    from transformers import AutoModelForCausalLM

    model = tiny_llama(folder / "wider", hidden_size=128)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    return default(model, reference, attention_backend="FLASHINFER")


def with_adapters(model: Path, reference: Any, folder: Path) -> Served:
    """Punica's kernels; segments have no graphs beside them."""
    served = default(model, reference, enable_lora=True, max_loras=3, max_lora_rank=8)
    adapters = [
        LoRARequest(name, number, str(save_adapter(reference, folder / name, number)))
        for number, name in enumerate(("a", "b"), start=1)
    ]
    base = served.oracles[None]
    oracles = {one.lora_name: merged(base, Path(one.lora_path)) for one in adapters}
    return Served(served.llm, {None: base, **oracles}, adapters=[None, *adapters])


@pytest.fixture(scope="module", params=["default", "FLASHINFER", "adapters", *IN_FP32])
def started(
    tiny_model: Path,
    tiny_policy: Path,
    reference: Any,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Served:
    folder = tmp_path_factory.mktemp("gpu")
    if request.param in IN_FP32:
        # Triton's products of fp32 are TF32 unless it is told otherwise, and err by up to 0.02.
        os.environ["TRITON_F32_DEFAULT"] = "ieee"
        llm = small_engine(tiny_model, tiny_policy, attention_backend=request.param, **SMALL)
        return Served(llm, {None: reference}, in_16_bits=False)
    if request.param == "FLASHINFER":
        return flashinfer(folder)
    if request.param == "adapters":
        return with_adapters(tiny_model, reference, folder)
    return default(tiny_model, reference)


@pytest.fixture
def served(started: Served) -> Served:
    assert conftest._ENGINES[-1] is started.llm, "another engine has dropped its graphs"
    return started


def test_segments_are_captured_but_for_those_with_lora(served):
    model, _, _ = parts(served.llm)
    assert (model.graphs is None) == (len(served.adapters) > 1)


@pytest.mark.parametrize("seed", range(10))
def test_drawn_exits_reproduce_the_oracle(served, seed):
    """The states that tokens are read off; also the tokens, but where two scores tie."""
    pattern, ran = drawn_pattern(served.llm, 3000 + seed, adapters=served.adapters)
    for name, request in enumerate(pattern.requests):
        oracle = served.oracles[request.adapter and request.adapter.lora_name]
        assert wrong_of(oracle, pattern, name, ran, served.in_16_bits) == []


def test_kernels_exits_and_graphs_pass_the_self_test(served):
    """Also where an earlier start has passed it, and remembers."""
    _, runner, _ = parts(served.llm)
    assert self_test(runner) == Outcome()


def test_requests_that_never_exit_get_stocks_tokens_on_the_default_backend(tiny_model):
    """In a process of their own; up to where two tokens tie in stock, which is compiled as one."""
    params = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "logprobs": 2}
    stock, ours = (
        answers_of_engines(
            [job(tiny_model, [[params] * 5], **SMALL, additional_config=switch)], environment
        )[0]["answers"][0]
        for switch, environment in (({}, {"VLLM_PLUGINS": ""}), ({"adainfer": SWITCH}, {}))
    )
    assert [differs(*both) for both in zip(stock, ours, strict=True)] == [None] * len(stock)


def differs(stock: dict[str, Any], ours: dict[str, Any]) -> int | None:
    """The first place at which the tokens differ without a tie in stock; None if there is none."""
    pairs = zip(stock["tokens"], ours["tokens"], stock["logprobs"], strict=True)
    for place, (token, other, logprobs) in enumerate(pairs):
        if token != other:
            best, second = sorted(logprobs.values(), reverse=True)[:2]
            return None if best - second < TIED else place
    return None
