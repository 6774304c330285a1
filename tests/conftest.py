"""Tiny models and the engine that the end-to-end tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Before vLLM is imported anywhere: engines in this process, quiet, no GPU.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests import triton_on_cpu

# Before Triton is imported: without a GPU its code runs in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton_on_cpu.install_for_v2()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random six-layer Llama with a word tokenizer, fp32."""
    from tests.tiny import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_policy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for it: random label heads, every row settled at the first exit point."""
    from tests.tiny import tiny_artifact

    return tiny_artifact(tiny_model, tmp_path_factory.mktemp("artifact") / "policy")


_ENGINES: list[Any] = []


def tiny_engine(
    model: Path, adainfer: dict[str, Any] | None, dtype: str = "float32", **settings: Any
) -> Any:
    """An engine in this process with small chunks and blocks, by default eager; None is stock.

    It lives as long as the process: one that ends takes the process groups of all others along.
    """
    from vllm import LLM

    llm = LLM(
        model=str(model),
        dtype=dtype,
        max_num_batched_tokens=128,
        max_num_seqs=16,
        block_size=32,
        additional_config={} if adainfer is None else {"adainfer": adainfer},
        **{"enforce_eager": True, **settings},
    )
    _ENGINES.append(llm)
    return llm


def small_engine(model: Path, policy: Path, **settings: Any) -> Any:
    """With a cache of 384 tokens in 12 blocks, so that requests preempt each other."""
    return tiny_engine(
        model,
        {"artifact": str(policy), "kv": "propagate"},
        max_model_len=320,
        num_gpu_blocks_override=12,
        kv_cache_memory_bytes=8 << 20,
        **settings,
    )


@pytest.fixture(scope="session")
def engine(tiny_model: Path, tiny_policy: Path) -> Any:
    """The engine that most tests share, with exits after `EXIT_POINTS`."""
    switch = {"artifact": str(tiny_policy), "min_rows_saved": 1}
    return tiny_engine(tiny_model, switch, max_model_len=512, kv_cache_memory_bytes=64 << 20)


@pytest.fixture(scope="session")
def small(tiny_model: Path, tiny_policy: Path) -> Any:
    """A second one, for tests of generation."""
    return small_engine(tiny_model, tiny_policy)


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Any:
    """The same weights in plain transformers: the oracle."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
