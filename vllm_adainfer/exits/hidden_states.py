"""Hidden states between two layers, as vLLM's layers hand them on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HiddenStates:
    """What some token rows take from layer to layer.

    The residual stream is in one part or in two: vLLM's Llama layers leave their output for the
    next layer to add to the residual, which it does together with its norm in one kernel.

    Attributes:
        hidden: [rows, hidden size]; before the first layer the token ids, [rows].
        residual: [rows, hidden size], what `hidden` is still to be added to; None if nothing.
        per_layer: [rows, layers, size], for each layer of the model an input of its own, beside
            the stream (Gemma 4); None if layers have none.

    """

    hidden: Tensor
    residual: Tensor | None = None
    per_layer: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.hidden.shape[0]

    @property
    def stream(self) -> tuple[Tensor, Tensor | None]:
        """The residual stream, as layers take it."""
        return self.hidden, self.residual

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All tensors."""
        return self.hidden, self.residual, self.per_layer

    def combined(self) -> Tensor:
        """[rows, hidden size], the residual stream in one part."""
        return self.hidden if self.residual is None else self.hidden + self.residual

    def rows(self, rows: Tensor | slice) -> HiddenStates:
        """Some of the rows: a copy, or a view for a slice."""
        if isinstance(rows, slice):
            return self._each(lambda part: part[rows])
        # Copies whole rows: half the time of advanced indexing, on CPUs.
        return self._each(lambda part: part.index_select(0, rows))

    def clone(self) -> HiddenStates:
        """A copy, which keeps no larger tensor alive."""
        return self._each(torch.clone)

    def zeros(self, rows: int) -> HiddenStates:
        """`rows` rows of zeros, with these dtypes and in as many parts."""
        return self._each(lambda part: part.new_zeros(rows, *part.shape[1:]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> HiddenStates:
        hidden, *others = self.parts
        return HiddenStates(change(hidden), *(p if p is None else change(p) for p in others))

    def put(self, other: HiddenStates, rows: Tensor | slice) -> None:
        """Overwrite `rows` with those of `other`, which has as many parts."""
        for own, others in zip(self.parts, other.parts, strict=True):
            if own is not None:
                assert others is not None
                own[rows] = others

    @classmethod
    def cat(cls, states: Sequence[HiddenStates]) -> HiddenStates:
        """The rows of all, one after the other; all have as many parts."""
        parts = zip(*(each.parts for each in states), strict=True)
        hidden, *others = ([part for part in same if part is not None] for same in parts)
        return cls(torch.cat(hidden), *(torch.cat(part) if part else None for part in others))
