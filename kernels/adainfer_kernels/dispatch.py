"""Which twin runs. A forced choice that cannot run is an error, never replaced silently."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Literal

import torch

Implementation = Literal["auto", "triton", "torch"]


def resolve(implementation: Implementation, device: torch.device) -> Literal["triton", "torch"]:
    """The twin to run on tensors of `device`.

    Raises:
        ValueError: `implementation` is unknown.
        RuntimeError: Triton is forced where it cannot run.

    """
    if implementation == "torch":
        return "torch"
    if implementation == "auto":
        return "triton" if device.type == "cuda" and _has_triton() else "torch"
    if implementation != "triton":
        raise ValueError(
            f'implementation must be "auto", "triton" or "torch", got {implementation!r}'
        )
    if not _has_triton():
        raise RuntimeError(
            'implementation="triton" needs the package triton: pip install triton, or pass "torch"'
        )
    if device.type != "cuda" and not _interprets():
        raise RuntimeError(
            f'implementation="triton" cannot run on {device.type} tensors: move them to a GPU, '
            'pass "torch", or set TRITON_INTERPRET=1 before the first import, for tests'
        )
    return "triton"


def twin(implementation: str) -> ModuleType:
    """The module of a resolved implementation; imports Triton's at its first use."""
    return importlib.import_module(f"adainfer_kernels.{implementation}_probe")


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
