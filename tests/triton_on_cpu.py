"""Model Runner V2 without a GPU: vLLM's Triton kernels in Triton's interpreter.

vLLM 0.32 uses Triton on a CPU if Triton has a backend called ``cpu``, which the published wheels
have not (`vllm/triton_utils/importing.py`). The interpreter needs none, so an entry will do.
"""

from __future__ import annotations

import os
from types import SimpleNamespace


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_target(self) -> SimpleNamespace:
        return SimpleNamespace(backend="cpu")


class _Compiler:
    """What torch's inductor asks for the name of Triton's backend, for the key of its cache."""

    def __init__(self, target: SimpleNamespace) -> None:
        pass

    @staticmethod
    def supports_target(target: SimpleNamespace) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "interpreter"


class _Backend:
    driver = _Driver
    compiler = _Compiler


IS_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


def install_for_v2() -> None:
    """Call it before vLLM is imported, with ``TRITON_INTERPRET`` set."""
    if IS_V2 and os.environ.get("TRITON_INTERPRET") == "1":
        from triton.backends import backends

        backends["cpu"] = _Backend
