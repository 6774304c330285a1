"""What `make test` leaves to `make test-full`: cases of a promise beyond those that show it."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from tests.triton_on_cpu import IS_V2

# In the pass with Model Runner V2: for cases that the other pass shows, and that cost a minute.
FULL_ON_V2 = [pytest.mark.full] if IS_V2 else []


def full_on_v2(test: Any) -> Any:
    """Mark a test with `FULL_ON_V2`."""
    return pytest.mark.full(test) if IS_V2 else test


def needed(cases: int | Collection[Any], *, of: Iterable[Any]) -> list[Any]:
    """For `parametrize`: all `of` them, marked `full` but for those `cases` (or the first so many).

    Use it where each further case costs seconds and would fail for the reasons that others do.
    """
    every = list(of)
    kept = every[:cases] if isinstance(cases, int) else list(cases)
    unknown = [case for case in kept if case not in every]
    assert not unknown, f"{unknown} are not among {every}"
    return [case if case in kept else pytest.param(case, marks=pytest.mark.full) for case in every]
