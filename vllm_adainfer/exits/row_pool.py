"""Rows of the residual stream that are kept from one step to another."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vllm_adainfer.exits.layout import Ints
from vllm_adainfer.exits.residual import Stream

FIRST_SIZE = 256  # rows; it doubles where more are kept


class RowPool:
    """One tensor for all of them, so that any number is put in, or taken out, in one operation.

    Attributes:
        taken: places that are not free.

    """

    taken = 0

    def __init__(self) -> None:
        self._free = np.arange(0)
        self._stream: Stream | None = None  # with a row for each place, made by the first `put`

    def free_places(self, count: int) -> Ints:
        """Take so many places, [count]."""
        while len(self._free) < count:
            size = len(self._free) + self.taken
            self._free = np.concatenate([np.arange(size, 2 * size or FIRST_SIZE), self._free])
        places, self._free = self._free[:count], self._free[count:]
        self.taken += count
        return places

    def give_back(self, places: Ints) -> None:
        """Free `places`; what is there is not needed any more."""
        self._free = np.concatenate([places, self._free])
        self.taken -= len(places)

    def put(self, stream: Stream, places: Tensor) -> None:
        """Keep the rows of `stream` at int64 `places`, on their device."""
        size = len(self._free) + self.taken
        if self._stream is None:
            self._stream = stream.zeros(size)
        elif self._stream.num_rows < size:
            more = stream.zeros(size - self._stream.num_rows)
            self._stream = Stream.cat([self._stream, more])
        self._stream.put(stream, places)

    def rows(self, places: Tensor) -> Stream:
        """A copy of the rows at `places`."""
        assert self._stream is not None, "put in before they are taken out"
        return self._stream.rows(places)
