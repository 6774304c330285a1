"""Attention metadata and the KV cache."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

NO_SLOT = -1  # 0.32's PAD_SLOT_ID: keys and values of such a row are not written


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


def write_kv(attention: Any, keys: Tensor, values: Tensor, slots: Tensor) -> None:
    """Write a layer's `keys` and `values` [rows, heads, head size] to the cache `slots` [rows].

    vLLM 0.32's ``unified_kv_cache_update`` makes the same call for the rows of a forward pass.
    """
    attention.impl.do_kv_cache_update(attention, keys, values, attention.kv_cache, slots)
