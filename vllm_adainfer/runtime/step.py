"""One step's bookkeeping on the host: whose rows are where, who may exit, who has left."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# New attention metadata take as long as the last layer of so many rows (see `CUT_WORK`).
MIN_ROWS_SPARED = 64


class Narrow(Protocol):
    """Builds what attention needs when it is not to see the whole batch."""

    def __call__(self, requests: Ints, rows: Tensor) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attention metadata and slot mapping, by layer, of some requests and their rows."""

    def last_rows(self, requests: Ints, rows: Tensor) -> dict[str, Any]:
        """Metadata, by layer, for a query from the last row of each request; K/V of all `rows`."""


class StepContext:
    """Requests of one step, named by their position in the batch, and their token rows.

    Rows of one request are adjacent, requests in order; the last row of a request is the one
    that is sampled (if its prompt is complete).
    """

    def __init__(
        self,
        query_lens: Ints,
        sampled: Bools,
        tags: Ints,
        narrow: Narrow,
        shadow: Bools | None = None,
        all_rows_count: bool = False,
    ) -> None:
        """Describe the batch.

        Args:
            query_lens: [requests], rows of each request in this step.
            sampled: [requests], True where this step yields a token (False: more chunks follow).
            tags: [requests], what `Admission` gave; negative runs at full depth.
            narrow: builds what attention needs when only some requests remain.
            shadow: [requests], True for those that, if they may exit, are decided but stay.
            all_rows_count: whether final states of rows that are not sampled are wanted.

        """
        self.num_requests = len(query_lens)
        self.num_sampled = int(np.count_nonzero(sampled))
        self._rows = int(query_lens.sum())  # in the batch as it is now
        self.tags = tags
        self._query_lens = query_lens
        self._sampled = sampled
        self._narrow = narrow
        self._all_rows_count = all_rows_count
        self._may_exit = self._may_leave = sampled & (tags >= 0)
        self.shadow: Ints | None = None
        if shadow is not None:
            self.shadow = np.flatnonzero(self._may_exit & shadow)
            self._may_leave = self._may_exit & ~shadow
        self._settled = np.zeros(self.num_requests, dtype=np.bool_)
        self._left = np.zeros(self.num_requests, dtype=np.bool_)
        self._last_row = np.cumsum(query_lens) - 1
        self._first_last_row = self._last_row
        self._origin: Tensor | None = None

    @property
    def left(self) -> Ints:
        """Requests that have left the stack early."""
        return np.flatnonzero(self._left)

    def settled(self, requests: Ints) -> Bools:
        """[requests], whether the answer of each is known."""
        return self._settled[requests]

    def undecided(self) -> Ints:
        """Requests in the stack that may exit and are not settled yet."""
        return np.flatnonzero(self._may_exit & ~self._settled)

    def sampled_rows(self, requests: Ints) -> Tensor:
        """Rows, in the batch as it is now, that decide `requests` (which must not have left)."""
        return torch.from_numpy(self._last_row[requests])

    def tags_by_row(self) -> Ints:
        """The tag of each row's request, in the batch as it came."""
        return np.repeat(self.tags, self._query_lens)

    def sampled_by_row(self) -> Bools:
        """Which rows yield a token, in the batch as it came."""
        rows = np.zeros(int(self._query_lens.sum()), dtype=np.bool_)
        rows[self._first_last_row[self._sampled]] = True
        return rows

    def settle(self, requests: Ints) -> None:
        """Note that the answers of `requests` are known."""
        self._settled[requests] = True

    def rows_ready_to_leave(self) -> int:
        """Rows of settled requests that are still in the batch and need not stay."""
        return int(self._query_lens[self._ready() & ~self._left].sum())

    def compact(self) -> tuple[int, Tensor]:
        """Let settled requests leave, but not shadow requests.

        Returns:
            how many left, and the rows of the batch as it was that stay.

        """
        before = ~self._left
        leaving = before & self._ready()
        stay = np.repeat(~leaving[before], self._query_lens[before])
        kept_rows = torch.from_numpy(np.flatnonzero(stay))
        self._rows = len(kept_rows)
        self._left = self._left | leaving
        lens = np.where(self._left, 0, self._query_lens)
        self._last_row = np.cumsum(lens) - 1
        self._origin = kept_rows if self._origin is None else self._origin[kept_rows]
        return int(np.count_nonzero(leaving)), kept_rows

    def _ready(self) -> Bools:
        return self._settled & self._may_leave

    def narrowed(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Attention metadata and slot mapping, by layer, of the requests that remain."""
        assert self._origin is not None
        return self._narrow(np.flatnonzero(~self._left), self._origin)

    def decisive_rows(self) -> tuple[Tensor, dict[str, Any] | None]:
        """Rows whose final states are wanted: the last one of each request that remains.

        Returns:
            rows of the batch as it is now, and attention metadata by layer for queries from
            these rows alone; None where the metadata are right as they are.

        """
        if self._all_rows_count or self._rows - self.num_requests < MIN_ROWS_SPARED:
            return torch.arange(self._rows), None
        remain = np.flatnonzero(~self._left)
        origin = torch.arange(self._rows) if self._origin is None else self._origin
        return self.sampled_rows(remain), self._narrow.last_rows(remain, origin)

    def original_rows(self, rows: Tensor) -> Tensor:
        """Where `rows` of the batch as it is now were in the batch as it came."""
        return rows if self._origin is None else self._origin[rows]

    def original_sampled_rows(self, requests: Ints) -> Tensor:
        """Rows, in the batch as it came, that decide `requests`."""
        return torch.from_numpy(self._first_last_row[requests])
