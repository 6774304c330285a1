from __future__ import annotations

import numpy as np
import torch

from vllm_adainfer.transfers import pack, unpack, upload

ARRAYS = [
    np.array([3, -1, 2**40]),
    np.array([True, False, True, True, False]),
    np.arange(20, dtype=np.int32)[::2],  # strided
    np.array([], dtype=np.int64),
    np.array([7], dtype=np.int32),
]


def test_arrays_of_several_dtypes_travel_in_one_piece():
    packed = torch.empty(1000, dtype=torch.uint8)
    pack(ARRAYS, packed)
    there = unpack(packed.clone(), ARRAYS)
    assert [tensor.tolist() for tensor in there] == [array.tolist() for array in ARRAYS]
    assert [tensor.dtype for tensor in there] == [
        torch.int64,
        torch.bool,
        torch.int32,
        torch.int64,
        torch.int32,
    ]


def test_on_a_cpu_nothing_is_copied():
    [tensor] = upload([ARRAYS[0]], torch.device("cpu"))
    assert tensor.data_ptr() == ARRAYS[0].ctypes.data
