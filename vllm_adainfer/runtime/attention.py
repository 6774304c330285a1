"""Attention metadata of the requests that remain, built by the attention backend itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_adainfer.runtime.step import Ints


class AttentionNarrower:
    """Rebuilds a V1 runner's metadata for some of its requests.

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

    def __call__(self, requests: Ints, rows: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Metadata and slot mapping, by layer name, of batch positions `requests`.

        `rows` [remaining rows] are their token rows in the whole batch.
        """
        starts = self._runner.query_start_loc.np
        query_lens = starts[requests + 1] - starts[requests]
        return self._build(requests, query_lens, rows, rows)

    def last_rows(self, requests: Ints, rows: Tensor) -> dict[str, Any]:
        """Metadata, by layer name, for one query of each request, from its last row.

        `rows` [remaining rows] are all their token rows in the whole batch, whose K and V are
        still to be written.
        """
        last = torch.from_numpy(self._runner.query_start_loc.np[requests + 1] - 1)
        return self._build(requests, np.ones_like(requests), last, rows)[0]

    def _build(
        self, requests: Ints, query_lens: Ints, query_rows: Tensor, written_rows: Tensor
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        runner = self._runner
        kept = torch.from_numpy(requests)
        query_start_loc = torch.zeros(len(requests) + 1, dtype=torch.int32)
        query_start_loc[1:] = torch.from_numpy(np.cumsum(query_lens))
        seq_lens = runner.seq_lens[kept]
        attn_metadata: dict[str, Any] = {}
        slot_mappings: dict[str, Tensor] = {}
        for group_id, builders in enumerate(self._groups):
            block_table = runner.input_batch.block_table[group_id]
            slot_mapping = block_table.slot_mapping.gpu[written_rows]
            common = CommonAttentionMetadata(
                query_start_loc=query_start_loc,
                query_start_loc_cpu=query_start_loc,
                seq_lens=seq_lens,
                seq_lens_cpu_upper_bound=seq_lens,
                num_reqs=len(requests),
                num_actual_tokens=len(query_rows),
                max_query_len=int(query_lens.max()),
                max_seq_len=int(seq_lens.max()),
                block_table_tensor=block_table.get_device_tensor(runner.input_batch.num_reqs)[kept],
                slot_mapping=slot_mapping,
                positions=runner.positions[query_rows],
            )
            for layer_names, builder in builders:
                metadata = builder.build(0, common)
                attn_metadata.update(dict.fromkeys(layer_names, metadata))
                slot_mappings.update(dict.fromkeys(layer_names, slot_mapping))
        return attn_metadata, slot_mappings
