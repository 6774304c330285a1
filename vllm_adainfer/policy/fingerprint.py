"""Whether served weights are those of the calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class WeightsFingerprint:
    """A short hash of up to 1,024 evenly spaced elements of every tensor of a checkpoint, by name.

    Of the checkpoint, not of the served parameters: those are stacked, and sharded over ranks.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is what the model is served in."""
        self._dtype = dtype
        self._samples: dict[str, bytes] = {}

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`weights` by name, as they are, noted on their way to the model."""
        for name, tensor in weights:
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 1024)][:1024].to("cpu", torch.float32)
            self._samples[name] = str(tensor.dtype).encode() + sample.numpy().tobytes()
            yield name, tensor

    @property
    def hexdigest(self) -> str:
        """Of those that have passed, whatever their order: 16 hex digits."""
        digest = hashlib.sha256(str(self._dtype).encode())
        for name in sorted(self._samples):
            digest.update(name.encode())
            digest.update(self._samples[name])
        return digest.hexdigest()[:16]
