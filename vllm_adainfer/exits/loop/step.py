"""The requests of one step: who may exit, who is settled, who has exited."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.exits.batch.layout import RowLayout
from vllm_adainfer.transfers import upload

CPU = torch.device("cpu")
FULL_DEPTH = -1  # the threshold row of requests that run all layers
NOBODY = np.arange(0)


@dataclass(frozen=True)
class RecordedRequests:
    """Requests of a step whose states are kept; all of them run all layers, or are compared.

    They have places in the step's batch, int64 [recorded], the names of their kinds, as `computed`
    the token rows of each that the layers run, and as `subsets` the labels that each names of a
    label pool, see `promise.label_subsets`.
    """

    places: Ints
    kinds: Sequence[str]
    computed: Ints
    subsets: Ints


@dataclass(eq=False)
class StepContext:
    """The requests of one step, each named by its place in the batch that the step came with.

    Attributes:
        request_ids: vLLM's ids, by place.
        layout: the rows that the step came with; every request has some.
        yields_token: [requests], True where the last row yields a token (False: more chunks of the
            prompt follow).
        threshold_rows: [requests], see `Running.threshold_row`; `FULL_DEPTH` for those that
            must run all layers.
        continues: [requests], True for those that may be asked for another token.
        is_shadow: [requests], True for those that are decided at exit points if they may exit, but
            stay to full depth; None where there is no monitor.
        stays: [requests], True for those that are decided like others but run all layers, for the
            keys and values that others need; None if there are none.
        sampled_lens: [requests], how many of its last rows yield a token each, if more than one may
            (rows of drafts); None for one of each.
        all_rows_count: whether the final states of all rows are read, not only of sampled ones.
        device: the device of the rows.
        subsets: [requests], see `Running.subset`; None if no policy has a label pool.
        ends_early: [requests], True for those that are expected to end if they exit, though they
            may be asked for another token; None if there are none.
        pooled_from: [requests], the position from which on a pooled policy reads the prompt;
            negative for requests that none reads. None if the engine has no pooled policy.
        texts: [requests], see `Running.text`. None if no policy has a student.
        guessed: [requests], True for those that ask for an object whose guess stands behind the
            prompt, which ends in this step; None if the engine decides no objects.
        reads_values: [requests], see `Running.reads_values`; None if the engine decides no objects.
        guess_rows: [requests], see `Running.guess_rows`; None likewise.
        record_rows: [requests], see `Running.record_row`; None unless the engine records.
        recorded: requests whose states are kept beside serving; None if there are none.
        keeps_means: [requests], True for those of whose prompts the mean is kept likewise; None
            where nothing is recorded.
        shadow: the shadow requests that may exit; None where there is no monitor.
        left_at: int64 [requests], the index of the exit point where each has left; -1 for none.
        codes: int64 [requests], of each that asks for an object and may exit, its answer by the
            last exit point that was asked, see `ByField.code`; -1 for all others.
        value_logprobs: by request, of those whose objects are early and that read them: as in
            `DecidedObject`.

    """

    request_ids: Sequence[str]
    layout: RowLayout
    yields_token: Bools
    threshold_rows: Ints
    continues: Bools
    is_shadow: Bools | None = None
    stays: Bools | None = None
    sampled_lens: Ints | None = None
    all_rows_count: bool = False
    device: torch.device = CPU
    subsets: Ints | None = None
    ends_early: Bools | None = None
    pooled_from: Ints | None = None
    texts: Sequence[Sequence[int]] | None = None
    guessed: Bools | None = None
    reads_values: Bools | None = None
    guess_rows: Sequence[Sequence[int]] | None = None
    record_rows: Ints | None = None
    recorded: RecordedRequests | None = None
    keeps_means: Bools | None = None
    shadow: Ints | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Derive who may exit, and who of them may leave the stack."""
        self.num_requests = len(self.request_ids)
        self.num_sampled = int(np.count_nonzero(self.yields_token))
        self._may_exit = self._takes_early = self.yields_token & (self.threshold_rows >= 0)
        if self.is_shadow is not None:
            self.shadow = np.flatnonzero(self._may_exit & self.is_shadow)
            self._takes_early = self._may_exit & ~self.is_shadow
        self._may_leave = (
            self._takes_early if self.stays is None else self._takes_early & ~self.stays
        )
        self._num_may_exit = int(np.count_nonzero(self._may_exit))
        self._num_settled = 0
        self.left_at = np.full(self.num_requests, -1)
        self.codes = np.full(self.num_requests, -1)
        self.value_logprobs: dict[int, tuple[float, ...]] = {}
        self._settled, self._lacks_kv = np.zeros((2, self.num_requests), np.bool_)

    @property
    def drafted(self) -> Ints:
        """[requests], how many of its rows have a draft; they come last."""
        if self.sampled_lens is None:
            return np.zeros(self.num_requests, np.int64)
        return self.sampled_lens - 1

    def field_rows(self, requests: Ints, layout: RowLayout) -> Ints:
        """[requests, fields], the row of `layout` that each field of these is read at.

        All of `requests` ask for as many fields.
        """
        assert self.guess_rows is not None, "the engine decides objects"
        behind = np.array([self.guess_rows[request] for request in requests.tolist()])
        of_prompts = layout.last_rows(requests) - self.drafted[requests]
        rows: Ints = of_prompts[:, None] + behind
        return rows

    @property
    def exited(self) -> Ints:
        """Requests that have left the stack early."""
        return np.flatnonzero(self.left_at >= 0)

    @property
    def early_objects(self) -> Ints:
        """Those of them whose answers are objects."""
        return np.flatnonzero((self.left_at >= 0) & (self.codes >= 0))

    @property
    def lacking_kv(self) -> Ints:
        """Those of them whose rows lack keys and values in some layers."""
        return np.flatnonzero(self._lacks_kv)

    @property
    def is_open(self) -> bool:
        """Whether some request may exit and is not settled yet."""
        return self._num_settled < self._num_may_exit

    @property
    def num_shadow(self) -> int:
        """How many shadow requests may exit."""
        return 0 if self.shadow is None else len(self.shadow)

    def shadow_at_full_depth(self) -> Ints:
        """Shadow requests that yield a token in this step and may not exit."""
        if self.is_shadow is None:
            return NOBODY
        return np.flatnonzero(self.yields_token & self.is_shadow & ~self._may_exit)

    def may_leave(self) -> Ints:
        """Requests in the stack that may leave it, settled or not."""
        return np.flatnonzero(self._may_leave & (self.left_at < 0))

    def at_full_depth(self) -> Ints:
        """Requests that yield a token in this step and have not exited."""
        return np.flatnonzero(self.yields_token & (self.left_at < 0))

    def going_on(self) -> Ints:
        """Requests that have rows in later steps: of their prompts, or of tokens to come."""
        return np.flatnonzero(~self.yields_token | self.continues)

    def undecided(self) -> Ints:
        """Requests in the stack that may exit and are not settled yet."""
        return np.flatnonzero(self._may_exit & ~self._settled)

    def ready(self) -> Ints:
        """Settled requests that are still in the stack and may leave."""
        if not self._num_settled:
            return NOBODY
        return np.flatnonzero(self._settled & self._may_leave & (self.left_at < 0))

    def answered(self) -> Ints:
        """Settled requests, exited or not, without the shadow requests."""
        return np.flatnonzero(self._settled & self._takes_early)

    def settled(self, requests: Ints) -> Bools:
        """Whether the answer of each of `requests` is known."""
        return self._settled[requests]

    def ending(self, requests: Ints) -> Ints:
        """Those of `requests` that are expected to end if they exit."""
        ends = ~self.continues[requests]
        if self.ends_early is not None:
            ends |= self.ends_early[requests]
        return requests[ends]

    def settle(self, requests: Ints) -> None:
        """The answers of `requests`, which were undecided, are known."""
        self._settled[requests] = True
        self._num_settled += len(requests)

    def leave(self, requests: Ints, lacks_kv: bool, exit_index: int) -> None:
        """`requests` leave the stack; `lacks_kv` if they skip layers that write keys and values."""
        self.left_at[requests] = exit_index
        self._lacks_kv[requests] = lacks_kv

    def sampled_rows(self) -> Bools:
        """Whether each row that the step came with yields a token, [rows]."""
        rows = np.zeros(self.layout.num_rows, dtype=np.bool_)
        rows[self.layout.last_rows(np.flatnonzero(self.yields_token))] = True
        return rows

    def recorded_rows(self) -> int:
        """The rows of recorded requests of whose prompts the mean is kept."""
        if self.recorded is None or self.keeps_means is None:
            return 0
        places = self.recorded.places[self.keeps_means[self.recorded.places]]
        return int(self.layout.query_lens[places].sum())

    def on_device(self, *arrays: Ints | Bools) -> list[Tensor]:
        """`arrays` on the device of the rows."""
        return upload(arrays, self.device)
