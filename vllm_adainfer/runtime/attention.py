"""Attention metadata of a batch that exits have changed, built by the attention backend itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_adainfer import compat
from vllm_adainfer.runtime.layout import RowLayout


class AttentionNarrower:
    """Rebuilds a V1 runner's metadata for other rows of its requests.

    The builders are our own (one per attention group), as in vLLM's own row-subset model
    (`models/deepseek_v41/nvidia/model_state.py`): a builder may keep what it built last. The
    slot mapping is returned twice, inside the metadata and by layer, because vLLM 0.32 reads
    the second where it writes K and V.
    """

    def __init__(self, runner: Any) -> None:
        """`runner` is a `GPUModelRunner` whose KV cache is set up."""
        self._runner = runner
        self._groups = [
            [
                (
                    group.layer_names,
                    group.backend.get_builder_cls()(
                        group.kv_cache_spec,
                        group.layer_names,
                        runner.vllm_config,
                        runner.device,
                    ),
                )
                for group in groups
            ]
            for groups in runner.attn_groups
        ]

    def __call__(self, layout: RowLayout) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Metadata and slot mapping, by layer name, for the rows of `layout`."""
        slots = self._slots(layout)
        return self._metadata(layout, slots), self._by_layer(slots)

    def slots(self, layout: RowLayout) -> dict[str, Tensor]:
        """Slot mapping, by layer name, for the rows of `layout`."""
        return self._by_layer(self._slots(layout))

    def _slots(self, layout: RowLayout) -> list[Tensor]:
        """Of each KV cache group, int64 [rows]."""
        owners, positions = torch.from_numpy(layout.owners), torch.from_numpy(layout.positions)
        tables = self._runner.input_batch.block_table
        return [
            compat.slots(tables[group], owners, positions) for group in range(len(self._groups))
        ]

    def _by_layer(self, slots: list[Tensor]) -> dict[str, Tensor]:
        return {
            name: group_slots
            for builders, group_slots in zip(self._groups, slots, strict=True)
            for layer_names, _ in builders
            for name in layer_names
        }

    def _metadata(self, queries: RowLayout, slots: list[Tensor]) -> dict[str, Any]:
        """For queries from the rows of `queries`; K and V go to `slots`."""
        runner, requests = self._runner, queries.here
        kept, lens = torch.from_numpy(requests), queries.lens[requests]
        query_start_loc = torch.zeros(len(requests) + 1, dtype=torch.int32)
        query_start_loc[1:] = torch.from_numpy(np.cumsum(lens))
        seq_lens = runner.seq_lens[kept]
        metadata: dict[str, Any] = {}
        for group_id, builders in enumerate(self._groups):
            table = runner.input_batch.block_table[group_id]
            common = CommonAttentionMetadata(
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens,
                num_reqs=len(requests),
                num_actual_tokens=queries.num_rows,
                max_query_len=int(lens.max()),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=table.get_device_tensor(runner.input_batch.num_reqs)[kept],
                slot_mapping=slots[group_id],
                positions=torch.from_numpy(queries.positions),
            )
            for layer_names, builder in builders:
                metadata.update(dict.fromkeys(layer_names, builder.build(0, common)))
        return metadata
