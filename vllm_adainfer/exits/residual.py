"""The residual stream between two layers, as layers hand it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """The residual stream of some rows, in one part or in two.

    vLLM's Llama layers leave what the last of them has computed to be added by the next one,
    which does that and its norm in one kernel.

    Attributes:
        hidden: [rows, hidden size]; before the first layer the token ids, [rows].
        residual: the same, of which the stream is the sum with `hidden`; None if that is all.

    """

    hidden: Tensor
    residual: Tensor | None = None

    @property
    def num_rows(self) -> int:
        """How many there are."""
        return self.hidden.shape[0]

    @property
    def parts(self) -> tuple[Tensor, Tensor | None]:
        """Both, as layers take them."""
        return self.hidden, self.residual

    def whole(self) -> Tensor:
        """[rows, hidden size], in one part."""
        return self.hidden if self.residual is None else self.hidden + self.residual

    def rows(self, rows: Tensor | slice) -> Stream:
        """Some of the rows: a copy, or a view if they are a slice."""
        residual = None if self.residual is None else self.residual[rows]
        return Stream(self.hidden[rows], residual)

    def clone(self) -> Stream:
        """A copy, that keeps no larger tensor alive."""
        residual = None if self.residual is None else self.residual.clone()
        return Stream(self.hidden.clone(), residual)

    def zeros(self, rows: int) -> Stream:
        """So many rows of the same kind."""
        residual = self.residual
        if residual is not None:
            residual = residual.new_zeros(rows, *residual.shape[1:])
        return Stream(self.hidden.new_zeros(rows, *self.hidden.shape[1:]), residual)

    def put(self, other: Stream, rows: Tensor | slice) -> None:
        """Overwrite `rows` with those of `other`, in as many parts."""
        self.hidden[rows] = other.hidden
        if self.residual is not None:
            assert other.residual is not None
            self.residual[rows] = other.residual

    @classmethod
    def cat(cls, streams: Sequence[Stream]) -> Stream:
        """Rows of all, one after the other; all are in as many parts."""
        residuals = [stream.residual for stream in streams if stream.residual is not None]
        return cls(
            torch.cat([stream.hidden for stream in streams]),
            torch.cat(residuals) if residuals else None,
        )
