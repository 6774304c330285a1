"""What tests of a server's own directory share."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_adainfer.auto.directory import AutoDirectory


@pytest.fixture
def directory(tmp_path: Path) -> AutoDirectory:
    """A directory of a server that counts kinds or calibrates itself, as it is made."""
    found = AutoDirectory(tmp_path / "auto")
    found.create()
    return found
