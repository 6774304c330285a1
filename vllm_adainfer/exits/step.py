"""One step's bookkeeping on the host: whose rows are where, who may exit, who has left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.exits.layout import Bools, Ints, RowLayout
from vllm_adainfer.exits.transfer import upload

# New attention metadata take as long as the last layer of so many rows (see `CUT_WORK`).
MIN_ROWS_SPARED = {"cpu": 64, "cuda": 2048}
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Rows:
    """Where the rows of a batch are.

    Attributes:
        positions: int64 [rows], in their sequences.
        slots: int64 [rows] by layer, where in the cache their keys and values belong.

    """

    positions: Tensor
    slots: dict[str, Tensor]


class Narrow(Protocol):
    """Builds what layers need when they are not to see the batch as it came."""

    def __call__(self, layout: RowLayout) -> tuple[Rows, dict[str, Any]]:
        """Rows and attention metadata, by layer, for the rows of `layout`."""

    def rows(self, layout: RowLayout) -> Rows:
        """The rows of `layout` alone."""


class StepContext:
    """Requests of one step, named by their place in the batch, and their token rows.

    The last row of a request is the one that is sampled (if its prompt is complete).
    """

    def __init__(
        self,
        request_ids: Sequence[str],
        layout: RowLayout,
        sampled: Bools,
        tags: Ints,
        goes_on: Bools,
        narrow: Narrow,
        shadow: Bools | None = None,
        all_rows_count: bool = False,
        device: torch.device = CPU,
    ) -> None:
        """Describe the batch.

        Args:
            request_ids: vLLM's, by place.
            layout: rows of each request in this step; every request has some.
            sampled: [requests], True where this step yields a token (False: more chunks follow).
            tags: [requests], what `Admission` gave; negative runs at full depth.
            goes_on: [requests], True for those that may be asked for another token after this.
            narrow: builds what attention needs when only some requests remain.
            shadow: [requests], True for those that, if they may exit, are decided but stay.
            all_rows_count: whether final states of rows that are not sampled are wanted.
            device: of the rows.

        """
        self.request_ids = request_ids
        self.num_requests = len(request_ids)
        self.num_sampled = int(np.count_nonzero(sampled))
        self.layout = layout  # of the batch as it is now
        self.tags = tags
        self.goes_on = goes_on
        self.device = device
        self._came = layout
        self._sampled = sampled
        self.narrow = narrow
        self._all_rows_count = all_rows_count
        self._may_exit = self._may_leave = sampled & (tags >= 0)
        self.shadow: Ints | None = None
        if shadow is not None:
            self.shadow = np.flatnonzero(self._may_exit & shadow)
            self._may_leave = self._may_exit & ~shadow
        self._settled = np.zeros(self.num_requests, dtype=np.bool_)
        self._left = np.zeros(self.num_requests, dtype=np.bool_)
        # Where each row was in the batch as it came, negative for one that joined; None: there.
        self._origin: Ints | None = None

    @property
    def as_it_came(self) -> bool:
        """Whether the batch has the rows that it came with."""
        return self._origin is None

    @property
    def left(self) -> Ints:
        """Requests that have left the stack early."""
        return np.flatnonzero(self._left)

    def stayed(self) -> Ints:
        """Requests that are sampled in this step and have not left."""
        return np.flatnonzero(self._sampled & ~self._left)

    def settled(self, requests: Ints) -> Bools:
        """[requests], whether the answer of each is known."""
        return self._settled[requests]

    def undecided(self) -> Ints:
        """Requests in the stack that may exit and are not settled yet."""
        return np.flatnonzero(self._may_exit & ~self._settled)

    def on_device(self, *arrays: Ints | Bools) -> list[Tensor]:
        """`arrays` where the rows are."""
        return upload(arrays, self.device)

    def sampled_rows(self, requests: Ints) -> Ints:
        """Rows, in the batch as it is now, that decide `requests` (which must not have left)."""
        return self.layout.last_rows(requests)

    def tags_by_row(self) -> Ints:
        """The tag of each row's request, in the batch as it came."""
        return self.tags[self._came.owners]

    def sampled_by_row(self) -> Bools:
        """Which rows yield a token, in the batch as it came."""
        rows = np.zeros(self._came.num_rows, dtype=np.bool_)
        rows[self._came.last_rows(np.flatnonzero(self._sampled))] = True
        return rows

    def settle(self, requests: Ints) -> None:
        """Note that the answers of `requests` are known."""
        self._settled[requests] = True

    def ready(self) -> Ints:
        """Settled requests that are still in the batch and need not stay."""
        return np.flatnonzero(self._settled & self._may_leave & ~self._left)

    def answered(self) -> Ints:
        """Settled requests whether they have left or not, but not shadow requests."""
        return np.flatnonzero(self._settled & self._may_leave)

    def regroup(self, leaving: Ints, waiting: Ints | None = None) -> Tensor:
        """Let requests leave, and rows that waited for their requests to go on join the batch.

        Args:
            leaving: requests, all of them ready.
            waiting: [requests], see `RowLayout.regroup`; None if no row joins.

        Returns:
            rows of the batch as it was that make up the batch now, see `RowLayout.regroup`.

        """
        if waiting is None:
            waiting = np.zeros_like(self.layout.lens)
        before = self.layout.num_rows
        self.layout, rows = self.layout.regroup(leaving, waiting)
        self._left[leaving] = True
        origin = np.full(before + int(waiting.sum()), -1)
        origin[:before] = np.arange(before) if self._origin is None else self._origin
        self._origin = origin[rows]
        [rows_on_device] = self.on_device(rows)
        return rows_on_device

    def narrowed_to(self, layout: RowLayout) -> tuple[Rows, dict[str, Any]]:
        """Rows and attention metadata, by layer, of a batch with the rows of `layout`."""
        return self.narrow(layout)

    def rows(self, layout: RowLayout) -> Rows:
        """Where the rows of `layout` are."""
        return self.narrow.rows(layout)

    def decisive(self) -> RowLayout | None:
        """The last row of each request that remains: those whose final states are wanted.

        None if all are, or are not so many more that leaving them out pays.
        """
        spared = self.layout.num_rows - len(self.layout.here)
        if self._all_rows_count or spared < MIN_ROWS_SPARED[self.device.type]:
            return None
        return self.layout.last_only()

    def put_back(self, states: Tensor, requests: Ints | None, whole: Tensor) -> None:
        """Copy `states` of the batch as it is now to their rows of the one that came.

        They are of the last row of each of `requests`, or of all rows. Rows that joined are of no
        use to anybody.
        """
        origin = np.arange(self.layout.num_rows) if self._origin is None else self._origin
        if requests is not None:
            origin = origin[self.layout.last_rows(requests)]
        came = np.flatnonzero(origin >= 0)
        here, there = self.on_device(came, origin[came])
        whole[there] = states[here]

    def original_sampled_rows(self, requests: Ints) -> Ints:
        """Rows, in the batch as it came, that decide `requests`."""
        return self._came.last_rows(requests)
