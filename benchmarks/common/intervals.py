"""Shares and means with their 95 % intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.stats import t

from vllm_adainfer.arrays import Floats
from vllm_adainfer.offline.reports.shares import TAIL, Interval, clopper_pearson, spelled
from vllm_adainfer.offline.reports.speedup import Speedup

OFF = 0.05  # a control further than this from 1 says that the host, not exits, moved the ratios


def share_of(value: float, rows: int, digits: int = 1) -> str:
    """A share of independent rows, with its interval.

    Also for a mean of rows that are between 0 and 1 each, such as the layers that they save: the
    interval is then that of rows which are 0 or 1, which is wider than it need be.
    """
    return spelled(value, clopper_pearson(value * rows, rows), digits)


def shares_of(stock: float, ours: float, rows: int) -> str:
    """The shares of stock vLLM and of ours on the same rows."""
    return f"{share_of(stock, rows)} / {share_of(ours, rows)}"


def control(never: Speedup) -> str:
    """The speed of never exiting, which saves next to nothing: what else moved the ratios."""
    return never.text + ", **off**" * (abs(never.value - 1) > OFF)


def never_exiting(report: Mapping[str, Any]) -> str:
    """The control of a report; older reports have none."""
    return control(Speedup.read(report, "never_exit")) if "never_exit" in report else "not measured"


def mean_interval(values: Floats) -> Interval:
    """Student's interval of the mean of independent values, which are at most 1.

    Of equal values that of a share which is them once more, as rows not seen may have others.
    """
    count = len(values)
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0] + (1 - values[0]) * clopper_pearson(0, count)[1])
    reach = float(-t.ppf(TAIL, count - 1) * np.std(values, ddof=1) / count**0.5)
    middle = float(np.mean(values))
    return middle - reach, middle + reach


def bounded(share: float, report: Mapping[str, Any]) -> str:
    """A share of the prompts of an evaluation, beside the bound on it."""
    return f"{share_of(share, report['n'])}, bound {report['epsilon']:.0%}"
