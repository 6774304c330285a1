"""The fixed memory that CUDA graphs of decode steps read and write."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.engine import compat
from vllm_adainfer.engine.attention import Queries, StepAttention
from vllm_adainfer.exits.layout import RowLayout
from vllm_adainfer.exits.residual import Stream
from vllm_adainfer.exits.transfer import upload


class DecodeBuffers:
    """A batch of requests with one row each, and its residual stream.

    Until a batch is staged, for capture, each request has one token and no blocks. Rows beyond the
    staged ones are padding: their requests have no tokens, their keys and values no slot.

    Attributes:
        positions: int64 [size].

    """

    def __init__(self, size: int, block_tables: Sequence[Tensor], device: torch.device) -> None:
        """For up to `size` requests, with `block_tables` [requests, blocks] like those of steps."""
        self.positions = torch.zeros(size, dtype=torch.int64, device=device)
        self._ids = torch.zeros(size, dtype=torch.int32, device=device)
        self._starts_cpu = torch.arange(size + 1, dtype=torch.int32)
        self._starts = self._starts_cpu.to(device, copy=True)
        self._seq_lens_cpu = torch.ones(size, dtype=torch.int32)
        self._seq_lens = self._seq_lens_cpu.to(device, copy=True)
        self._tables = [table.new_zeros(size, table.shape[1]) for table in block_tables]
        self._slots = torch.full(
            (len(block_tables), size), compat.NO_SLOT, dtype=torch.int64, device=device
        )
        # Allocated by the first batch, the largest, which has their dtype and widths.
        self._stream: Stream | None = None
        self._final: Tensor | None = None

    def stage(self, layout: RowLayout, attention: StepAttention, padded: int) -> None:
        """Copy in the batch of `layout`, padded to that many requests."""
        requests, rows = layout.here, layout.num_rows
        positions = np.zeros(padded, dtype=np.int64)
        positions[:rows] = layout.last_positions[requests]
        seq_lens = np.zeros(padded, dtype=np.int32)
        seq_lens[:rows] = positions[:rows] + 1
        starts = np.minimum(np.arange(padded + 1, dtype=np.int32), np.int32(rows))
        arrays = positions, seq_lens, starts, requests
        device_positions, device_seq_lens, device_starts, owners = upload(
            arrays, self.positions.device
        )
        self.positions[:padded] = device_positions
        self._seq_lens[:padded] = device_seq_lens
        self._seq_lens_cpu[:padded] = torch.from_numpy(seq_lens)
        self._starts[: padded + 1] = device_starts
        self._starts_cpu[: padded + 1] = torch.from_numpy(starts)
        self._slots[:, rows:padded] = compat.NO_SLOT
        for group, (buffer, table) in enumerate(
            zip(self._tables, attention.block_tables, strict=True)
        ):
            buffer[:rows] = table[owners]
            buffer[rows:padded] = 0
            self._slots[group, :rows] = compat.slots(
                table, attention.block_sizes[group], owners, device_positions[:rows]
            )

    def queries(self, rows: int, max_seq_len: int) -> Queries:
        """The staged batch with its padding."""
        return Queries(
            starts=self._starts[: rows + 1],
            starts_cpu=self._starts_cpu[: rows + 1],
            seq_lens=self._seq_lens[:rows],
            seq_lens_cpu=self._seq_lens_cpu[:rows],
            positions=self.positions[:rows],
            max_query_len=1,
            max_seq_len=max_seq_len,
        )

    def tables_of(self, rows: int) -> list[Tensor]:
        """Block tables by KV cache group, [rows, blocks]."""
        return [table[:rows] for table in self._tables]

    def slots_of(self, rows: int) -> list[Tensor]:
        """Slots by KV cache group, [rows]."""
        return list(self._slots[:, :rows].unbind())

    def ids_of(self, rows: int) -> Stream:
        """The token ids, input of the first segment."""
        return Stream(self._ids[:rows])

    def stream_of(self, rows: int) -> Stream:
        """The stream between two segments."""
        assert self._stream is not None, "stored by the first segment"
        return self._stream.rows(slice(0, rows))

    def final_of(self, rows: int) -> Tensor:
        """[rows, width], the LM head's input."""
        assert self._final is not None, "stored by the last segment"
        return self._final[:rows]

    def load(self, stream: Stream, is_ids: bool) -> None:
        """Copy in the stream of the staged rows, unless it is in the buffers already."""
        rows = slice(0, stream.num_rows)
        if is_ids:
            self._ids[rows] = stream.hidden
            return
        assert self._stream is not None, "stored by the first segment"
        if stream.hidden.data_ptr() != self._stream.hidden.data_ptr():
            self._stream.put(stream, rows)

    def store(self, stream: Stream, is_final: bool) -> None:
        """Keep a segment's output."""
        size = len(self.positions)
        if is_final:
            if self._final is None:
                self._final = stream.hidden.new_zeros(size, *stream.hidden.shape[1:])
            self._final[: stream.num_rows] = stream.hidden
            return
        if self._stream is None:
            self._stream = stream.zeros(size)
        self._stream.put(stream, slice(0, stream.num_rows))
