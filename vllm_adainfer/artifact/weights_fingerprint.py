"""A fingerprint of the weights: are the served ones those of the calibration?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class WeightsFingerprint:
    """A short hash of up to 1,024 evenly spaced elements of every tensor in a checkpoint.

    It covers the checkpoint, not the served parameters, which are stacked and sharded over ranks.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is the dtype the model is served in."""
        self._dtype = dtype
        self._samples: dict[str, bytes] = {}

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield `weights`, by name, unchanged, and sample them on their way to the model."""
        for name, tensor in weights:
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 1024)][:1024].to("cpu", torch.float32)
            self._samples[name] = str(tensor.dtype).encode() + sample.numpy().tobytes()
            yield name, tensor

    @property
    def names(self) -> set[str]:
        """Of the tensors that have passed."""
        return set(self._samples)

    def unlike(self, other: WeightsFingerprint) -> set[str]:
        """Names of the tensors that have passed and are not as in `other`."""
        return {n for n, sample in self._samples.items() if other._samples.get(n) != sample}

    @property
    def hexdigest(self) -> str:
        """16 hex digits, over the tensors that have passed in any order."""
        digest = hashlib.sha256(str(self._dtype).encode())
        for name in sorted(self._samples):
            digest.update(name.encode())
            digest.update(self._samples[name])
        return digest.hexdigest()[:16]
