"""What a server's metrics and log line say of kinds: hashed names and numbers, never texts."""

from __future__ import annotations

from collections.abc import Iterable

from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import KindCount

NAMED = 16  # kinds that ever get series of their own, so that no client can make more
OTHERS = "others"  # all other one-answer requests
NO_KIND = "none"  # requests without a fixed set of answers


class KindLabels:
    """Labels of requests in metrics: the recurring kinds that come first have one of their own.

    Attributes:
        reads: what requests under each such label read, such as ``label among 2``.

    """

    def __init__(self, recurring: Iterable[KindCount], salt: bytes) -> None:
        """Name the kinds that an earlier run of the server knew; `salt` is the key of the names."""
        self.reads: dict[str, str] = {}
        self._names: dict[Kind, str] = {}
        self._salt = salt
        for count in recurring:
            self.of(count)

    def of(self, count: KindCount) -> str:
        """The label of a request that has just been counted; its kind keeps one from now on."""
        kind = count.kind
        if kind is None:
            return NO_KIND
        label = self._names.get(kind, OTHERS)
        if label == OTHERS and count.recurs and len(self._names) < NAMED:
            self._names[kind] = kind.name(self._salt)
            self.reads[self._names[kind]] = f"{kind.reads} among {len(kind.labels or kind.choices)}"
        return label
