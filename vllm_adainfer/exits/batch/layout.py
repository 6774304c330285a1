"""The token rows of a batch: which request each belongs to, and its position there."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vllm_adainfer.arrays import Ints


@dataclass(frozen=True)
class RowLayout:
    """Rows of one request are adjacent, with ascending positions; requests keep their order.

    A request is named by its place in the batch that the step came with.

    Attributes:
        query_lens: [requests], the number of rows of each; 0 for one that is not present.
        last_positions: [requests], the position of each request's last row in its sequence.

    """

    query_lens: Ints
    last_positions: Ints

    @cached_property
    def num_rows(self) -> int:
        """The number of rows in the batch."""
        return int(self.query_lens.sum())

    @cached_property
    def present(self) -> Ints:
        """Requests that have rows."""
        return np.flatnonzero(self.query_lens)

    @cached_property
    def ends(self) -> Ints:
        """[requests], the row after each request's last."""
        return np.cumsum(self.query_lens)

    @cached_property
    def row_requests(self) -> Ints:
        """[rows], the request of each row."""
        return np.repeat(np.arange(len(self.query_lens)), self.query_lens)

    @cached_property
    def positions(self) -> Ints:
        """[rows], the position of each row in its sequence."""
        before_last = self.ends[self.row_requests] - 1 - np.arange(self.num_rows)
        positions: Ints = self.last_positions[self.row_requests] - before_last
        return positions

    def last_rows(self, requests: Ints) -> Ints:
        """The last row of each of `requests`, which must be present."""
        rows: Ints = self.ends[requests] - 1
        return rows

    def rows_of(self, requests: Ints) -> Ints:
        """All rows of `requests`, in order."""
        wanted = np.zeros(len(self.query_lens), dtype=np.bool_)
        wanted[requests] = True
        return np.flatnonzero(wanted[self.row_requests])

    def last_only(self, counts: Ints | None = None) -> tuple[RowLayout, Ints]:
        """The last rows of each request that is present, and which rows these are.

        `counts` [requests] says how many, if the request has as many; by default one.
        """
        wanted = np.ones_like(self.query_lens) if counts is None else counts
        lens = np.minimum(self.query_lens, wanted)
        behind = self.ends[self.row_requests] - np.arange(self.num_rows)  # rows from here on
        rows = np.flatnonzero(behind <= lens[self.row_requests])
        return RowLayout(lens, self.last_positions), rows

    def only(self, requests: Ints) -> RowLayout:
        """`requests` with all of their rows, and no other request."""
        lens = np.zeros_like(self.query_lens)
        lens[requests] = self.query_lens[requests]
        return RowLayout(lens, self.last_positions)

    def part(self, rows: slice) -> RowLayout:
        """The rows in a slice, and no others."""
        first, end = self.ends - self.query_lens, self.ends
        kept_end = np.clip(end, rows.start, rows.stop)
        lens = kept_end - np.clip(first, rows.start, rows.stop)
        return RowLayout(lens, self.last_positions - (end - kept_end))

    def regroup(self, leaving: Ints, waiting: Ints | None = None) -> tuple[RowLayout, Ints]:
        """Take out the rows of `leaving`, and insert waiting rows before those of their requests.

        `waiting` [requests] is the number of rows that join each, at the positions right before
        those present; 0 for requests that leave. Returns the new layout, and for each of its rows
        the row that it was before. Rows that join are numbered on from the last row before, in
        order of their requests.
        """
        if waiting is None:
            waiting = np.zeros_like(self.query_lens)
        lens = self.query_lens + waiting
        lens[leaving] = 0
        layout = RowLayout(lens, self.last_positions)
        requests = layout.row_requests
        place = np.arange(layout.num_rows) - (layout.ends - lens)[requests]  # within the request
        joined = waiting[requests]
        first_waiting = self.num_rows + np.cumsum(waiting) - waiting
        first = self.ends - self.query_lens
        rows = np.where(
            place < joined, first_waiting[requests] + place, first[requests] + place - joined
        )
        return layout, rows
