"""Attention metadata and the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NO_SLOT = -1  # 0.32's PAD_SLOT_ID: keys and values of such a row are not written

# Backends (0.32) whose builders write to the same pinned memory each time, and copy from it to the
# device without waiting: each wrapper of FlashInfer does, in ``plan()``. What vLLM itself copies
# there is pageable or newly allocated (`v1/attention/backends/flashinfer.py`).
PINNED_MEMORY_REUSED = ("FLASHINFER",)


def slots_of(blocks: Tensor, size: int, offsets: Tensor, out: Tensor | None = None) -> Tensor:
    """The KV cache slot of each row, from its int32 block and its int64 offset there.

    vLLM 0.32 computes them in ``BlockTable.compute_slot_mapping`` (V1) and
    ``BlockTables.compute_slot_mappings`` (V2), as here without context parallelism. Calling those
    would overwrite the step's own mapping.
    """
    import torch

    return torch.add(offsets, blocks, alpha=size, out=out)


def share_workspace(theirs: Iterable[Sequence[Any]], ours: Iterable[Sequence[Any]]) -> None:
    """Let the metadata builders of `ours` use the workspace of those of `theirs`.

    vLLM 0.32's runner shares one workspace among its own builders in the same way
    (`v1/worker/gpu/attn_utils.py`); otherwise each FlashInfer builder allocates 394 MiB. Builders
    use it one after the other. Both arguments are attention groups, by KV cache group.
    """

    def with_attribute(name: str, groups: Iterable[Sequence[Any]]) -> list[Any]:
        builders = [b for kv_group in groups for group in kv_group for b in group.metadata_builders]
        return [builder for builder in builders if hasattr(builder, name)]

    for owner in with_attribute("_get_workspace_buffer", theirs)[:1]:
        for builder in with_attribute("set_workspace_buffer", ours):
            builder.set_workspace_buffer(owner._get_workspace_buffer())


def wait_for_last_copies(groups: Iterable[Sequence[Any]], device: torch.device) -> None:
    """Let builders that reuse pinned memory write to it only once it has been copied.

    vLLM 0.32 builds once a step, and has waited for the step before; we may build twice while the
    device is still busy with that step. The first batch would then run with the numbers of the
    second. If the copies have run, as after each question, the wait is over at once.
    """
    import torch

    for kv_group in groups:
        for group in kv_group:
            if group.backend.get_name() in PINNED_MEMORY_REUSED:
                for builder in group.metadata_builders:
                    builder.build = _after_last_copies(builder.build, torch.Event(device))


def _after_last_copies(build: Callable[..., Any], copied: torch.Event) -> Callable[..., Any]:
    def waiting(*args: Any, **settings: Any) -> Any:
        copied.synchronize()  # returns at once before the first record
        built = build(*args, **settings)
        copied.record()
        return built

    return waiting


def write_kv(attention: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write a layer's `keys` and `values` [rows, heads, head size] to the cache `slots` [rows].

    vLLM 0.32's ``unified_kv_cache_update`` makes the same call for the rows of a forward pass.
    """
    attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots)
