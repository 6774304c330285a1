"""Prints the kinds of requests that a server has counted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_adainfer.offline.reports.kind_states import (
    NOT_PROMISED,
    SHOWN_ANSWERS,
    Texts,
    Watched,
    day_of,
    quoted,
    reads_of,
)
from vllm_adainfer.offline.tables import text_table

COLUMNS = (
    "kind",
    "reads",
    "adapter",
    "state",
    "requests",
    "mean prompt",
    "longest",
    "token rows",
)


def told(watched: Watched, texts: Texts) -> str:
    """A table of the kinds, then pool candidates, then what is promised."""
    rows = [
        [
            one.name,
            reads_of(one.kind, texts),
            "-" if one.kind.adapter is None else quoted(one.kind.adapter),
            one.state(),
            f"{one.count.requests:,}",
            f"{one.count.prompt_tokens / max(1, one.count.requests):,.0f}",
            f"{one.count.longest_prompt:,}",
            watched.share(one.count.tokens),
        ]
        for one in watched.kinds
    ]
    rest = watched.tokens - sum(one.count.tokens for one in watched.kinds)
    parts = [
        text_table(COLUMNS, rows, 4) if rows else "no kind of one-answer request recurs so far",
        f"{watched.model} got {watched.requests:,} requests since {day_of(watched.since)}. All "
        f"others, such as free text, ran {watched.share(rest)} of the token rows.",
        *(_pool_line(pool, watched, texts) for pool in watched.pools),
    ]
    promises = [promise for one in watched.kinds if (promise := one.promise()) is not None]
    if promises:
        parts += [*promises, NOT_PROMISED]
    return "\n\n".join(parts)


def _pool_line(pool: Mapping[str, Any], watched: Watched, texts: Texts) -> str:
    labels = [texts(label) for label in pool["labels"][:SHOWN_ANSWERS]]
    more = ", ..." if len(pool["labels"]) > SHOWN_ANSWERS else ""
    adapter = "" if pool["adapter"] is None else f" under adapter {quoted(pool['adapter'])}"
    return (
        f"Pool candidate{adapter}: {pool['requests']:,} requests name {pool['sets']} different "
        f"sets of {len(pool['labels'])} labels ({', '.join(labels)}{more}) and ran "
        f"{watched.share(pool['tokens'])} of the token rows. One policy can serve them all: "
        "vllm-adainfer calibrate --label-pool"
    )
