"""What one check of ``vllm-adainfer doctor`` has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        state: whether it is as it should be; ``skip`` was not looked at.
        sentence: what was found, with its cure if it failed.

    """

    state: Literal["ok", "FAIL", "skip"]
    sentence: str

    @property
    def failed(self) -> bool:
        """Whether there is something to mend."""
        return self.state == "FAIL"

    def __str__(self) -> str:
        """As it is printed."""
        return f"{self.state:4}  {self.sentence}"
