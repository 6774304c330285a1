"""Objects beside all kinds of requests: each answer is that of the heads, or stock vLLM's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.byte_model import save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.object_traffic import Engine, engine_with, run, traffic
from tests.e2e.objects import ENGINE
from tests.e2e.scripted import parts
from tests.full import needed
from vllm_adainfer.engine.worker.served_policies import check_replaces
from vllm_adainfer.errors import AdaInferError


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return tiny_engine(model, None, **ENGINE)


@pytest.fixture(scope="module")
def engine_of(model, tmp_path_factory) -> Callable[..., Engine]:
    def made(**settings: Any) -> Engine:
        return engine_with(model, tmp_path_factory.mktemp("artifacts"), **settings)

    return made


@pytest.fixture(scope="module")
def engine(engine_of) -> Engine:
    return engine_of()


SMALL_CACHE = {"num_gpu_blocks_override": 13, "kv_cache_memory_bytes": 8 << 20}
ENGINES: dict[str, dict[str, Any]] = {
    "small steps": {"max_num_batched_tokens": 96},
    "a small KV cache": SMALL_CACHE,
    "pooled, small steps": {"probe": "pooled-label-head", "max_num_batched_tokens": 96},
    "pooled": {"probe": "pooled-label-head"},
    "small steps and cache": {"max_num_batched_tokens": 128, **SMALL_CACHE},
    "no guess fits": {"max_num_batched_tokens": 24},
    "no prefix cache": {"enable_prefix_caching": False},
    "one request at a time": {"max_num_seqs": 1},
    "two ranks": {"tensor_parallel_size": 2},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
}


@pytest.mark.parametrize("seed", needed(1, of=[3, 0, 1, 2]))
def test_mixed_traffic_gets_the_heads_objects_or_stocks(engine, stock, seed):
    judged, _ = run(engine, stock, traffic(engine.label_ids, seed, 120))
    assert judged.early > 10
    assert judged.labels[True] > 3
    assert judged.finished or seed != 3


def test_no_sampler_sees_a_row_of_logits_without_a_token(engine, stock, monkeypatch):
    """Those of early objects have none of their own."""
    network, _, _ = parts(engine.llm)
    compute, rows = network.compute_logits, Counter[bool]()

    def checked(*args: Any) -> torch.Tensor:
        logits: torch.Tensor = compute(*args)
        assert not logits.isneginf().all(dim=1).any()
        assert logits.isfinite().any()
        rows.update((logits == 0).all(dim=1).tolist())
        return logits

    monkeypatch.setattr(network, "compute_logits", checked)
    run(engine, stock, traffic(engine.label_ids, 31, 30))
    assert rows[True] > 20
    assert rows[False] > 100


def test_a_reload_may_not_change_what_the_scheduler_writes(engine):
    """It keeps the values' tokens, and the guess, of the policy that it started with."""
    before = engine.oracle.artifact.config
    assert before.objects is not None
    first, *others = before.objects.fields
    other = before.objects.model_copy(
        update={"fields": (first.model_copy(update={"guess": 0}), *others)}
    )
    check_replaces("objects", before, before)
    with pytest.raises(AdaInferError, match="how its objects are written"):
        check_replaces("objects", before.model_copy(update={"output": other}), before)


@pytest.mark.parametrize("kind", needed(["small steps and cache"], of=ENGINES))
def test_in_every_engine(engine_of, stock, kind, request):
    if kind == "two ranks":
        request.getfixturevalue("ranks_on_cores")
    engine = engine_of(**ENGINES[kind])
    judged, counted = run(engine, stock, traffic(engine.label_ids, 20, 90))
    assert (judged.early > 0) == (kind != "no guess fits"), judged
    assert (counted.preempted > 0) == ("cache" in kind and "prefix" not in kind)
