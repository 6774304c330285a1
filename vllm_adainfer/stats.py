"""Counters of executed work: rows x layers are counted where layers execute."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_adainfer.decision.monitor import DisagreementMonitor


@dataclass
class ExitStats:
    """What one engine has run since it started.

    Attributes:
        tokens_decided: tokens sampled, at any depth.
        layers_run: rows x layers executed.
        layers_possible: rows x layers that full depth would have executed.
        passes_run: layers entered, with however many rows: weights are read once for each.
        passes_possible: layers that full depth would have entered.
        exit_histogram: tokens sampled by the number of layers they ran.
        shadow: what shadow requests have shown, None (and no key) where `shadow_rate` is 0.

    """

    tokens_decided: int = 0
    layers_run: int = 0
    layers_possible: int = 0
    passes_run: int = 0
    passes_possible: int = 0
    exit_histogram: Counter[int] = field(default_factory=Counter)
    shadow: DisagreementMonitor | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, so that they can cross a process border."""
        counters = {
            "tokens_decided": self.tokens_decided,
            "layers_run": self.layers_run,
            "layers_possible": self.layers_possible,
            "passes_run": self.passes_run,
            "passes_possible": self.passes_possible,
            "exit_histogram": dict(sorted(self.exit_histogram.items())),
        }
        return counters if self.shadow is None else {**counters, "shadow": self.shadow.as_dict()}


def stats(llm: LLM) -> dict[str, Any]:
    """Counters of a running engine, see `ExitStats` for the keys.

    Raises:
        AdaInferError: the engine was started without vllm-adainfer configured.

    """
    from vllm_adainfer.errors import AdaInferError

    try:
        [counters] = llm.collective_rpc("adainfer_stats")
    except Exception as error:
        if "adainfer_stats" not in str(error):
            raise
        raise AdaInferError(
            "this engine runs without vllm-adainfer: pass "
            'additional_config={"adainfer": {"artifact": "DIR"}} to it'
        ) from error
    return dict(counters)
