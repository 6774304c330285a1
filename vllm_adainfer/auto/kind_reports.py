"""What a server's metrics and log line say of kinds: hashed names and numbers, never texts."""

from __future__ import annotations

from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import KindCount, KindTable

NAMED = 16  # kinds that ever get series of their own, so that no client can make more
OTHERS = "others"  # all other one-answer requests
NO_KIND = "none"  # requests without a fixed set of answers


class KindReporter:
    """Tells what came since the last report.

    A report is an increment because it goes to one of several frontends, which add them up. The
    recurring kinds that come first get names of their own, and keep them until the server ends.
    """

    def __init__(self, table: KindTable, salt: bytes) -> None:
        """Report what `table` counts from now on; `salt` is the key of the names."""
        self._table, self._salt = table, salt
        self._named: dict[Kind, tuple[str, KindCount]] = {}
        self._told: dict[str, tuple[int, int]] = {NO_KIND: (0, 0)}
        self._total = table.requests, table.tokens
        self._name_kinds()

    def report(self) -> list[tuple[str, str, int, int]]:
        """Name, what is read, requests and token rows; only of kinds of which some came or ran."""
        table, added = self._table, []
        left = [table.requests - self._total[0], table.tokens - self._total[1]]
        self._total = table.requests, table.tokens
        named = [(name, in_numbers(kind), one) for kind, (name, one) in self._named.items()]
        for name, reads, count in [*named, (NO_KIND, "", table.no_kind)]:
            before, now = self._told[name], (count.requests, count.tokens)
            self._told[name] = now
            added.append((name, reads, now[0] - before[0], now[1] - before[1]))
            left = [left[0] - added[-1][2], left[1] - added[-1][3]]
        added.append((OTHERS, "", left[0], left[1]))
        self._name_kinds()
        return [one for one in added if one[2] or one[3]]

    def _name_kinds(self) -> None:
        """Name recurring kinds while there are names, and count anew what has been forgotten."""
        for count in self._table.recurring():
            kind = count.kind
            assert kind is not None
            if kind not in self._named and len(self._named) == NAMED:
                continue
            if kind not in self._named or self._named[kind][1] is not count:
                name = kind.name(self._salt)
                self._named[kind] = name, count
                self._told[name] = count.requests, count.tokens


def in_numbers(kind: Kind) -> str:
    """What requests of a kind read, without its texts, such as ``label among 2``."""
    return f"{kind.reads} among {len(kind.labels or kind.choices)}"
