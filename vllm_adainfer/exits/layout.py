"""Whose token rows are where in a batch, and which positions they have."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RowLayout:
    """Rows of one request are adjacent, requests in order; its positions run up to its last one.

    Requests are named by their place in the step's batch as it came.

    Attributes:
        lens: [requests], rows of each; 0 for one that is not here.
        last_positions: [requests], position of each one's last row in its sequence.

    """

    lens: Ints
    last_positions: Ints

    @cached_property
    def num_rows(self) -> int:
        """Rows in the batch."""
        return int(self.lens.sum())

    @cached_property
    def here(self) -> Ints:
        """Requests that have rows."""
        return np.flatnonzero(self.lens)

    @cached_property
    def ends(self) -> Ints:
        """[requests], the row after each one's last."""
        return np.cumsum(self.lens)

    @cached_property
    def owners(self) -> Ints:
        """[rows], the request of each row."""
        return np.repeat(np.arange(len(self.lens)), self.lens)

    @cached_property
    def positions(self) -> Ints:
        """[rows], the position of each row in its sequence."""
        behind = self.ends[self.owners] - 1 - np.arange(self.num_rows)
        positions: Ints = self.last_positions[self.owners] - behind
        return positions

    def last_rows(self, requests: Ints) -> Ints:
        """The last row of each of `requests`, which must be here."""
        rows: Ints = self.ends[requests] - 1
        return rows

    def rows_of(self, requests: Ints) -> Ints:
        """All rows of `requests`, in order."""
        wanted = np.zeros(len(self.lens), dtype=np.bool_)
        wanted[requests] = True
        return np.flatnonzero(wanted[self.owners])

    def last_only(self) -> RowLayout:
        """The last row of each request that is here."""
        return RowLayout((self.lens > 0).astype(np.int64), self.last_positions)

    def only(self, requests: Ints) -> RowLayout:
        """`requests` with the rows they have here, and nobody else."""
        lens = np.zeros_like(self.lens)
        lens[requests] = self.lens[requests]
        return RowLayout(lens, self.last_positions)

    def part(self, rows: slice) -> RowLayout:
        """Its rows from one up to another, and nobody else's."""
        first, end = self.ends - self.lens, self.ends
        kept_end = np.clip(end, rows.start, rows.stop)
        lens = kept_end - np.clip(first, rows.start, rows.stop)
        return RowLayout(lens, self.last_positions - (end - kept_end))

    def regroup(self, leaving: Ints, waiting: Ints) -> tuple[RowLayout, Ints]:
        """Without the rows of `leaving`, and with rows that waited before those of their request.

        Args:
            leaving: requests that go.
            waiting: [requests], how many rows join each; their positions come right before those
                it has here. 0 for those that leave.

        Returns:
            the new layout, and for each of its rows the row it was here; rows that waited are
            numbered on from the last row here, in order of their requests.

        """
        lens = self.lens + waiting
        lens[leaving] = 0
        layout = RowLayout(lens, self.last_positions)
        owners = layout.owners
        place = np.arange(layout.num_rows) - (layout.ends - lens)[owners]  # among its request's
        joined = waiting[owners]
        first_waiting = self.num_rows + np.cumsum(waiting) - waiting
        first_here = self.ends - self.lens
        rows = np.where(
            place < joined, first_waiting[owners] + place, first_here[owners] + place - joined
        )
        return layout, rows
