"""The page of a server that calibrates itself: what happened to each kind of request, and when."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.files import replace_file
from vllm_adainfer.offline.reports.kind_states import (
    NOT_PROMISED,
    KindState,
    Texts,
    Watched,
    day_of,
    label_texts,
    read_directory,
    reads_of,
)
from vllm_adainfer.offline.reports.line_chart import Points, line_chart

STATUS = "status"  # an event that has numbers and is not listed
LISTED = 50  # the latest events of a kind
# Heading, then the lines by their key in status events, then whether they are shares.
CHARTS = (
    ("Requests and rows recorded", {"requests": "requests", "rows": "rows"}, False),
    (
        "Budget of changed answers",
        {"allowed": "allowed", "changed_at_most": "changed at most"},
        False,
    ),
    (
        "Layers saved, and share run at full depth",
        {"layers_saved": "layers saved", "rate": "full depth"},
        True,
    ),
)

Event = Mapping[str, Any]


def write_page(root: str | Path) -> Path:
    """Write the page into the directory, for its user alone; where it is.

    Raises:
        AdaInferError: no server has counted kinds there, or the page cannot be written.

    """
    directory, watched = AutoDirectory(root), read_directory(root)
    events: defaultdict[str, list[Event]] = defaultdict(list)
    for path in directory.events_before, directory.events:
        for event in read_events(path):
            events[event["kind"]].append(event)
    try:
        replace_file(directory.page, page_of(watched, events, label_texts(watched.tokenizer)))
    except OSError as error:
        raise AdaInferError(f"cannot write {directory.page}: {error}") from None
    return directory.page


def read_events(path: Path) -> Iterator[Event]:
    """The events in a file, without damaged lines; none if there is no file."""
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    event = json.loads(line)
                    yield {
                        **event,
                        "time": float(event["time"]),
                        "kind": str(event["kind"]),
                        "event": str(event["event"]),
                    }
                except (KeyError, TypeError, ValueError):  # cut short by a kill
                    continue
    except OSError:
        return


def page_of(watched: Watched, events: Mapping[str, Sequence[Event]], texts: Texts) -> str:
    """The HTML of the page, which loads nothing from elsewhere."""
    now = time.time()
    span = watched.since, max([now, *(one["time"] for some in events.values() for one in some)])
    title = f"Kinds of requests to {watched.model}"
    style = files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    sections = [
        _section(one, watched, events.get(one.name, ()), texts, span) for one in watched.kinds
    ]
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{escape(title)}</title><style>{style}</style></head><body>",
            f"<header><h1>{escape(title)}</h1><p>{watched.requests:,} requests since ",
            f"{day_of(watched.since)}; written {time.strftime('%Y-%m-%d %H:%M')}. ",
            f"{NOT_PROMISED}</p></header>",
            *sections,
            "" if sections else "<p>No kind of one-answer request recurs so far.</p>",
            "</body></html>\n",
        ]
    )


def _section(
    one: KindState,
    watched: Watched,
    events: Sequence[Event],
    texts: Texts,
    span: tuple[float, float],
) -> str:
    events = sorted(events, key=lambda event: event["time"])
    status = [event for event in events if event["event"] == STATUS]
    happened = [event for event in events if event["event"] != STATUS]
    facts = {
        "reads": reads_of(one.kind, texts),
        "adapter": one.kind.adapter or "none",
        "state": one.state(),
        "requests": f"{one.count.requests:,}",
        "token rows": watched.share(one.count.tokens),
        "quarantined": json.dumps(one.bad) if one.bad else "nothing",
    }
    marks = [(event["time"], event["event"]) for event in happened]
    charts = []
    for title, names, percent in CHARTS:
        lines = {name: _points(status, key) for key, name in names.items()}
        if any(lines.values()):
            charts.append(f"<figure>{line_chart(title, lines, marks, span, percent)}</figure>")
    return "".join(
        [
            f'<section id="{escape(one.name)}"><h2>{escape(one.name)}</h2>',
            f"<p>{escape(one.promise() or '')}</p>",
            f'<table class="facts">{"".join(map(_row, facts.items()))}</table>',
            f'<div class="figures">{"".join(charts)}</div>',
            f"<table>{''.join(map(_happened, happened[-LISTED:]))}</table></section>",
        ]
    )


def _points(status: Sequence[Event], key: str) -> Points:
    return [
        (event["time"], float(event[key]))
        for event in status
        if isinstance(event.get(key), int | float)
    ]


def _row(pair: tuple[str, str]) -> str:
    name, value = pair
    return f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"


def _happened(event: Event) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    rest = {key: value for key, value in event.items() if key not in ("time", "kind", "event")}
    details = ", ".join(f"{key} {value}" for key, value in rest.items())
    return f"<tr><th>{when}</th><td>{escape(event['event'])}</td><td>{escape(details)}</td></tr>"
