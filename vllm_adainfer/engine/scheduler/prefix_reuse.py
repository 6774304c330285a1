"""How often prefixes that are new come again, learned from the requests of a running engine.

An exit leaves the blocks of its prompt incomplete, so the next request with that prefix computes
them again. That pays where few come again (texts to classify), and not where most do (a state that
is asked one question after the other). Which of these a request begins is not known when it comes;
requests of its policy that brought about as many new blocks tell.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

Kind = tuple[str, int]  # policy, and the number of binary digits of the number of new blocks
PRIOR = 4.0  # requests whose blocks did not come again, before the first
HORIZON = 64.0  # requests of a kind after which old ones count half


@dataclass
class Seen:
    """Requests of a kind with new blocks; those of which a part came again count as that part."""

    new: float = PRIOR
    again: float = 0.0


class PrefixReuse:
    """Counts new blocks, and those that another request asks for in a later step."""

    def __init__(self, capacity: int) -> None:
        """Remember at most `capacity` blocks."""
        self._capacity = capacity
        # Of each block that has come once: its request's kind, and its part of that request.
        self._once: OrderedDict[bytes, tuple[Kind, float] | None] = OrderedDict()
        self._fresh: set[bytes] = set()
        self._seen: defaultdict[Kind, Seen] = defaultdict(Seen)

    def new_step(self) -> None:
        """Begin another step. Requests of one step share blocks without computing them twice."""
        self._fresh.clear()

    def expected(self, policy: str, hashes: Sequence[bytes]) -> float:
        """The share of a request's new blocks that will come again; 0 if it has none."""
        new = sum(block_hash not in self._once for block_hash in hashes)
        seen = self._seen.get((policy, new.bit_length()))
        return 0.0 if seen is None or not new else seen.again / seen.new

    def add(self, policy: str | None, hashes: Sequence[bytes]) -> None:
        """Count the blocks of a request; `policy` decides about it, None if it may not exit."""
        new = []
        for block_hash in hashes:
            if block_hash not in self._once:
                new.append(block_hash)
                continue
            first = self._once[block_hash]
            if first is not None:
                self._once[block_hash] = None
                if block_hash not in self._fresh:
                    kind, part = first
                    self._seen[kind].again += part
            self._once.move_to_end(block_hash)
        if policy is None or not new:
            return
        kind = policy, len(new).bit_length()
        seen = self._seen[kind]
        seen.new += 1
        if seen.new > HORIZON:
            seen.new, seen.again = seen.new / 2, seen.again / 2
        self._fresh.update(new)
        self._once.update(dict.fromkeys(new, (kind, 1 / len(new))))
        while len(self._once) > self._capacity:
            self._once.popitem(last=False)
