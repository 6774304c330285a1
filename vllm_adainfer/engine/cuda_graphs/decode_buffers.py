"""Fixed memory that CUDA graphs of decode steps read and write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import AnyArray, Ints
from vllm_adainfer.engine.compat.attention import NO_SLOT, slots_of
from vllm_adainfer.engine.segments.attention import Groups, StepAttention, metadata_of
from vllm_adainfer.exits.batch.hidden_states import HiddenStates, StateMemory
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.transfers import packed_size, unpack, upload_into


class DecodeBuffers:
    """A batch of requests with one row each, and their hidden states.

    During capture no batch is staged: each request has one token and no blocks. Rows beyond the
    staged batch are padding: requests without tokens, keys and values without a slot. `positions`,
    int64 [size], has each request's position in its sequence.
    """

    def __init__(self, size: int, block_tables: Sequence[Tensor], device: torch.device) -> None:
        """Allocate for `size` requests, with tables like `block_tables` [requests, blocks]."""
        self._size = size
        groups = len(block_tables)
        self._starts_cpu = torch.empty(size + 1, dtype=torch.int32)
        self._seq_lens_cpu = torch.empty(size, dtype=torch.int32)
        arrays = self._arrays(np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64))
        arrays += self._places(np.zeros(size, dtype=np.int64), [1] * groups)
        self._packed = torch.empty(packed_size(arrays), dtype=torch.uint8, device=device)
        upload_into(arrays, self._packed)
        (
            self.positions,
            self._owners,
            self._seq_lens,
            self._starts,
            self._is_padding,
            *places,
        ) = unpack(self._packed, arrays)
        self._blocks, self._offsets = places[:groups], places[groups:]
        self._ids = torch.zeros(size, dtype=torch.int32, device=device)
        self._tables = [table.new_zeros(size, table.shape[1]) for table in block_tables]
        self._slots = torch.full((groups, size), NO_SLOT, dtype=torch.int64, device=device)
        # Allocated by the first batch, which is the largest, with its dtype and widths.
        self._memory = StateMemory(size)
        self._after: dict[int, HiddenStates] = {}  # by segment, where in the memory its output is
        self._final: Tensor | None = None

    def stage(self, layout: RowLayout, attention: StepAttention, padded: int) -> None:
        """Put in the rows of `layout`, padded to `padded` requests, in one copy and few kernels."""
        requests, rows = layout.present, layout.num_rows
        positions, owners = np.zeros((2, self._size), dtype=np.int64)
        positions[:rows] = layout.last_positions[requests]
        owners[:rows] = requests
        arrays = self._arrays(positions, owners, rows)
        upload_into(arrays + self._places(positions, attention.block_sizes), self._packed)
        for group, table in enumerate(attention.block_tables):
            # Rows of padding get the table of the first request, and read none of it.
            buffer = self._tables[group][:padded]
            torch.index_select(table, 0, self._owners[:padded], out=buffer)
            blocks = buffer.gather(1, self._blocks[group][:padded].unsqueeze(1)).squeeze(1)
            size, offsets = attention.block_sizes[group], self._offsets[group][:padded]
            slots_of(blocks, size, offsets, out=self._slots[group, :padded])
        if padded > rows:
            self._slots[:, rows:padded] = NO_SLOT

    def _arrays(self, positions: Ints, owners: Ints, rows: int | None = None) -> list[AnyArray]:
        """What graphs read of a batch of `rows` requests; None: as many as there is room for."""
        place = np.arange(self._size)
        is_padding = place >= (self._size if rows is None else rows)
        seq_lens = np.where(is_padding, 0, positions + 1).astype(np.int32)
        starts = np.append(0, np.cumsum(~is_padding)).astype(np.int32)
        self._seq_lens_cpu.numpy()[:] = seq_lens
        self._starts_cpu.numpy()[:] = starts
        return [positions, owners, seq_lens, starts, is_padding]

    def _places(self, positions: Ints, block_sizes: Sequence[int]) -> list[AnyArray]:
        """By KV cache group, the place of each row's block in its table; then that in the block."""
        return [
            *(positions // size for size in block_sizes),
            *(positions % size for size in block_sizes),
        ]

    def metadata(
        self, groups: Groups, rows: int, max_seq_len: int, for_capture: bool = False
    ) -> dict[str, Any]:
        """Attention metadata of the staged batch, padded to `rows`; see `metadata_of`."""
        return metadata_of(
            groups,
            [table[:rows] for table in self._tables],
            self.slots_of(rows),
            starts=self._starts[: rows + 1],
            starts_cpu=self._starts_cpu[: rows + 1],
            seq_lens=self._seq_lens[:rows],
            seq_lens_cpu=self._seq_lens_cpu[:rows],
            positions=self.positions[:rows],
            max_query_len=1,
            max_seq_len=max_seq_len,
            for_capture=for_capture,
        )

    def slots_of(self, rows: int) -> list[Tensor]:
        """int64 [rows] by KV cache group: the cache slots."""
        return list(self._slots[:, :rows].unbind())

    def padding_of(self, rows: int) -> Tensor:
        """bool [rows]: which rows are padding, for which a router need not choose experts."""
        return self._is_padding[:rows]

    def ids_of(self, rows: int) -> HiddenStates:
        """The token ids, the input of the first segment."""
        return HiddenStates(self._ids[:rows])

    def states_after(self, segment: int, rows: int) -> HiddenStates:
        """The hidden states between a segment and the next."""
        return self._after[segment].rows(slice(0, rows))

    def final_of(self, rows: int) -> Tensor:
        """[rows, head size], the LM head's input."""
        assert self._final is not None, "stored by the last segment"
        return self._final[:rows]

    def load(self, segment: int, states: HiddenStates) -> None:
        """Copy in a segment's input for the staged rows, unless it is in the buffers already."""
        rows = slice(0, states.num_rows)
        if segment == 0:
            self._ids[rows] = states.hidden
            return
        memory = self._after[segment - 1]
        if states.hidden.data_ptr() != memory.hidden.data_ptr():
            memory.put(states, rows)

    def store(self, segment: int, states: HiddenStates) -> None:
        """Store the output of a segment that is not the last."""
        self._after[segment] = memory = self._memory.like(states)
        memory.put(states, slice(0, states.num_rows))

    def store_final(self, states: Tensor) -> None:
        """Store the output of the last segment."""
        if self._final is None:
            self._final = states.new_zeros(len(self.positions), *states.shape[1:])
        self._final[: len(states)] = states
