"""The state of each kind of request, by the directory of a self-calibrating server."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_adainfer.auto.all_kinds import Counted, lost_of, together
from vllm_adainfer.auto.directory import AutoDirectory, read_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import KindCount
from vllm_adainfer.auto.tries import GIVEN_UP, TRIES, State
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.facts.document import Block, Facts, Table

STATUS = "status"  # an event that has numbers, once a minute
SHOWN_ANSWERS = 6
SHOWN_CHARACTERS = 20  # of each answer
NOT_PROMISED = (
    "This is a long-run bound over all of them: it says nothing of a single hour, a subset of the "
    "requests, or accuracy."
)
Texts = Callable[[int], str]


@dataclass(frozen=True)
class KindState:
    """The state of one kind, by its hashed name.

    `tried` are the tries to certify a policy for it, None if the trainer says nothing; `ledger` is
    its ledger's file, empty if there is none; `status` the latest event with its numbers, likewise.
    A kind is recordable if the server calibrates itself, and does not only watch; `tolerance` is
    the server's.
    """

    name: str
    kind: Kind
    count: KindCount
    tried: State | None
    ledger: Mapping[str, Any]
    is_recordable: bool
    status: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float | None = None

    @property
    def serves(self) -> int | None:
        """Number of the policy that serves it; None for none."""
        return None if self.tried is None else self.tried.certified

    @property
    def quarantined(self) -> Mapping[str, Any]:
        """The policy of it that is quarantined, and why; empty if none is."""
        found: Mapping[str, Any] = self.ledger.get("quarantined") or {}
        return found

    def state(self) -> str:
        """Where it stands, in words."""
        if (why := self.kind.why_full_depth(self.tolerance)) is not None:
            return why
        if self.ledger.get("closed"):
            reason = self.ledger.get("why_closed") or "its policy changes too much"
            begins = int(self.ledger.get("begins_at") or 0)
            since = (
                "" if self.ledger.get("requests", 0) >= begins else f" from request {begins:,} on"
            )
            return f"closed: {reason}; recorded anew{since}"
        if self.serves is not None:
            if self.quarantined.get("policy") == self.serves:
                return f"policy {self.serves} is quarantined: {self.quarantined.get('why')}"
            return f"policy {self.serves} serves{self.next_try()}"
        if self.tried is not None:
            tries = self.tried.tries
            if self.tried.status == GIVEN_UP:
                return f"given up after {len(tries)} tries to certify a policy: {tries[-1].outcome}"
            return f"recording, {len(tries)} tries to certify a policy so far{self.next_try()}"
        if self.ledger:
            return f"recording{self.next_try()}"
        return "waits until it comes more often" if self.is_recordable else "watch only"

    def next_try(self) -> str:
        """At how many rows the trainer tries next, in words; empty if there is no other try."""
        tried, course = self.tried or State(), int(self.ledger.get("course") or 0)
        made = sum(one.course == course for one in tried.tries)
        if made == len(TRIES) or self.ledger.get("has_grown"):
            return ""
        rows = self.status.get("rows")
        return f", next try at {TRIES[made]:,} rows" + ("" if rows is None else f" of {rows:,} now")

    def saved(self) -> str:
        """The share of the layers that its requests saved since the server started."""
        saved = self.status.get("layers_saved")
        return "-" if saved is None else f"{saved:.1%}"

    def compared(self) -> str:
        """The share of its requests that are compared now, if its policy decides any."""
        return f"{self.ledger['rate']:.1%}" if self.ledger.get("decided") else "-"

    def promise(self) -> str | None:
        """The sentence of the ledger; None if there is none."""
        names = "requests", "changed_at_most", "alpha"
        requests, most, alpha = (self.ledger.get(name) for name in names)
        if requests is None or most is None or alpha is None:
            return None
        since = self.ledger.get("since") or self.count.first
        return (
            f"Since {day_of(since)} this server got {requests:,} requests of kind {self.name}; at "
            f"most {most:,.0f} ({most / max(1, requests):.1%}) were answered otherwise than at "
            f"full depth (confidence {1 - alpha:.0%}, at every moment, for any traffic)."
        )


@dataclass(frozen=True)
class Watched:
    """The counts of a server since a moment: all its requests and the token rows that ran for them.

    The kinds that recur come with the one with most token rows first; see `auto.table` for pools,
    and `auto.all_kinds` for what all ledgers have `counted`, with confidence 1 - `delta`.
    """

    model: str
    tokenizer: str
    since: float
    requests: int
    tokens: int
    kinds: Sequence[KindState]
    pools: Sequence[Mapping[str, Any]]
    counted: Counted = field(default_factory=Counted)
    delta: float | None = None

    def promise_of_all(self) -> str | None:
        """The one claim over all kinds that have or had a ledger; None if there is none."""
        if self.delta is None or self.counted.kinds < 2:
            return None
        most, requests = self.counted.changed_at_most(self.delta), self.counted.requests
        if most is None:
            return (
                "There is no claim over all kinds together: a ledger was damaged. Delete the "
                "directory to begin anew."
            )
        return (
            f"Of all {requests:,} requests of {self.counted.kinds} kinds together, at most "
            f"{most:,.0f} ({most / max(1, requests):.1%}) were answered otherwise than at full "
            f"depth (one claim with confidence {1 - self.delta:.0%})."
        )

    def share(self, tokens: int) -> str:
        """The share of the token rows that `tokens` are."""
        return f"{tokens / max(1, self.tokens):.1%}"


def read_directory(root: str | Path) -> Watched:
    """The content of the directory; an AdaInferError if no server has counted kinds there."""
    directory = AutoDirectory(root)
    content = read_json(directory.kinds)
    try:
        counts = {name: KindCount.of_dict(one) for name, one in content["kinds"].items()}
        totals = float(content["since"]), int(content["requests"]), int(content["tokens"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise AdaInferError(
            f"{root} has no counts of kinds: name the directory that the engine switch has under "
            '"auto", some seconds after its server has started'
        ) from None
    identity = _object(directory.identity)
    status = {one["kind"]: one for one in directory.told() if one["event"] == STATUS}
    kinds = [
        KindState(
            name,
            count.kind,
            count,
            State.of(found) if (found := read_json(directory.trainer(name))) else None,
            _object(directory.ledger(name)),
            directory.identity.exists(),
            status.get(name, {}),
            identity.get("tolerance"),
        )
        for name, count in counts.items()
        if count.kind is not None
    ]
    model, tokenizer = str(content.get("model")), str(content.get("tokenizer"))
    ledgers = (_object(directory.ledger(name)) for name in directory.known())
    counted = together([lost_of(directory), *map(Counted.of_ledger, filter(None, ledgers))])
    pools = content.get("pools") or []
    return Watched(model, tokenizer, *totals, kinds, pools, counted, identity.get("delta"))


@lru_cache(1)
def label_texts(tokenizer: str) -> Texts:
    """How to write a label: its text, or its token id if the tokenizer cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except Exception:  # a tokenizer's files can raise anything, and ids say enough
        return str

    def text(label: int) -> str:
        return quoted(str(loaded.decode([label]))) if 0 <= label < len(loaded) else str(label)

    return text


def reads_of(kind: Kind, texts: Texts) -> str:
    """The output of a kind, in words."""
    if kind.ending:
        asked = " ".join(texts(token) for token in kind.ending[-SHOWN_ANSWERS:])
        return f"{reads_of(replace(kind, ending=()), texts)}, after {asked}"
    if kind.choices:
        return f"choice: {_few([quoted(text) for text in kind.choices[:SHOWN_ANSWERS]], kind)}"
    if kind.reads == "scores":
        return "scores of the classifier"
    if kind.reads == "object":
        shown = [quoted(path) for path in kind.paths[:SHOWN_ANSWERS]]
        return f"object: {_few(shown, kind) or 'no field with few values'}"
    reads = "label of a pool" if kind.is_pool else kind.reads
    return f"{reads}: {_few([texts(label) for label in kind.labels[:SHOWN_ANSWERS]], kind)}"


def quoted(text: str) -> str:
    """A client's text, cut, with control characters escaped."""
    cut = text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
    return repr(cut)


def day_of(moment: float) -> str:
    """A day such as 3 May 2026."""
    day = time.localtime(moment)
    return f"{day.tm_mday} {time.strftime('%B %Y', day)}"


def facts_of_kind(one: KindState, watched: Watched, texts: Texts) -> Facts:
    """The state of one kind, as facts."""
    count = one.count
    return {
        "kind": one.name,
        "reads": reads_of(one.kind, texts),
        "adapter": "-" if one.kind.adapter is None else quoted(one.kind.adapter),
        "state": one.state(),
        "requests": f"{count.requests:,}",
        "mean prompt": f"{count.prompt_tokens / max(1, count.requests):,.0f}",
        "longest": f"{count.longest_prompt:,}",
        "token rows": watched.share(count.tokens),
        **({"layers saved": one.saved(), "compared": one.compared()} if one.is_recordable else {}),
    }


def facts_of_kinds(watched: Watched, texts: Texts) -> list[Block]:
    """A table of the kinds, then pool candidates, then what is promised."""
    rows = [facts_of_kind(one, watched, texts) for one in watched.kinds]
    rest = watched.tokens - sum(one.count.tokens for one in watched.kinds)
    promises = [promise for one in watched.kinds if (promise := one.promise()) is not None]
    return [
        Table(rows, text_columns=4) if rows else "no kind of one-answer request recurs so far",
        f"{watched.model} got {watched.requests:,} requests since {day_of(watched.since)}. All "
        f"others, such as free text, ran {watched.share(rest)} of the token rows.",
        *(_pool_candidate(pool, watched, texts) for pool in watched.pools),
        *_of_objects(watched),
        *promises,
        *filter(None, [watched.promise_of_all()]),
        *([NOT_PROMISED] if promises else []),
    ]


def _pool_candidate(pool: Mapping[str, Any], watched: Watched, texts: Texts) -> str:
    labels = [texts(label) for label in pool["labels"][:SHOWN_ANSWERS]]
    more = ", ..." if len(pool["labels"]) > SHOWN_ANSWERS else ""
    adapter = "" if pool["adapter"] is None else f" under adapter {quoted(pool['adapter'])}"
    return (
        f"Pool candidate{adapter}: {pool['requests']:,} requests name {pool['sets']} different "
        f"sets of {len(pool['labels'])} labels ({', '.join(labels)}{more}) and ran "
        f"{watched.share(pool['tokens'])} of the token rows. One policy can serve them all: "
        "vllm-adainfer calibrate --label-pool"
    )


def _of_objects(watched: Watched) -> list[str]:
    """How to make policies for the objects that recur; nothing if there are none."""
    names = [one.name for one in watched.kinds if one.kind.reads == "object"]
    if not names:
        return []
    return [
        f"Objects ({', '.join(names)}): the server does not calibrate itself for them. Where all "
        "fields of a schema have few values, a policy can write whole objects early; the server "
        'captures requests with "capture" in the switch: vllm-adainfer calibrate --model MODEL '
        "--data CAPTURED --schema SCHEMA.json --output DIR"
    ]


def _few(answers: Sequence[str], kind: Kind) -> str:
    count = len(kind.answers)
    more = f", ... ({count})" if count > len(answers) else ""
    return ", ".join(answers) + more


def _object(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one if there is none."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}
