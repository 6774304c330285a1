"""Whose token rows are where in a batch, and at which positions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RowLayout:
    """Rows of one request are adjacent, requests in order; positions run up to the last row's.

    Requests are named by their place in the step's original batch.

    Attributes:
        lens: [requests], rows of each; 0 for one that is not present.
        last_positions: [requests], the position of each request's last row in its sequence.

    """

    lens: Ints
    last_positions: Ints

    @cached_property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return int(self.lens.sum())

    @cached_property
    def present(self) -> Ints:
        """Requests that have rows."""
        return np.flatnonzero(self.lens)

    @cached_property
    def ends(self) -> Ints:
        """[requests], the row after each request's last."""
        return np.cumsum(self.lens)

    @cached_property
    def row_requests(self) -> Ints:
        """[rows], the request of each row."""
        return np.repeat(np.arange(len(self.lens)), self.lens)

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
        wanted = np.zeros(len(self.lens), dtype=np.bool_)
        wanted[requests] = True
        return np.flatnonzero(wanted[self.row_requests])

    def last_only(self) -> RowLayout:
        """The last row of each request that is present."""
        return RowLayout((self.lens > 0).astype(np.int64), self.last_positions)

    def only(self, requests: Ints) -> RowLayout:
        """`requests` with all of their rows, and no other request."""
        lens = np.zeros_like(self.lens)
        lens[requests] = self.lens[requests]
        return RowLayout(lens, self.last_positions)

    def part(self, rows: slice) -> RowLayout:
        """The rows in a slice, and no others."""
        first, end = self.ends - self.lens, self.ends
        kept_end = np.clip(end, rows.start, rows.stop)
        lens = kept_end - np.clip(first, rows.start, rows.stop)
        return RowLayout(lens, self.last_positions - (end - kept_end))

    def regroup(self, leaving: Ints, waiting: Ints) -> tuple[RowLayout, Ints]:
        """Take the rows of `leaving` out, and put rows that waited before those of their request.

        Args:
            leaving: requests that go.
            waiting: [requests], how many rows join each; their positions come right before those
                present. 0 for those that leave.

        Returns:
            the new layout, and for each of its rows the row it was before; rows that waited are
            numbered on from the last row before, in order of their requests.

        """
        lens = self.lens + waiting
        lens[leaving] = 0
        layout = RowLayout(lens, self.last_positions)
        requests = layout.row_requests
        place = np.arange(layout.num_rows) - (layout.ends - lens)[requests]  # within the request
        joined = waiting[requests]
        first_waiting = self.num_rows + np.cumsum(waiting) - waiting
        first = self.ends - self.lens
        rows = np.where(
            place < joined, first_waiting[requests] + place, first[requests] + place - joined
        )
        return layout, rows
