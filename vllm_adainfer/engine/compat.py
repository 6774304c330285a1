"""Every touch of a vLLM name that is not documented for plugins: what, why, and since when.

Each entry was checked against vLLM 0.32.0 (CPU build).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

from vllm.logger import init_logger

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.logger import _VllmLogger as VllmLogger


def get_logger(module: str) -> VllmLogger:
    """A logger below ``vllm.``: vLLM 0.32 configures that name only, others lose INFO lines."""
    return init_logger(module.replace("vllm_adainfer", "vllm.adainfer", 1))


@contextmanager
def cpu_runner_class(runner: type) -> Iterator[None]:
    """Let `CPUWorker.init_device` build `runner`: 0.32 names `CPUModelRunner` in its body."""
    from vllm.v1.worker import cpu_worker

    with mock.patch.object(cpu_worker, "CPUModelRunner", runner):
        yield


def use_model_class(vllm_config: VllmConfig, architecture: str) -> None:
    """Make the loader build `architecture` for this engine only.

    0.32 resolves the class from ``hf_config.architectures`` when it loads the weights
    (`model_loader/utils.py`); the registry entry of the stock class stays as it is.
    """
    vllm_config.model_config.hf_config.architectures = [architecture]


def leave_full_graphs_to_segments(vllm_config: VllmConfig) -> None:
    """Let vLLM's own CUDA graphs be piecewise: a full one holds the whole model.

    0.32 replays full graphs without calling the model, in which nobody could leave. Decode steps
    get graphs of their own, see `vllm_adainfer.engine.segment_graphs`.
    """
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode != CUDAGraphMode.NONE:  # or not set yet
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def segment_config(vllm_config: VllmConfig) -> VllmConfig:
    """The config to compile a segment with: one that does not depend on our settings.

    0.32 puts ``additional_config`` into the key of its compile cache. What a segment compiles
    to depends on its layers alone, which its own name states, so that a recalibrated artifact
    finds the segments of the last one.
    """
    config = copy.copy(vllm_config)
    config.additional_config = {}
    return config


def compile_cache_folder(name: str) -> AbstractContextManager[None]:
    """Modules built in this context have folder `name` of vLLM's compile cache for their own.

    0.32 finds compiled graphs in a folder by their numbers, which start at 0 in each module, and
    all modules built under the same tag share one. Unless whole modules are stored
    (``VLLM_USE_MEGA_AOT_ARTIFACT``, by default with torch 2.12), one would run another's code.
    """
    from vllm.compilation.backends import set_model_tag

    return set_model_tag(name)


def client_request_id(request_id: str) -> str:
    """The id a request came with: 0.32 appends a dash and eight random hex digits to it.

    (`InputProcessor.assign_request_id`, unless ``VLLM_DISABLE_REQUEST_ID_RANDOMIZATION`` is set.)
    """
    return re.sub(r"-[0-9a-f]{8}$", "", request_id)


def hash_block_size(kv_cache_manager: Any) -> int:
    """Tokens per entry of ``Request.block_hashes`` (0.32: an attribute of the block pool)."""
    return int(kv_cache_manager.block_pool.hash_block_size)


def use_stat_loggers(mixin: type) -> None:
    """Have engines with our switch in their config write our metrics and log lines, too.

    0.32 takes stat loggers from entry points, but then turns statistics on for every engine of
    every process, also where they are off and nobody asked for us. So the class that builds
    loggers (it is looked up in these two modules) gets `mixin` before it here, once, when an
    engine is configured.
    """
    from vllm.v1.engine import async_llm, llm_engine
    from vllm.v1.metrics.loggers import StatLoggerManager

    ours = type("AdaInferStatLoggerManager", (mixin, StatLoggerManager), {})
    for module in (async_llm, llm_engine):
        if module.StatLoggerManager is StatLoggerManager:
            module.StatLoggerManager = ours


def note_report(scheduler_stats: Any, report: dict[str, Any]) -> None:
    """Send from the scheduler to the frontends, in `SchedulerStats`, what has been executed.

    0.32 has no field in it for a plugin. The one for KV connectors may hold any plain values, and
    is free: KV connectors are refused.
    """
    scheduler_stats.kv_connector_stats = {REPORT_KEY: report}


def take_report(scheduler_stats: Any) -> dict[str, Any] | None:
    """What `note_report` sent; the field is empty then, for vLLM's own loggers."""
    sent = None if scheduler_stats is None else scheduler_stats.kv_connector_stats
    if not sent or REPORT_KEY not in sent:
        return None
    scheduler_stats.kv_connector_stats = None
    report: dict[str, Any] = sent[REPORT_KEY]
    return report


REPORT_KEY = "adainfer"
NO_SLOT = -1  # 0.32's PAD_SLOT_ID: keys and values of such a row are not written


def slots(blocks: Tensor, size: int, requests: Tensor, positions: Tensor) -> Tensor:
    """Cache slots, int64 [rows], of `positions` of `requests` (places in the batch).

    What 0.32's kernels for ``BlockTable.compute_slot_mapping`` (V1) and
    ``BlockTables.compute_slot_mappings`` (V2) do without context parallelism; calling those would
    overwrite the step's own mapping.

    Args:
        blocks: int32 [requests, blocks], the block table.
        size: tokens of a block.
        requests: int64 [rows].
        positions: int64 [rows].

    """
    return blocks[requests, positions // size].long() * size + positions % size


def note(output: Any, told: Any) -> None:
    """Send something from the worker to the scheduler, in a `ModelRunnerOutput`.

    0.32 has no field in it for a plugin; as it is pickled, an attribute more travels with it.
    V2 wraps it in an `AsyncOutput`, which hands it on when the tokens are there.
    """
    getattr(output, "model_runner_output", output).adainfer = told


def noted(output: Any) -> Any:
    """What `note` sent; None where the worker has run no step."""
    return getattr(output, "adainfer", None)


def write_kv(attention: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write `keys` and `values` [rows, heads, head size] of a layer to cache `slots` [rows].

    What 0.32's ``unified_kv_cache_update`` calls for the rows of a forward pass.
    """
    attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots)


def keep_best_tokens(runner: Any) -> None:
    """Let requests with ``logprobs`` keep their best tokens beside some with ``logprob_token_ids``.

    0.32's V1 `Sampler.forward` drops what it gathered for the former once a step has one of the
    latter (vLLM pull request 51789; V2 keeps both). So here every row without ids of its own asks
    for its best tokens by their ids. On this runner's sampler only, and in such steps only.
    """
    gather = runner.sampler.gather_specific_token_logprobs

    def gather_both(logprobs: Tensor, asked: dict[int, list[int]], sampled: Tensor) -> Any:
        most = runner.input_batch.sampling_metadata.max_num_logprobs
        if most is not None:
            best = logprobs.topk(most).indices.tolist()
            asked = {**dict(enumerate(best)), **asked}
        return gather(logprobs, asked, sampled)

    runner.sampler.gather_specific_token_logprobs = gather_both


@contextmanager
def seeds_of_chunks_kept(runner: Any) -> Iterator[None]:
    """While the V1 `runner` samples: leave out the generators of prompts that are not complete.

    What is drawn for such a row is thrown away. 0.32 then rewinds its generator by an offset, which
    a CPU's does not have: one request with a ``seed`` and a prompt of several chunks ends a stock
    server. Left out, it draws nothing, as if it had been rewound.
    """
    generators, batch = runner.input_batch.generators, runner.input_batch
    incomplete = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    kept = {place: generators.pop(place) for place in incomplete if place in generators}
    try:
        yield
    finally:
        generators.update(kept)
