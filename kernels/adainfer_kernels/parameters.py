"""The parameters of a probe: tuned lens, final norm and LM head. Each checks its own shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

NormKind = Literal["rms", "layer"]


@dataclass(frozen=True)
class Norm:
    """A norm over the hidden size; a ValueError if the shapes do not fit together.

    Attributes:
        kind: "rms" (RMSNorm), or "layer" (LayerNorm, which subtracts the mean first).
        weight: [hidden size], multiplies the normalised state; None means ones.
        bias: [hidden size], added last; None means zeros.
        eps: added to the mean square (to the variance for "layer") before the square root.

    """

    kind: NormKind
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Check the kind and the shapes."""
        if self.kind not in get_args(NormKind):
            raise ValueError(f'Norm.kind must be "rms" or "layer", got {self.kind!r}')
        size = self.hidden_size
        if size is not None:
            check_shape("Norm.weight", self.weight, size)
            check_shape("Norm.bias", self.bias, size)

    @property
    def hidden_size(self) -> int | None:
        """Hidden size of the states that it accepts; None means any."""
        tensor = self.bias if self.weight is None else self.weight
        return None if tensor is None else tensor.numel()


@dataclass(frozen=True)
class Lens:
    """A tuned lens (Belrose et al. 2023, arXiv 2303.08112).

    It adds ``hidden @ weight + bias`` to a hidden state, to predict the last layer's state.
    `weight` is [hidden size, hidden size]; the product is computed in its dtype. `bias` is [hidden
    size]; None means zeros. Shapes that do not fit together are a ValueError.
    """

    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes."""
        size = self.hidden_size
        check_shape("Lens.weight", self.weight, size, size)
        check_shape("Lens.bias", self.bias, size)

    @property
    def hidden_size(self) -> int:
        """Hidden size of the states that it accepts."""
        return self.weight.shape[0]


@dataclass(frozen=True)
class Head:
    """An LM head, or some of its rows: ``soft_cap(readout @ weight.T + bias) * scale``.

    Shapes that do not fit together, fewer than two rows, and numbers that are not positive are a
    ValueError.

    Attributes:
        weight: [n, hidden size], fp32, fp16 or bf16; one row per token. Slice off the padding rows
            of a padded head (a slice copies nothing).
        bias: [n], added to the products; None means zeros.
        soft_cap: scores become ``soft_cap * tanh(scores / soft_cap)``; None means no cap.
        scale: multiplies the scores, after the soft cap.

    """

    weight: Tensor
    bias: Tensor | None = None
    soft_cap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the shapes and the factors."""
        if self.weight.dim() != 2:
            raise ValueError(f"Head.weight must be [n, hidden size], got {list(self.weight.shape)}")
        check_shape("Head.bias", self.bias, self.size)
        if self.size < 2:
            raise ValueError(f"Head.weight needs at least two rows, got {self.size}")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"Head.soft_cap must be positive, got {self.soft_cap}")
        if not self.scale > 0:
            raise ValueError(f"Head.scale must be positive, got {self.scale}")

    @property
    def size(self) -> int:
        """Number of tokens that it scores."""
        return self.weight.shape[0]

    @property
    def hidden_size(self) -> int:
        """Hidden size of the states that it scores."""
        return self.weight.shape[1]

    def of_rows(self, rows: Tensor) -> Head:
        """A head with a copy of these rows alone, int64 [n]."""
        bias = None if self.bias is None else self.bias[rows]
        return Head(self.weight[rows], bias, self.soft_cap, self.scale)


def check_shape(name: str, tensor: Tensor | None, *shape: int) -> None:
    """Raise a ValueError unless `tensor` has this shape or is None."""
    if tensor is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have the shape {list(shape)}, got {list(tensor.shape)}")
