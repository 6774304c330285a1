"""Attention metadata, and the KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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


def write_kv(attention: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write `keys` and `values` [rows, heads, head size] of a layer to cache `slots` [rows].

    0.32's ``unified_kv_cache_update`` makes the same call for the rows of a forward pass.
    """
    attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots)
