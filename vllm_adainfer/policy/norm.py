"""Norms as numbers: what a module multiplies, adds and divides by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True)
class Norm:
    """A norm over the hidden size.

    Attributes:
        kind: RMSNorm, or LayerNorm, which takes the mean off first.
        weight: [hidden size] that multiplies the result, None for ones.
        bias: [hidden size] that is added then, None for zeros.
        eps: added to the mean square before its root is taken.

    """

    kind: NormKind
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6
