"""The page of a server that calibrates itself: what happened to each kind of request, and when."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.files import replace_file
from vllm_adainfer.offline.facts.document import Block, Table
from vllm_adainfer.offline.reports.figures import Panel, axes, line, panel
from vllm_adainfer.offline.reports.kinds import (
    NOT_PROMISED,
    STATUS,
    KindState,
    Texts,
    Watched,
    day_of,
    facts_of_kind,
    label_texts,
    read_directory,
)
from vllm_adainfer.offline.reports.page import Section, html_page

LISTED = 50  # the latest events of a kind
MOST_POINTS = 500  # drawn of a line
# Heading, then the lines by their key in status events, then how values are written.
CHARTS = (
    ("Requests and rows recorded", {"requests": "requests", "rows": "rows"}, ",.0f"),
    ("Budget of changed answers", {"allowed": "allowed", "changed_at_most": "at most"}, ",.0f"),
    (
        "Layers saved, and share run at full depth",
        {"layers_saved": "layers saved", "rate": "full depth"},
        ".1%",
    ),
)
MARK = {"symbol": "line-ns-open", "size": 16, "color": "#5b6472"}

Event = Mapping[str, Any]


def write_page(root: str | Path) -> Path:
    """Write the page into the directory, for its user alone; returns where it is.

    An AdaInferError if no server has counted kinds there, or the page cannot be written.
    """
    directory, watched = AutoDirectory(root), read_directory(root)
    events: defaultdict[str, list[Event]] = defaultdict(list)
    for event in directory.told():
        events[event["kind"]].append(event)
    try:
        page = kinds_page(watched, events, label_texts(watched.tokenizer))
        replace_file(directory.page, page)
    except OSError as error:
        raise AdaInferError(f"cannot write {directory.page}: {error}") from None
    return directory.page


def kinds_page(watched: Watched, events: Mapping[str, Sequence[Event]], texts: Texts) -> str:
    """A section for each kind: its facts, its numbers over time, and its latest events."""
    sections = [_section(one, watched, events.get(one.name, ()), texts) for one in watched.kinds]
    return html_page(
        title=f"Kinds of requests to {watched.model}",
        subtitle=(
            f"{watched.requests:,} requests since {day_of(watched.since)}; written "
            f"{_moment(time.time())}. {watched.promise_of_all() or ''} {NOT_PROMISED}"
        ),
        sections=sections or [("No kind of one-answer request recurs so far.", (), ())],
    )


def _section(one: KindState, watched: Watched, events: Sequence[Event], texts: Texts) -> Section:
    events = sorted(events, key=lambda event: event["time"])
    status = [event for event in events if event["event"] == STATUS]
    happened = [event for event in events if event["event"] != STATUS]
    quarantined = {"quarantined": json.dumps(one.quarantined) if one.quarantined else "nothing"}
    blocks: list[Block] = [
        one.promise() or "",
        {**facts_of_kind(one, watched, texts), **quarantined},
    ]
    if happened:
        blocks.append(Table([_row(event) for event in happened[-LISTED:]], text_columns=3))
    return one.name, blocks, [*_charts(one.name, status, happened)]


def _charts(name: str, status: Sequence[Event], happened: Sequence[Event]) -> Iterator[Panel]:
    """The charts that have points; what happened is marked on the axis of time."""
    when = [_moment(event["time"]) for event in happened]
    what = [event["event"] for event in happened]
    at, hover = ([0] * len(when)), "%{text}, %{x}"
    marks = line((when, at), "events", "markers", text=what, marker=MARK, hovertemplate=hover)
    for number, (title, names, form) in enumerate(CHARTS):
        lines = [line(_points(status, key), label) for key, label in names.items()]
        if any(one["x"] for one in lines):
            layout = axes("", "")
            layout["yaxis"]["tickformat"] = form
            layout["xaxis"]["type"] = "date"
            yield panel(f"{name}-{number}", title, [*lines, marks], layout)


def _points(status: Sequence[Event], key: str) -> tuple[list[str], list[float]]:
    """Moments and values of a line, the last one among them."""
    found = [event for event in status if isinstance(event.get(key), int | float)]
    step = -(-len(found) // MOST_POINTS) or 1
    shown = [*found[:-1:step], *found[-1:]]
    return [_moment(event["time"]) for event in shown], [float(event[key]) for event in shown]


def _row(event: Event) -> dict[str, str]:
    rest = {key: value for key, value in event.items() if key not in ("time", "kind", "event")}
    details = ", ".join(f"{key} {value}" for key, value in rest.items())
    return {"when": _moment(event["time"]), "event": event["event"], "details": details}


def _moment(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
