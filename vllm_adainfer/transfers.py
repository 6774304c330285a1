"""Copies between host and device: many small arrays in one, and none that stops the device."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.arrays import AnyArray

Arrays = Sequence[AnyArray]
ALIGNMENT = 16  # bytes; torch views of a dtype need a multiple of its size


class HostCopy:
    """A copy of a tensor on the host, which may still be on its way."""

    def __init__(self, values: Tensor) -> None:
        """Ask for a copy of `values` as they will be once the device has done its work so far."""
        self._arrived: torch.Event | None = None
        if values.device.type == "cpu":
            self._values = values
            return
        # From torch's pool, as in `upload_into`.
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        self._values.copy_(values, non_blocking=True)
        self._arrived = torch.Event(values.device)
        self._arrived.record()

    @property
    def has_arrived(self) -> bool:
        """Whether `tensor` would not wait."""
        return self._arrived is None or bool(self._arrived.query())

    def tensor(self) -> Tensor:
        """The copy; waits until it has arrived."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        return self._values

    def array(self) -> AnyArray:
        """The same as an array, of a dtype that NumPy has."""
        return self.tensor().numpy()


def upload(arrays: Arrays, device: torch.device) -> list[Tensor]:
    """Copy `arrays`, each [n], to `device` in one go, without waiting for the copy.

    On a CPU the tensors share the arrays' memory.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    packed = torch.empty(packed_size(arrays), dtype=torch.uint8, device=device)
    upload_into(arrays, packed)
    return unpack(packed, arrays)


def upload_into(arrays: Arrays, packed: Tensor) -> None:
    """Copy `arrays` to uint8 `packed` on a device in one go, without waiting; see `unpack`."""
    if packed.device.type == "cpu":
        pack(arrays, packed)
        return
    # From torch's pool of pinned memory, which reuses memory only once the copy is done.
    pinned = torch.empty(len(packed), dtype=torch.uint8, pin_memory=True)
    pack(arrays, pinned)
    packed.copy_(pinned, non_blocking=True)


def packed_size(arrays: Arrays) -> int:
    """The bytes that `arrays` take in one piece."""
    return _places(arrays)[-1]


def pack(arrays: Arrays, packed: Tensor) -> None:
    """Write `arrays` one after the other into uint8 `packed`."""
    target = packed.numpy()
    for array, start in zip(arrays, _places(arrays), strict=False):
        target[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8)


def unpack(packed: Tensor, arrays: Arrays) -> list[Tensor]:
    """Views of `packed`, each with the dtype and length of one of `arrays`."""
    return [
        packed[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype)
        for array, start in zip(arrays, _places(arrays), strict=False)
    ]


def _places(arrays: Arrays) -> list[int]:
    """The offset of each array in bytes, then the total size."""
    sizes = [-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays]
    places: list[int] = np.cumsum([0, *sizes]).tolist()
    return places
