"""Counters of a running engine, for those who hold an ``LLM``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_adainfer.errors import AdaInferError

if TYPE_CHECKING:
    from vllm import LLM


def stats(llm: LLM) -> dict[str, Any]:
    """Counters of a running engine, see `vllm_adainfer.exits.counters.ExitStats`.

    Raises:
        AdaInferError: the engine was started without vllm-adainfer configured.

    """
    try:
        counters, *_ = llm.collective_rpc("adainfer_stats")  # every rank counts the same
    except Exception as error:
        if "adainfer_stats" not in str(error):
            raise
        raise AdaInferError(
            "this engine runs without vllm-adainfer: pass "
            'additional_config={"adainfer": {"artifact": "DIR"}} to it'
        ) from error
    return dict(counters)
