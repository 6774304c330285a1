"""Where vLLM's engine core first sees a request."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.v1.request import Request


def tell_scheduler_of_arrivals() -> None:
    """Let `EngineCore` call ``request_arrived`` of a scheduler that has it, with each new request.

    vLLM 0.32 builds a request in the thread that receives it (`EngineCore.preprocess_add_request`),
    beside the running step. The scheduler has no hook there: it gets requests between steps, where
    others wait.
    """
    from vllm.v1.engine.core import EngineCore

    stock = EngineCore.preprocess_add_request
    if hasattr(stock, "__wrapped__"):
        return

    @wraps(stock)
    def preprocess_add_request(core: Any, *args: Any, **kwargs: Any) -> tuple[Request, int]:
        request, wave = stock(core, *args, **kwargs)
        arrived = getattr(core.scheduler, "request_arrived", None)
        if arrived is not None:
            arrived(request)
        return request, wave

    EngineCore.preprocess_add_request = preprocess_add_request
