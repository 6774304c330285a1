"""LoRA adapters follow their rows: vLLM's layers are told which adapter each row has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vllm_adainfer.engine import compat
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.layout import Ints, RowLayout
from vllm_adainfer.policy.adapter_fingerprint import adapter_fingerprint

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

NO_ADAPTER = 0  # vLLM numbers adapters from 1 on


def fingerprint_of(path: str) -> str | None:
    """The fingerprint of the adapter that vLLM loads from `path` or hub id; None if it is none."""
    try:
        return adapter_fingerprint(compat.adapter_directory(path))
    except (AdaInferError, OSError):
        return None  # vLLM fails to load it, too, and says why


class StepAdapters:
    """The adapters of a step's requests.

    vLLM maps adapters to the rows that a step comes with; here, to those that are left of them.
    """

    def __init__(self, manager: Any, adapters: Sequence[LoRARequest | None]) -> None:
        """Prepare to map rows.

        Args:
            manager: the worker's, vLLM's `LRUCacheWorkerLoRAManager`.
            adapters: that of each request of the step; None for the base model.

        """
        self._manager = manager
        self._numbers = np.array([NO_ADAPTER if a is None else a.lora_int_id for a in adapters])
        self._active = {adapter for adapter in adapters if adapter is not None}

    def of_rows(self, layout: RowLayout) -> RowAdapters:
        """For the layers, over the rows of `layout`."""
        rows, requests = self._numbers[layout.row_requests], self._numbers[layout.present]
        return RowAdapters(self, tuple(rows.tolist()), tuple(requests.tolist()))

    def use_for_logits(self, requests: Ints) -> None:
        """Let the LM head take the next rows for those of `requests`, one each."""
        numbers = tuple(self._numbers[requests].tolist())
        self.use(numbers, numbers)

    def use(self, rows: tuple[int, ...], requests: tuple[int, ...]) -> None:
        """Tell vLLM's layers the number of the adapter of each row, and of each request."""
        if rows:
            compat.use_adapters(self._manager, self._active, rows, requests)


@dataclass(frozen=True)
class RowAdapters:
    """The adapters of a batch's rows.

    Attributes:
        step: of all its requests.
        rows: [rows], the numbers of their adapters.
        requests: [requests], the same for those that have rows.

    """

    step: StepAdapters
    rows: tuple[int, ...]
    requests: tuple[int, ...]

    def use(self) -> None:
        """Let the layers apply them to the rows that they run next."""
        self.step.use(self.rows, self.requests)
