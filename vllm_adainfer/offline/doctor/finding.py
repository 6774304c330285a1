"""The result of one check by ``vllm-adainfer doctor``."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal


@dataclass(frozen=True)
class Finding:
    """The result of one check, printed as one line; ``skip`` if it was not made.

    The sentence says what was found, and how to fix it if the check failed.
    """

    state: Literal["ok", "FAIL", "skip"]
    sentence: str

    @property
    def failed(self) -> bool:
        """Whether the check failed."""
        return self.state == "FAIL"

    def as_dict(self) -> dict[str, str]:
        """Its ``state`` (``ok``, ``fail`` or ``skip``) and ``sentence``."""
        return {"state": self.state.lower(), "sentence": self.sentence}

    def __str__(self) -> str:
        """The line to print."""
        return f"{self.state:4}  {self.sentence}"


ok, fail, skip = (partial(Finding, state) for state in ("ok", "FAIL", "skip"))
