"""The facts about the kinds of requests that a server has counted, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_adainfer.offline.facts.document import Block, Facts, Table
from vllm_adainfer.offline.reports.kind_states import (
    NOT_PROMISED,
    SHOWN_ANSWERS,
    KindState,
    Texts,
    Watched,
    day_of,
    quoted,
    reads_of,
)


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
        *promises,
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
