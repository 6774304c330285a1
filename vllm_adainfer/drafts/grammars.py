"""The answers to each grammar that clients keep sending, and whether drafts of them pay."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from hashlib import blake2b

from vllm_adainfer.drafts.answers import Answers

MOST_GRAMMARS = 64  # with answers; the one that was not used for longest goes
MOST_NAMED = 64  # in counters, since the start
OTHERS = "others"  # the name of the rest there
MOST_SEEN_ONCE = 4096  # digests of grammars that came once
FORGOTTEN = 0.99  # how much of the balance is left after one more draft
DEBT = -64.0  # a balance in rows at which a grammar is left alone
CREDIT = 128.0  # the most that earlier drafts make up for
SHORTEST_REST, LONGEST_REST = 64, 4096  # requests for which it is


@dataclass
class Grammar:
    """One grammar.

    Attributes:
        name: a digest of it, for counters.
        answers: what the model wrote under it.
        balance: rows that drafts have spared, less those that they wasted, of late.
        rest: requests that it is still left alone for.
        next_rest: how many it is left alone for the next time.

    """

    name: str
    answers: Answers = field(default_factory=Answers)
    balance: float = 0.0
    rest: int = 0
    next_rest: int = SHORTEST_REST

    def arrived(self) -> None:
        """Note a request."""
        self.rest = max(0, self.rest - 1)

    def judge(self, drafted: int, kept: int, row_of_kept: float) -> None:
        """Note what became of a draft; a token that was kept has spared so many rows."""
        gain = kept * row_of_kept - (drafted - kept)
        self.balance = min(CREDIT, FORGOTTEN * self.balance + gain)
        if self.balance < DEBT:
            self.balance, self.rest = 0.0, self.next_rest
            self.next_rest = min(2 * self.next_rest, LONGEST_REST)
        elif self.balance > -DEBT:
            self.next_rest = SHORTEST_REST


class Grammars:
    """The grammars that came at least twice. Bounded, whatever clients send."""

    def __init__(self) -> None:
        self._known: OrderedDict[bytes, Grammar] = OrderedDict()
        self._once: OrderedDict[bytes, None] = OrderedDict()
        self._named: set[str] = set()

    def arrived(self, *parts: str, is_known: bool = False) -> Grammar | None:
        """The record of the grammar that `parts` describe; None when it comes for the first time.

        Unless it `is_known` to come again. Linear in their length.
        """
        text = "\0".join(parts).encode(errors="surrogatepass")
        digest = blake2b(text, digest_size=8).digest()
        found = self._known.get(digest)
        if found is None:
            if digest not in self._once and not is_known:
                self._once[digest] = None
                if len(self._once) > MOST_SEEN_ONCE:
                    self._once.popitem(last=False)
                return None
            self._once.pop(digest, None)
            found = self._known[digest] = Grammar(digest.hex())
            if len(self._known) > MOST_GRAMMARS:
                self._known.popitem(last=False)
        self._known.move_to_end(digest)
        found.arrived()
        return found

    def counted_as(self, grammar: Grammar) -> str:
        """The name of `grammar` in counters: `OTHERS` after so many, as no counter ever goes."""
        if grammar.name not in self._named and len(self._named) == MOST_NAMED:
            return OTHERS
        self._named.add(grammar.name)
        return grammar.name
