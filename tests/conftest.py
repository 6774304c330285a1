"""Tiny models and the engine that the end-to-end tests share."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

ROOT = Path(__file__).parents[1]
CORES = sorted(os.sched_getaffinity(0))
WORKER = os.environ.get("PYTEST_XDIST_WORKER")  # gw0 or gw1 of `pytest -n 2`
LONGEST = {
    "test_serve",
    "test_cli",
    "test_suite",
    "test_families",
    "test_structured_server",
    "test_student_calibration",
    "test_self_test",
    "test_self_test_of_graphs",
}

# Before vLLM is imported anywhere: engines in this process, quiet, no GPU.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CACHE_ROOT", str(ROOT / ".cache" / "vllm"))
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(ROOT / ".cache" / "inductor"))

if WORKER:
    # Each worker and everything it starts computes on a core of its own. vLLM alone would bind
    # the engine processes of both workers to the first core.
    os.sched_setaffinity(0, {CORES[int(WORKER[2:]) % len(CORES)]})
    os.environ["OMP_NUM_THREADS"] = "1"
else:
    path = ROOT / "tests" / "every_process", ROOT, os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, path)).rstrip(os.pathsep)
    handle, os.environ["ADAINFER_TESTS_ENGINES"] = tempfile.mkstemp(prefix="engines-")
    os.close(handle)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.every_process import sitecustomize  # noqa: E402

# How long a case takes is the machine's, and its load's.
SLOW = hypothesis.HealthCheck.too_slow
hypothesis.settings.register_profile("any machine", deadline=None, suppress_health_check=[SLOW])
hypothesis.settings.load_profile("any machine")

if not WORKER:  # Python has run this at the start of a worker, and of all other processes
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
        # Stock engines compile as ours do, see `find_compiled_code_again`.
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")
    sitecustomize.prepare()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the two halves of the cases, and put files that take long first.

    CI runs one half of the full cases. No worker waits at the end for a long file on the other.
    """
    for item in items:
        item.add_marker(("even", "odd")[crc32(item.nodeid.encode()) % 2])
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def pytest_sessionfinish() -> None:
    """Engines end with this process, and then log to streams that the worker has closed."""
    logging.raiseExceptions = False


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any) -> Generator[None]:
    """How many engines were started, in all processes; last of all, programs that are missing."""
    yield
    if WORKER:
        return
    counted = Path(os.environ["ADAINFER_TESTS_ENGINES"])
    kinds = Counter(counted.read_text().split())
    counted.unlink()
    by_kind = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
    terminalreporter.write_line(f"engines started: {kinds.total()} ({by_kind or 'none'})")
    for line in skipped_for_programs(terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(line, yellow=True)


def skipped_for_programs(reports: Iterable[Any]) -> list[str]:
    """A line for each program that skipped tests say to install, and how many would run with it."""
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in reports)
    programs = {why: number for why, number in reasons.items() if why.startswith("install ")}
    return [f"skipped {number} of the tests: {why}" for why, number in programs.items()]


@pytest.fixture(autouse=True)
def vllm_reads_the_environment_anew() -> None:
    """VLLM caches it when an engine starts, for all later tests of the process."""
    if envs := sys.modules.get("vllm.envs"):
        envs.disable_envs_cache()


@pytest.fixture
def caplog_vllm(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> pytest.LogCaptureFixture:
    """The log, also that below ``vllm``, which does not propagate."""
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    return caplog


@pytest.fixture
def all_cores() -> Iterator[list[int]]:
    """All cores, for a test of two ranks side by side."""
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, CORES)
    yield CORES
    os.sched_setaffinity(0, own)


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
_OF_SEVERAL_RANKS: list[Any] = []


@pytest.fixture(autouse=True)
def ranks_end_with_the_test() -> Iterator[None]:
    """Each takes more than half a GiB. The engine itself stays, see `tiny_engine`."""
    yield
    while _OF_SEVERAL_RANKS:
        core = _OF_SEVERAL_RANKS.pop().llm_engine.engine_core.engine_core
        core.model_executor.shutdown()


def tiny_engine(
    model: Path, adainfer: dict[str, Any] | None, dtype: str = "float32", **settings: Any
) -> Any:
    """An engine in this process with small chunks and blocks, by default eager; None is stock.

    It lives as long as the process: one that ends takes the process groups of all others along.
    One of several ranks has processes of its own, which end with the test.
    """
    from vllm import LLM

    llm = LLM(
        model=str(model),
        dtype=dtype,
        additional_config={} if adainfer is None else {"adainfer": adainfer},
        **{
            "enforce_eager": True,
            "max_num_batched_tokens": 128,
            "max_num_seqs": 16,
            "block_size": 32,
            **settings,
        },
    )
    _ENGINES.append(llm)
    if settings.get("tensor_parallel_size", 1) > 1:
        _OF_SEVERAL_RANKS.append(llm)
    return llm


def small_engine(model: Path, policy: Path, **settings: Any) -> Any:
    """With a cache of 384 tokens in 12 blocks, so that requests preempt each other."""
    return tiny_engine(
        model,
        {"artifact": str(policy)},
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
def policy_from_zero(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact like `tiny_policy`, with the exit points `FROM_ZERO`."""
    from tests.tiny import FROM_ZERO, tiny_artifact

    directory = tmp_path_factory.mktemp("artifact") / "policy"
    return tiny_artifact(
        tiny_model,
        directory,
        exit_points=FROM_ZERO,
        probe="pooled-label-head",
        pooled_from=1,
    )


@pytest.fixture(scope="session")
def small(tiny_model: Path, policy_from_zero: Path) -> Any:
    """A second one, for tests of generation, with exits at `FROM_ZERO`."""
    return small_engine(tiny_model, policy_from_zero)


@pytest.fixture(scope="session")
def reference(tiny_model: Path) -> Any:
    """The same weights in plain transformers: the oracle."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
