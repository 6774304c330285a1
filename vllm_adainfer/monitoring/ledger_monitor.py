"""The monitor of a policy under a ledger, which alone decides whether requests may exit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from typing_extensions import override

from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.monitoring.monitor import AnswerMonitor, MonitorStatus


class LedgerMonitor(AnswerMonitor):
    """Counts changed answers for the ledger and for the metrics; it closes nothing by itself."""

    def __init__(self, epsilons: Sequence[float], alpha: float) -> None:
        """See `Monitor`."""
        super().__init__(epsilons, alpha)
        self._misses = 0

    @override
    def observe(
        self, request_ids: Sequence[str], levels: Ints, disagreed: Bools
    ) -> list[MonitorStatus]:
        for level, differs in zip(levels.tolist(), disagreed.tolist(), strict=True):
            self._tally(level, 1, differs)
        self._misses += int(np.count_nonzero(disagreed))
        return []

    def take_misses(self) -> int:
        """The changed answers since the last call."""
        misses, self._misses = self._misses, 0
        return misses
