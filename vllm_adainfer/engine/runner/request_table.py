"""The running requests as steps read them: a table with a column for each property."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from vllm_adainfer.arrays import Ints
from vllm_adainfer.engine.admission.running import Running

ROOM = 64  # requests, at first


class Columns(NamedTuple):
    """Fields of `Running`, int64 [requests] each; `prompt_tokens` is the length of the prompt."""

    prompt_tokens: Ints
    max_tokens: Ints
    certified_tokens: Ints
    threshold_row: Ints
    last_token_row: Ints
    pooled_from: Ints
    subset: Ints
    record_row: Ints
    force_full_depth_prefill: Ints
    answers_stand: Ints
    has_choice_policy: Ints
    guessed: Ints
    reads_values: Ints
    is_shadow: Ints
    wants_prompt_logprobs: Ints


_fields = attrgetter(*Columns._fields[1:])


class RequestTable:
    """A row of numbers for each running request, so that a step gathers them all at once."""

    def __init__(self) -> None:
        self._numbers = np.zeros((len(Columns._fields), ROOM), np.int64)
        self._places: dict[str, int] = {}
        self._free = list(range(ROOM))

    def put(self, request_id: str, request: Running) -> None:
        """Add a request, or write it anew."""
        place = self._places.get(request_id)
        if place is None:
            if not self._free:
                room = self._numbers.shape[1]
                self._numbers = np.pad(self._numbers, ((0, 0), (0, room)))
                self._free = list(range(room, 2 * room))
            place = self._places[request_id] = self._free.pop()
        self._numbers[:, place] = len(request.prompt), *_fields(request)

    def drop(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        place = self._places.pop(request_id, None)
        if place is not None:
            self._free.append(place)

    def of(self, request_ids: Sequence[str]) -> Columns:
        """The columns of some requests, in a copy that may be changed."""
        places = list(map(self._places.__getitem__, request_ids))
        return Columns(*self._numbers.take(places, axis=1))
