"""Estimates how likely new prefixes are to be reused, from the requests of a running engine.

An exit leaves the blocks of its prompt incomplete, so the next request with that prefix computes
them again. That pays off where prefixes are rarely reused (texts to classify), but not where most
are (one state with question after question). Reuse is unknown on arrival, so it is estimated from
earlier requests with the same policy and a similar number of new blocks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

Group = tuple[str, int]  # the policy, and the bit length of the number of new blocks
PRIOR = 4.0  # requests without reuse to start from
MOST_GROUPS = 1024  # that are remembered: clients make new ones on a server that calibrates itself
HORIZON = 64.0  # requests of a group after which the counts are halved


@dataclass
class Seen:
    """How many requests of a group had new blocks, and the sum of the shares reused."""

    new: float = PRIOR
    again: float = 0.0


class PrefixReuse:
    """Counts new blocks, and those that another request reuses in a later step."""

    def __init__(self, capacity: int) -> None:
        """Remember at most `capacity` blocks."""
        self._capacity = capacity
        # Of each block seen once: its request's group, and its fraction of that request's blocks.
        self._once: OrderedDict[bytes, tuple[Group, float] | None] = OrderedDict()
        self._fresh: set[bytes] = set()
        self._seen: OrderedDict[Group, Seen] = OrderedDict()

    def new_step(self) -> None:
        """Start a new step; requests of one step share blocks without computing them twice."""
        self._fresh.clear()

    def expected(self, policy: str, hashes: Sequence[bytes]) -> float:
        """The fraction of a request's new blocks that is likely to be reused; 0 if it has none."""
        new = sum(block_hash not in self._once for block_hash in hashes)
        seen = self._seen.get((policy, new.bit_length()))
        return 0.0 if seen is None or not new else seen.again / seen.new

    def add(self, policy: str | None, hashes: Sequence[bytes]) -> None:
        """Count the blocks of a request under `policy`; None if it may not exit."""
        new = []
        for block_hash in hashes:
            if block_hash not in self._once:
                new.append(block_hash)
                continue
            first = self._once[block_hash]
            if first is not None:
                self._once[block_hash] = None
                if block_hash not in self._fresh:
                    group, part = first
                    self._of(group).again += part
            self._once.move_to_end(block_hash)
        if policy is None or not new:
            return
        group = policy, len(new).bit_length()
        seen = self._of(group)
        seen.new += 1
        if seen.new > HORIZON:
            seen.new, seen.again = seen.new / 2, seen.again / 2
        self._fresh.update(new)
        self._once.update(dict.fromkeys(new, (group, 1 / len(new))))
        while len(self._once) > self._capacity:
            self._once.popitem(last=False)

    def _of(self, group: Group) -> Seen:
        """The counts of a group; evicts the least recently seen one beyond the limit."""
        seen = self._seen.setdefault(group, Seen())
        self._seen.move_to_end(group)
        if len(self._seen) > MOST_GROUPS:
            self._seen.popitem(last=False)
        return seen
