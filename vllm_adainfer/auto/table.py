"""Counts the kinds of requests that reach a server, names them in metrics, and finds label pools.

Metrics and the log line have hashed names and numbers, never texts. A label pool is made of kinds
whose labels vary, but are always some of the same few tokens.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_adainfer.auto.endings import Endings, Questions
from vllm_adainfer.auto.kinds import Kind

KINDS = 256  # kept at a time
RECURRING_KINDS = 192  # of these; the rest is left to new kinds, which may come to recur
RECURS = 20  # requests from which on a kind recurs; a list unique to a request never does
MOST_LABELS = 62  # of a pool, as policies take them
FEWEST_SETS = 8  # of labels, before they are more than several questions
POOL_REQUESTS = 200  # of a pool's kinds, from which on it is one kind itself
OWN_SHARE = 0.1  # of these, from which on one of them stays a kind of its own
MOST_POOLS = 16
NAMED = 16  # kinds that ever get series of their own, so that no client can make more
OTHERS = "others"  # all other one-answer requests
NO_KIND = "none"  # requests without a fixed set of answers


@dataclass
class KindCount:
    """The requests of one kind.

    Attributes:
        kind: the kind; None for requests without one, such as free text.
        requests: how many came.
        prompt_tokens: tokens of all their prompts.
        longest_prompt: tokens of the longest one.
        tokens: token rows that ran for them. A token in the prefix cache does not run; one that is
            computed again, after preemption, runs twice.
        first: when the first came, in seconds since 1970; 0 before that.
        last: when the last came.

    """

    kind: Kind | None
    requests: int = 0
    prompt_tokens: int = 0
    longest_prompt: int = 0
    tokens: int = 0
    first: float = 0.0
    last: float = 0.0

    @property
    def recurs(self) -> bool:
        """Whether so many requests came that more are to be expected."""
        return self.requests >= RECURS

    def add(self, prompt_tokens: int, now: float) -> None:
        """Count a request that arrives."""
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.longest_prompt = max(self.longest_prompt, prompt_tokens)
        self.first = self.first or now
        self.last = now

    def as_dict(self) -> dict[str, Any]:
        """The kind and its counts, for a file."""
        assert self.kind is not None
        return {**vars(self), "kind": self.kind.as_dict()}

    @classmethod
    def of_dict(cls, fields: Mapping[str, Any]) -> KindCount:
        """The counts that `as_dict` described.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: the fields are not such counts.

        """
        counts = {name: int(fields[name]) for name in ("requests", "prompt_tokens", "tokens")}
        longest, kind = int(fields["longest_prompt"]), Kind.of_dict(fields["kind"])
        first, last = float(fields["first"]), float(fields["last"])
        return cls(kind, longest_prompt=longest, first=first, last=last, **counts)


class KindTable:
    """The kinds seen recently, and all requests of the server.

    New kinds and recurring ones are kept apart, so that a flood of new kinds, such as lists unique
    to a request, evicts only new kinds. Each part evicts its least recently seen kind.

    In a server that runs every layer for every token, a kind's share of the token rows is its share
    of the token-layers.

    Attributes:
        since: when counting began, in seconds since 1970.
        requests: all that came, of whatever kind.
        tokens: all token rows that ran.
        no_kind: the requests without a kind.
        reads: what requests under each label of metrics read, such as ``label among 2``.
        pools: the label pools that are kinds, and what else stays one, see `find_pools`.
        questions: the kinds that are divided, see `auto.endings`.

    """

    def __init__(self, salt: bytes) -> None:
        """Begin to count; `salt` is the key of the kinds' names."""
        self._salt = salt
        self.reads: dict[str, str] = {}
        self.pools: dict[Kind, set[Kind]] = {}
        self.questions: dict[Kind, Questions] = {}
        self._endings: dict[Kind, Endings] = {}
        self._labels: dict[Kind, str] = {}
        self.since = time.time()
        self.requests = 0
        self.tokens = 0
        self.no_kind = KindCount(None)
        self._new: OrderedDict[Kind, KindCount] = OrderedDict()
        self._recurring: OrderedDict[Kind, KindCount] = OrderedDict()

    def arrived(self, kind: Kind | None, prompt_tokens: int, now: float) -> KindCount:
        """Count a request that arrives; what it runs is to be added to the counts returned."""
        self.requests += 1
        count = self.no_kind if kind is None else self._count_of(kind)
        count.add(prompt_tokens, now)
        if kind is not None and count.recurs and kind in self._new:
            self._keep(kind, self._new.pop(kind))
        return count

    def find_pools(self) -> None:
        """Let pools be kinds from now on that many requests were part of.

        Labels that are often asked for together stay a kind of their own.
        """
        for found in pools(self):
            labels, adapter = tuple(found["labels"]), found["adapter"]
            pool = Kind("label", labels, adapter=adapter, is_pool=True)
            is_new = found["requests"] >= POOL_REQUESTS and len(self.pools) < MOST_POOLS
            if is_new and not any(part_of(pool, other) for other in self.pools):
                often = OWN_SHARE * found["requests"]
                own = {
                    count.kind
                    for count in self
                    if count.kind is not None
                    and part_of(count.kind, pool)
                    and count.requests >= often
                }
                self.pools = {**self.pools, pool: own}  # another thread may be in `pool_of`

    def note_ending(self, kind: Kind, prompt: Sequence[int]) -> None:
        """Count how a prompt of a kind ends, which may be divided; see `find_questions`."""
        if kind in self._recurring and kind not in self.questions and not kind.ending:
            self._endings.setdefault(kind, Endings()).add(prompt)

    def find_questions(self) -> None:
        """Divide kinds of which so many requests came that their questions are known."""
        for kind, endings in [*self._endings.items()]:
            if kind not in self._recurring:
                del self._endings[kind]
            elif (found := endings.found()) is not None:
                del self._endings[kind]
                self.questions = {**self.questions, kind: found}

    def narrowed(self, kind: Kind, prompt: Sequence[int]) -> Kind:
        """The pool that a kind is part of now, or the question that its prompt asks, or itself."""
        kind = self.pool_of(kind)
        questions = self.questions.get(kind)
        return kind if questions is None else questions.kind_of(kind, prompt)

    def pool_of(self, kind: Kind) -> Kind:
        """The pool that a kind is part of now; else the kind itself."""
        for pool, own in self.pools.items():
            if part_of(kind, pool) and kind not in own:
                return pool
        return kind

    def restore(self, content: Any) -> None:
        """Go on from what `as_dict` described; from nothing if that is damaged."""
        try:
            counts = [KindCount.of_dict(fields) for fields in content["kinds"].values()]
            found = {count.kind: count for count in sorted(counts, key=lambda count: count.last)}
            self.pools = {
                Kind.of_dict(one["pool"]): set(map(Kind.of_dict, one["own"]))
                for one in content.get("served_pools", ())
            }
            self.questions = {
                Kind.of_dict(one["kind"]): Questions.of_dict(one)
                for one in content.get("questions", ())
            }
            totals = float(content["since"]), int(content["requests"]), int(content["tokens"])
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            return
        self.since, self.requests, self.tokens = totals
        for kind, count in found.items():
            assert kind is not None
            self._keep(kind, count)
        for count in self.recurring():
            self.label_of(count)

    def label_of(self, count: KindCount) -> str:
        """The label in metrics of a request that has just been counted.

        The recurring kinds that come first have one of their own, and keep it from then on.
        """
        kind = count.kind
        if kind is None:
            return NO_KIND
        label = self._labels.get(kind, OTHERS)
        if label == OTHERS and count.recurs and len(self._labels) < NAMED:
            name = self._labels[kind] = kind.name(self._salt)
            among = "of" if kind.reads == "object" else "among"
            many = f" {among} {len(kind.answers)}" if kind.reads != "scores" else ""
            self.reads[name] = f"{kind.reads}{many}"
        return label

    def recurring(self) -> list[KindCount]:
        """The kinds that recur, in the order of the token rows that ran for them, most first."""
        return sorted(self._recurring.values(), key=lambda count: -count.tokens)

    def __iter__(self) -> Iterator[KindCount]:
        """All kinds that are kept, recurring ones first."""
        yield from self._recurring.values()
        yield from self._new.values()

    def as_dict(self) -> dict[str, Any]:
        """The counts of the server and of its recurring kinds by name, for a file."""
        return {
            "since": self.since,
            "requests": self.requests,
            "tokens": self.tokens,
            "served_pools": [
                {"pool": pool.as_dict(), "own": [kind.as_dict() for kind in own]}
                for pool, own in self.pools.items()
            ],
            "questions": [
                {"kind": kind.as_dict(), **one.as_dict()} for kind, one in self.questions.items()
            ],
            "kinds": {
                count.kind.name(self._salt): count.as_dict()
                for count in self.recurring()
                if count.kind is not None
            },
        }

    def _count_of(self, kind: Kind) -> KindCount:
        for kinds in self._recurring, self._new:
            if kind in kinds:
                kinds.move_to_end(kind)
                return kinds[kind]
        if len(self._recurring) + len(self._new) >= KINDS:
            self._new.popitem(last=False)
        return self._new.setdefault(kind, KindCount(kind))

    def _keep(self, kind: Kind, count: KindCount) -> None:
        """Keep a recurring kind, in place of another one if there are many."""
        if len(self._recurring) >= RECURRING_KINDS:
            self._recurring.popitem(last=False)
        self._recurring[kind] = count


def part_of(kind: Kind, pool: Kind) -> bool:
    """Whether requests of a kind choose among labels of a pool."""
    alike = kind.reads == pool.reads and kind.adapter == pool.adapter
    return alike and len(kind.labels) > 1 and set(kind.labels) <= set(pool.labels)


def pools(counts: Iterable[KindCount]) -> list[dict[str, Any]]:
    """Pool candidates: one policy with a label pool could serve all kinds of one.

    Each has its ``adapter``, all ``labels``, the number of ``sets`` of them, and the ``requests``
    and ``tokens`` of its kinds; the one with most requests comes first. Kinds with many labels are
    taken in first, so that smaller sets find the pool that they are part of. A kind joins the pool
    that has most of its labels, if that stays small; the time is linear.
    """
    labels = [
        (count.kind, count)
        for count in counts
        if count.kind is not None
        and count.kind.reads == "label"
        and not (count.kind.is_pool or count.kind.ending)
        and 2 <= len(count.kind.labels) <= MOST_LABELS
    ]
    found: list[dict[str, Any]] = []
    owners: dict[tuple[str | None, int], int] = {}  # places in `found`
    for kind, count in sorted(labels, key=lambda one: (-len(one[0].labels), -one[1].requests)):
        keys = [(kind.adapter, label) for label in kind.labels]
        having = Counter(owners[key] for key in keys if key in owners)
        number = having.most_common(1)[0][0] if having else len(found)
        if not having or len(found[number]["labels"].union(kind.labels)) > MOST_LABELS:
            number = len(found)
            numbers = {"sets": 0, "requests": 0, "tokens": 0}
            found.append({"adapter": kind.adapter, "labels": set(), **numbers})
        pool = found[number]
        pool["labels"].update(kind.labels)
        pool["sets"] += 1
        pool["requests"] += count.requests
        pool["tokens"] += count.tokens
        for key in keys:
            owners.setdefault(key, number)
    kept = [
        {**pool, "labels": sorted(pool["labels"])}
        for pool in found
        if pool["sets"] >= FEWEST_SETS and pool["requests"] >= RECURS
    ]
    return sorted(kept, key=lambda pool: -pool["requests"])
