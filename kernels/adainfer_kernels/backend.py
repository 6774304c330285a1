"""Which backend runs. A backend that is asked for by name and cannot run is an error."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Literal

import torch

Backend = Literal["auto", "triton", "torch"]
_auto_is_torch = False


def use_torch() -> None:
    """Let "auto" stand for torch in this process, as where Triton's results are wrong."""
    global _auto_is_torch
    _auto_is_torch = True


def load_backend(
    backend: Backend, device: torch.device, of: Literal["probe", "pooling"] = "probe"
) -> ModuleType:
    """The module that runs on tensors of `device`, see `resolve_backend`; imports Triton late."""
    return importlib.import_module(f"adainfer_kernels.{resolve_backend(backend, device)}_{of}")


def resolve_backend(backend: Backend, device: torch.device) -> Literal["triton", "torch"]:
    """The backend that "auto" stands for on `device`, or `backend` itself if it can run there.

    Raises:
        ValueError: the backend is unknown.
        RuntimeError: "triton" is asked for where it cannot run.

    """
    if backend == "torch":
        return "torch"
    if backend == "auto":
        on_gpu = device.type == "cuda" and not _auto_is_torch
        return "triton" if on_gpu and _has_triton() else "torch"
    if backend != "triton":
        raise ValueError(f'backend must be "auto", "triton" or "torch", got {backend!r}')
    if not _has_triton():
        raise RuntimeError(
            'backend="triton" needs the package triton: pip install triton, or pass "torch"'
        )
    if device.type != "cuda" and not _interprets():
        raise RuntimeError(
            f'backend="triton" cannot run on {device.type} tensors: move them to a GPU, '
            'pass "torch", or set TRITON_INTERPRET=1 before the first import, for tests'
        )
    return "triton"


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
