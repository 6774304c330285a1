"""One step's bookkeeping on the host: whose rows are where, who may exit, who has exited."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.exits.layout import Bools, Ints, RowLayout
from vllm_adainfer.exits.transfer import upload

# Regrouping a batch (new rows, new attention metadata) takes as long as running so many rows x
# layers, by the type of device. On CPUs 6 to 60 were measured with a 135M model; a larger model's
# layers take longer, so fewer rows are worth it. The number for GPUs is an estimate from what a 1B
# model's layers and a dozen launches should take.
REGROUP_COST = {"cpu": 64, "cuda": 2048}
CPU = torch.device("cpu")
NOBODY = np.arange(0)


class StepContext:
    """The requests of one step, named by their place in the batch, and their token rows.

    The last row of a request is the one that is sampled, if its prompt is complete. The original
    batch is the one that the step came with.

    Attributes:
        layout: of the batch as it is now.
        shadow: requests that are decided at exit points but stay to full depth; None where nobody
            watches.

    """

    def __init__(
        self,
        request_ids: Sequence[str],
        layout: RowLayout,
        sampled: Bools,
        tags: Ints,
        continues: Bools,
        shadow: Bools | None = None,
        all_rows_count: bool = False,
        device: torch.device = CPU,
        subsets: Ints | None = None,
        ends_early: Bools | None = None,
    ) -> None:
        """Describe the original batch.

        Args:
            request_ids: vLLM's, by place.
            layout: rows of each request in this step; every request has some.
            sampled: [requests], True where this step yields a token (False: more chunks follow).
            tags: [requests], from `Admission.tag`; a negative one runs at full depth.
            continues: [requests], True for those that may be asked for another token.
            shadow: [requests], True for shadow requests.
            all_rows_count: whether final states are wanted of rows that are not sampled, too.
            device: of the rows.
            subsets: [requests], from `Admission.subset`; None if no policy has a label pool.
            ends_early: [requests], True for those that are expected to end if they leave, though
                they may be asked for another token; None if all that may be will be.

        """
        self.request_ids = request_ids
        self.num_requests = len(request_ids)
        self.num_sampled = int(np.count_nonzero(sampled))
        self.layout = layout
        self.tags = tags
        self.subsets = subsets
        self.continues = continues
        self._ends_early = ends_early
        self.device = device
        self._original = layout
        self._sampled = sampled
        self._all_rows_count = all_rows_count
        self._may_exit = self._may_leave = sampled & (tags >= 0)
        self.shadow: Ints | None = None
        if shadow is not None:
            self.shadow = np.flatnonzero(self._may_exit & shadow)
            self._may_leave = self._may_exit & ~shadow
        self._settled = np.zeros(self.num_requests, dtype=np.bool_)
        self._num_settled = 0
        self._num_may_exit = int(np.count_nonzero(self._may_exit))
        self._exited = np.zeros(self.num_requests, dtype=np.bool_)
        self._has_all_kv = np.zeros(self.num_requests, dtype=np.bool_)
        # The original row of each row, negative for one that joined; None if nothing has changed.
        self._origin: Ints | None = None

    @property
    def is_original(self) -> bool:
        """Whether the batch still has the rows that it came with."""
        return self._origin is None

    @property
    def exited(self) -> Ints:
        """Requests that have left the stack early."""
        return np.flatnonzero(self._exited)

    @property
    def lacking_kv(self) -> Ints:
        """Those of them whose rows lack keys and values in some layers."""
        return np.flatnonzero(self._exited & ~self._has_all_kv)

    def note_all_kv(self, requests: Ints) -> None:
        """Note that the layers which rows of `requests` have left out write none."""
        self._has_all_kv[requests] = True

    def at_full_depth(self) -> Ints:
        """Requests that are sampled in this step and have not exited."""
        return np.flatnonzero(self._sampled & ~self._exited)

    def going_on(self) -> Ints:
        """Requests of which later steps run rows: of their prompts, or of tokens to come."""
        return np.flatnonzero(~self._sampled | self.continues)

    def settled(self, requests: Ints) -> Bools:
        """[requests], whether the answer of each is known."""
        return self._settled[requests]

    @property
    def is_open(self) -> bool:
        """Whether a request may exit that is not settled yet."""
        return self._num_settled < self._num_may_exit

    def undecided(self) -> Ints:
        """Requests in the stack that may exit and are not settled yet."""
        return np.flatnonzero(self._may_exit & ~self._settled)

    def on_device(self, *arrays: Ints | Bools) -> list[Tensor]:
        """`arrays` on the device of the rows."""
        return upload(arrays, self.device)

    def sampled_rows(self, requests: Ints) -> Ints:
        """Rows of the batch as it is now that decide `requests`, which must not have exited."""
        return self.layout.last_rows(requests)

    def original_sampled_rows(self, requests: Ints) -> Ints:
        """Rows of the original batch that decide `requests`."""
        return self._original.last_rows(requests)

    def original_tags(self) -> Ints:
        """[rows], the tag of each original row's request."""
        return self.tags[self._original.row_requests]

    def original_sampled(self) -> Bools:
        """[rows], whether each original row yields a token."""
        rows = np.zeros(self._original.num_rows, dtype=np.bool_)
        rows[self._original.last_rows(np.flatnonzero(self._sampled))] = True
        return rows

    def settle(self, requests: Ints) -> None:
        """Note that the answers of `requests`, which were undecided, are known."""
        self._settled[requests] = True
        self._num_settled += len(requests)

    def ready(self) -> Ints:
        """Settled requests that are still in the batch and need not stay."""
        if not self._num_settled:
            return NOBODY
        return np.flatnonzero(self._settled & self._may_leave & ~self._exited)

    def answered(self) -> Ints:
        """Settled requests, exited or not, without the shadow requests."""
        return np.flatnonzero(self._settled & self._may_leave)

    def rows_spared(self, leaving: Ints, defers: bool) -> int:
        """Rows of requests `leaving` that run no further layer.

        Where layers are deferred, rows of a request that goes on will run them later.
        """
        if defers:
            goes_on = self.continues[leaving]
            if self._ends_early is not None:
                goes_on = goes_on & ~self._ends_early[leaving]
            leaving = leaving[~goes_on]
        return int(self.layout.lens[leaving].sum())

    def regroup(self, leaving: Ints, waiting: Ints | None = None) -> Tensor:
        """Let requests leave, and let rows that waited join the rows of their requests.

        Args:
            leaving: requests that leave.
            waiting: [requests], see `RowLayout.regroup`; None if no row joins.

        Returns:
            the rows of the batch before that make up the batch now, see `RowLayout.regroup`.

        """
        if waiting is None:
            waiting = np.zeros_like(self.layout.lens)
        before = self.layout.num_rows
        self.layout, rows = self.layout.regroup(leaving, waiting)
        self._exited[leaving] = True
        origin = np.full(before + int(waiting.sum()), -1)
        origin[:before] = np.arange(before) if self._origin is None else self._origin
        self._origin = origin[rows]
        [rows_on_device] = self.on_device(rows)
        return rows_on_device

    def keep_last_rows(self, layers: int) -> Tensor | None:
        """Leave only the last row of each remaining request, whose final state alone is wanted.

        Args:
            layers: that the other rows are spared.

        Returns:
            the rows of the batch before that make up the batch now; None, and nothing is done, if
            all rows are wanted, or if leaving the others out is not worth a regrouping.

        """
        spared = (self.layout.num_rows - len(self.layout.present)) * layers
        if self._all_rows_count or spared < REGROUP_COST[self.device.type]:
            return None
        rows = self.layout.last_rows(self.layout.present)
        self.layout = self.layout.last_only()
        self._origin = rows if self._origin is None else self._origin[rows]
        [rows_on_device] = self.on_device(rows)
        return rows_on_device

    def scatter(self, states: Tensor, output: Tensor) -> None:
        """Copy `states` of the batch as it is now to their original rows of `output`.

        Rows that joined have no original row and are dropped.
        """
        origin = np.arange(self.layout.num_rows) if self._origin is None else self._origin
        kept = np.flatnonzero(origin >= 0)
        source, target = self.on_device(kept, origin[kept])
        output[target] = states[source]
