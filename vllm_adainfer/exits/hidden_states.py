"""Hidden states between two layers, as vLLM's layers hand them on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HiddenStates:
    """The residual stream of some token rows, in one part or in two.

    vLLM's Llama layers leave their output for the next layer to add to the residual, which it does
    together with its norm in one kernel.

    Attributes:
        hidden: [rows, hidden size]; before the first layer the token ids, [rows].
        residual: [rows, hidden size], what `hidden` is still to be added to; None if nothing.

    """

    hidden: Tensor
    residual: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.hidden.shape[0]

    @property
    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Both parts, as layers take them."""
        return self.hidden, self.residual

    def combined(self) -> Tensor:
        """[rows, hidden size], the residual stream in one part."""
        return self.hidden if self.residual is None else self.hidden + self.residual

    def rows(self, rows: Tensor | slice) -> HiddenStates:
        """Some of the rows: a copy, or a view for a slice."""
        residual = None if self.residual is None else self.residual[rows]
        return HiddenStates(self.hidden[rows], residual)

    def clone(self) -> HiddenStates:
        """A copy, which keeps no larger tensor alive."""
        residual = None if self.residual is None else self.residual.clone()
        return HiddenStates(self.hidden.clone(), residual)

    def zeros(self, rows: int) -> HiddenStates:
        """`rows` rows of zeros, with these dtypes and in as many parts."""
        residual = self.residual
        if residual is not None:
            residual = residual.new_zeros(rows, *residual.shape[1:])
        return HiddenStates(self.hidden.new_zeros(rows, *self.hidden.shape[1:]), residual)

    def put(self, other: HiddenStates, rows: Tensor | slice) -> None:
        """Overwrite `rows` with those of `other`, which has as many parts."""
        self.hidden[rows] = other.hidden
        if self.residual is not None:
            assert other.residual is not None
            self.residual[rows] = other.residual

    @classmethod
    def cat(cls, states: Sequence[HiddenStates]) -> HiddenStates:
        """The rows of all, one after the other; all have as many parts."""
        residuals = [each.residual for each in states if each.residual is not None]
        return cls(
            torch.cat([each.hidden for each in states]),
            torch.cat(residuals) if residuals else None,
        )
