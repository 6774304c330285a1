"""A pool of hidden states that are kept from one step to another."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.batch.upload import upload

FIRST_SIZE = 256  # rows; the size doubles whenever more are kept


class RowPool:
    """Keeps all rows in one tensor, so that any number goes in or out in one operation.

    Attributes:
        taken: the number of places in use.

    """

    taken = 0

    def __init__(self) -> None:
        self._free = np.arange(0)
        self._states: HiddenStates | None = None  # a row per place; the first `put` allocates them

    def free_places(self, count: int) -> Ints:
        """Take `count` places, [count]."""
        while len(self._free) < count:
            size = len(self._free) + self.taken
            self._free = np.concatenate([np.arange(size, 2 * size or FIRST_SIZE), self._free])
        places, self._free = self._free[:count], self._free[count:]
        self.taken += count
        return places

    def give_back(self, places: Ints) -> None:
        """Free `places`; their rows are no longer needed."""
        self._free = np.concatenate([places, self._free])
        self.taken -= len(places)

    def put(self, states: HiddenStates, places: Tensor) -> None:
        """Keep the rows of `states` at int64 `places`, both on the same device."""
        size = len(self._free) + self.taken
        if self._states is None:
            self._states = states.zeros(size)
        elif self._states.num_rows < size:
            more = states.zeros(size - self._states.num_rows)
            self._states = HiddenStates.cat([self._states, more])
        self._states.put(states, places)

    def take(self, places: Ints) -> HiddenStates:
        """A copy of the rows at `places`, which are free from then on."""
        assert self._states is not None, "rows are put in before they are taken out"
        [places_on_device] = upload((places,), self._states.device)
        states = self._states.rows(places_on_device)
        self.give_back(places)
        return states
