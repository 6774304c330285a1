"""Three calibrated tasks, for the tests that serve several at once."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.tasks import saved, three_tasks


@pytest.fixture(scope="module")
def tasks(tiny_model, reference) -> Any:
    return three_tasks(tiny_model, reference)


@pytest.fixture(scope="module")
def sources(tasks, tmp_path_factory) -> dict[str, str]:
    """The value of the switch's ``artifact``; a module's own, which it may overwrite."""
    return saved(tasks, tmp_path_factory.mktemp("tasks"))
