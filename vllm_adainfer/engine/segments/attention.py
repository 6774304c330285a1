"""Attention metadata for a subset of a step's rows, built by the backend's own builder."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.utils import AttentionGroup

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.engine.compat.attention import (
    NO_SLOT,
    share_workspace,
    slots_of,
    wait_for_last_copies,
)
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.transfers import upload

Groups = list[list[AttentionGroup]]  # by KV cache group


def with_own_builders(
    groups: Groups, kv_cache: KVCacheConfig, vllm_config: VllmConfig, device: torch.device
) -> Groups:
    """Copies of `groups` with metadata builders of their own: a builder may keep its last result.

    The groups must hold every layer of `kv_cache`: vLLM treats a layer without metadata as being
    profiled, and returns garbage. vLLM's own model that runs some layers on a subset of rows does
    the same (`models/deepseek_v41/nvidia/model_state.py`). An AdaInferError if a backend writes
    keys and values only for rows that attend.
    """
    held = {name for group in itertools.chain.from_iterable(groups) for name in group.layer_names}
    cached = {name for group in kv_cache.kv_cache_groups for name in group.layer_names}
    assert held >= cached, f"no metadata would be built for {sorted(cached - held)}"
    for group in itertools.chain.from_iterable(groups):
        # A layer with a recurrent state writes no keys and values.
        if group.backend.forward_includes_kv_cache_update and not group.backend.is_ssm():
            raise AdaInferError(
                f"vllm-adainfer: attention backend {group.backend.get_name()} cannot write keys "
                "and values of rows that do not attend: choose another with --attention-backend, "
                'such as FLASH_ATTN or TRITON_ATTN, or drop "adainfer" from additional_config'
            )
    copies = [[replace(group, metadata_builders=[]) for group in kv_group] for kv_group in groups]
    for kv_group in copies:
        for group in kv_group:
            group.create_metadata_builders(vllm_config, device, group.kernel_block_size)
    share_workspace(groups, copies)
    wait_for_last_copies(copies, device)
    return copies


def metadata_of(
    groups: Groups,
    block_tables: Sequence[Tensor],
    slots: Sequence[Tensor],
    *,
    starts: Tensor,
    starts_cpu: Tensor,
    seq_lens: Tensor,
    seq_lens_cpu: Tensor,
    positions: Tensor,
    max_query_len: int,
    max_seq_len: int,
    for_capture: bool = False,
) -> dict[str, Any]:
    """Attention metadata by layer name.

    Args:
        groups: attention groups from `with_own_builders`.
        block_tables: int32 [requests, blocks] of these requests, by KV cache group.
        slots: int64 [rows] by KV cache group, the cache slots of keys and values.
        starts: int32 [requests + 1], the first row of each request, then the number of rows.
        starts_cpu: the same on the host.
        seq_lens: int32 [requests], the tokens of each request up to its last row.
        seq_lens_cpu: the same on the host.
        positions: int64 [rows], each row's position in its sequence.
        max_query_len: the largest number of rows of a request.
        max_seq_len: the largest number of tokens of a request, or an upper bound on it.
        for_capture: whether a CUDA graph is about to be captured.

    """
    # A recurrent state starts from zero where the request's first token is among these rows. This
    # is all that vLLM 0.32 reads of ``is_prefilling`` for recurrent layers (`gdn_attn.py`).
    starts_sequence: Bools = seq_lens_cpu.numpy() <= np.diff(starts_cpu.numpy())
    metadata: dict[str, Any] = {}
    for kv_group, table, group_slots in zip(groups, block_tables, slots, strict=True):
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts_cpu,
            seq_lens=seq_lens,
            seq_lens_cpu_upper_bound=seq_lens_cpu,
            num_reqs=len(seq_lens),
            num_actual_tokens=len(positions),
            max_query_len=max_query_len,
            max_seq_len=max_seq_len,
            block_table_tensor=table,
            slot_mapping=group_slots,
            positions=positions,
            is_prefilling=torch.from_numpy(starts_sequence),
        )
        for group in kv_group:
            built = (
                group.build_metadata_for_cudagraph_capture(common)
                if for_capture
                else group.build_metadata(common)
            )
            metadata.update(dict.fromkeys(group.layer_names, built))
    return metadata


def by_layer(groups: Groups, slots: Sequence[Tensor]) -> dict[str, Tensor]:
    """Index `slots` of the KV cache groups by layer name."""
    return {
        name: group_slots
        for kv_group, group_slots in zip(groups, slots, strict=True)
        for group in kv_group
        for name in group.layer_names
    }


@dataclass(frozen=True)
class StepAttention:
    """Builds attention metadata for any rows of a step's requests.

    The slot mapping is built twice, in the metadata and by layer: vLLM 0.32 writes keys and values
    with the second. By KV cache group there are attention groups from `with_own_builders`, block
    tables on the device, int32 [requests, blocks], and block sizes in tokens.
    """

    groups: Groups
    block_tables: Sequence[Tensor]
    block_sizes: Sequence[int]
    device: torch.device

    @classmethod
    def of_step(
        cls,
        groups: Groups,
        block_tables: Sequence[Tensor],
        block_sizes: Sequence[int],
        layout: RowLayout,
        device: torch.device,
    ) -> StepAttention:
        """For a step with the rows of `layout`.

        With prefix caching a recurrent layer keeps a state block every so many tokens, and vLLM
        copies a request's state into the block of the step's last row before the step. vLLM 0.32
        looks the block up by a batch's rows (`mamba_get_block_table_tensor`), but deferred rows may
        belong to an earlier block. So the tables of recurrent layers hold this block everywhere.
        """
        tables = [
            _last_block_everywhere(table, layout.last_positions // size)
            if any(group.backend.is_ssm() for group in kv_group)
            else table
            for kv_group, table, size in zip(groups, block_tables, block_sizes, strict=True)
        ]
        return cls(groups, tables, block_sizes, device)

    def of_layer(self, name: str) -> StepAttention:
        """The same for batches that run only the layer with this attention."""
        index, kept = next(
            (index, group)
            for index, kv_group in enumerate(self.groups)
            for group in kv_group
            if name in group.layer_names
        )
        table, size = self.block_tables[index], self.block_sizes[index]
        return StepAttention([[kept]], [table], [size], self.device)

    def metadata(
        self, layout: RowLayout, padded: int | None = None
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
        """Positions of the rows of `layout`, and by layer name cache slots and attention metadata.

        Positions are int64 [rows], and slots int64 [rows], or [padded]: padding has none.
        """
        requests, positions, sizes = layout.present, layout.positions, self.block_sizes
        lens = layout.query_lens[requests]
        starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
        seq_lens = (layout.last_positions[requests] + 1).astype(np.int32)
        arrays = layout.row_requests, positions, requests, starts, seq_lens
        places = [*(positions // size for size in sizes), *(positions % size for size in sizes)]
        owners, there, kept, device_starts, device_seq_lens, *rest = upload(
            (*arrays, *places), self.device
        )
        blocks, offsets = rest[: len(sizes)], rest[len(sizes) :]
        slots = [
            slots_of(table[owners, block], size, offset)
            for table, size, block, offset in zip(
                self.block_tables, sizes, blocks, offsets, strict=True
            )
        ]
        if padded is not None:
            more = padded - layout.num_rows
            slots = [nn.functional.pad(one, (0, more), value=NO_SLOT) for one in slots]
        metadata = metadata_of(
            self.groups,
            [table[kept] for table in self.block_tables],
            slots,
            starts=device_starts,
            starts_cpu=torch.from_numpy(starts),
            seq_lens=device_seq_lens,
            seq_lens_cpu=torch.from_numpy(seq_lens),
            positions=there,
            max_query_len=int(lens.max()),
            max_seq_len=int(seq_lens.max()),
        )
        return there, by_layer(self.groups, slots), metadata


def _last_block_everywhere(table: Tensor, blocks: Ints) -> Tensor:
    """`table` [requests, blocks], with entry `blocks` of each request copied to all entries."""
    if table.shape[1] == 1:
        return table
    [places] = upload((blocks,), table.device)
    return table.gather(1, places.unsqueeze(1)).expand_as(table)
