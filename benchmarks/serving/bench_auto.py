r"""A server that calibrates itself, from its first request on, beside stock vLLM.

    .venv/bin/python benchmarks/serving/bench_auto.py --model MODEL --requests requests.jsonl

The server starts with an empty directory. It and a stock server with the same flags get the same
requests in blocks, one server at a time, and so many requests are in flight at once. The trainer
runs beside both at idle priority, on the cores that they leave. `requests.jsonl` holds lines of a
vLLM batch file, which are sent in their order; those with `allowed_token_ids` or
`structured_outputs.choice` are of a kind.

Answers are compared with those of stock vLLM. Both round in other batches, so answers differ before
the first exit, too; the ledger compares within the same step.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.common.report_files import write_report
from benchmarks.common.server import Server
from benchmarks.serving.auto_report import RECENT, table
from benchmarks.serving.sending import send, text_of
from benchmarks.serving.serve_report import OURS, STOCK
from benchmarks.serving.side_by_side import side_by_side
from vllm_adainfer.artifact.config import LAST_TOKEN
from vllm_adainfer.auto.directory import AutoDirectory, read_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.kinds import read_directory

REPORTED_AT = 2_000, 5_000  # requests of a kind


@dataclass
class Seen:
    """The observations of one kind.

    Attributes:
        opened_at: after how many requests the first exited; None before.
        closed_at: after how many the kind was closed; None unless it is.
        changed: answers unlike stock's, before the first exit and from then on.
        blocks: of each block, the token-layers skipped, those of full depth, and the requests.
        readings: by number of requests, what held then.

    """

    requests: int = 0
    opened_at: int | None = None
    closed_at: int | None = None
    changed: list[int] = field(default_factory=lambda: [0, 0])
    compared: list[int] = field(default_factory=lambda: [0, 0])
    blocks: list[tuple[float, float, int]] = field(default_factory=list)
    readings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def layers_saved(self) -> float:
        """The share of the token-layers that the latest blocks skipped."""
        skipped, possible, _ = np.sum(self.blocks[-RECENT:], axis=0)
        return float(skipped / max(possible, 1))


def main(
    model: Annotated[str, typer.Option()],
    requests: Annotated[Path, typer.Option(help="Lines of a vLLM batch file, in their order.")],
    title: Annotated[str, typer.Option(help="Name of the traffic.")],
    block: Annotated[int, typer.Option(min=1, help="Requests before the servers change.")] = 500,
    at_once: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 16,
    epsilon: Annotated[float, typer.Option()] = 0.02,
    flags: Annotated[str, typer.Option(help="For both servers.")] = "--max-model-len 512",
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/auto.json"),
) -> None:
    """Measure, and add the traffic to the JSON and the Markdown of `output`."""
    lines = [json.loads(line) for line in requests.read_text().splitlines()]
    depth = load_config_and_tokenizer(model)[0].num_hidden_layers
    with tempfile.TemporaryDirectory() as folder:
        directory = AutoDirectory(Path(folder, "auto"))
        switch = {"auto": {"directory": str(directory.root), "epsilon": epsilon}}
        with side_by_side(model, switch, flags.split()) as servers:
            blocks, kinds = measure(servers, directory, lines, block, at_once, depth)
        ledgers = {name: read_json(directory.ledger(name)) for name in kinds}
        delta = read_json(directory.identity)["delta"]
        of_all = read_directory(directory.root).promise_of_all()
        events = [json.loads(line) for line in directory.events.read_text().splitlines()]
    report = read_json(output) or {"traffic": {}}
    report["provenance"] = provenance()  # of the latest
    report["traffic"][title] = {
        "provenance": report["provenance"],
        "model": Path(model).name,
        "requests": len(lines),
        "block": block,
        "at_once": at_once,
        "epsilon": epsilon,
        "delta": delta,
        "of_all": of_all,
        "blocks": blocks,
        "kinds": [
            {
                "kind": name,
                "title": _title(kinds[name][0]),
                "ledger": ledgers[name],
                **{key: value for key, value in vars(kinds[name][1]).items() if key != "blocks"},
                "layers_saved": kinds[name][1].layers_saved,
            }
            for name in kinds
        ],
        "events": [event for event in events if event["event"] != "status"],
    }
    write_report(output, report, table(report))


def measure(
    servers: Mapping[str, Server],
    directory: AutoDirectory,
    lines: Sequence[Mapping[str, Any]],
    block: int,
    at_once: int,
    depth: int,
) -> tuple[list[dict[str, Any]], dict[str, tuple[Mapping[str, Any], Seen]]]:
    """Send all blocks to both servers; what each block took, and what was seen of each kind."""
    salt, found, start = directory.salt, [], time.monotonic()
    kinds: dict[str, tuple[Mapping[str, Any], Seen]] = {}
    before: Mapping[str, float] = {}
    for number in tqdm(range(0, len(lines), block), desc="blocks"):
        part = lines[number : number + block]
        names = [_kind_of(line["body"], salt) for line in part]
        order = (OURS, STOCK) if number // block % 2 else (STOCK, OURS)
        paths, bodies = ([line[key] for line in part] for key in ("url", "body"))
        runs = {name: send(servers[name], paths, bodies, at_once=at_once) for name in order}
        time.sleep(1.0)  # counters are sent four times a second, ledgers written once
        now = servers[OURS].metrics()
        opened = Counter[str]()
        for name, line, ours, stock in zip(
            names,
            part,
            map(text_of, runs[OURS].answers),
            map(text_of, runs[STOCK].answers),
            strict=True,
        ):
            if name is None:
                continue
            _, seen = kinds.setdefault(name, (line, Seen()))
            seen.requests += 1
            opened[name] += 1
            is_open = seen.opened_at is not None
            seen.compared[is_open] += 1
            seen.changed[is_open] += ours != stock
        compared: dict[str, float] = {}
        for name, count in opened.items():
            seen = kinds[name][1]
            skipped = _added(now, before, "layer_rows_skipped_total", "policy", name)
            rows = _added(now, before, "kind_tokens_total", "kind", name)
            seen.blocks.append((skipped, rows * depth, count))
            compared[name] = _added(now, before, "shadow_checked_total", "policy", name)
            ledger = read_json(directory.ledger(name)) or {}
            if seen.opened_at is None and ledger.get("decided"):
                seen.opened_at = seen.requests
            if seen.closed_at is None and ledger.get("why_closed"):
                seen.closed_at = seen.requests
            for at in REPORTED_AT:
                if seen.requests >= at and str(at) not in seen.readings:
                    seen.readings[str(at)] = {
                        "layers_saved": seen.layers_saved,
                        "changed": list(seen.changed),
                        "compared": list(seen.compared),
                        "changed_at_most": _claim(ledger),
                        "allowed": ledger.get("allowed"),
                    }
        found.append(
            {
                "requests": number + len(part),
                "minutes": (time.monotonic() - start) / 60,
                **{
                    name: {
                        "requests_per_second": len(part) / one.seconds,
                        "p50_ms": one.latency(0.5),
                    }
                    for name, one in runs.items()
                },
                "layers_saved": _saved([kinds[name][1].blocks[-1] for name in opened]),
                "compared": sum(compared.values()) / max(1, sum(opened.values())),
            }
        )
        before = now
    return found, kinds


def _saved(blocks: Sequence[tuple[float, float, int]]) -> float:
    """The share of the token-layers of these kinds that a block skipped."""
    skipped, possible = np.sum([block[:2] for block in blocks], axis=0) if blocks else (0, 0)
    return float(skipped / max(possible, 1))


def _kind_of(body: Mapping[str, Any], salt: bytes) -> str | None:
    """The server's name of the kind of a request; None for free text."""
    if labels := body.get("allowed_token_ids"):
        return Kind("label", tuple(sorted(labels))).name(salt)
    if choices := (body.get("structured_outputs") or {}).get("choice"):
        return Kind("choice", choices=tuple(sorted(choices))).name(salt)
    return None


def _title(line: Mapping[str, Any]) -> str:
    """The name of a kind in the file: the part of `custom_id` before the first slash."""
    return str(line["custom_id"]).split("/")[0]


def _added(
    now: Mapping[str, float], before: Mapping[str, float], series: str, label: str, value: str
) -> float:
    """The growth of a counter, over all series with a value of a label, or of a part of it."""
    own = re.compile(f'{label}="{re.escape(value)}(:{LAST_TOKEN})?"')
    chosen = [name for name in now if f":{series}" in name and own.search(name)]
    return sum(now[name] - before.get(name, 0.0) for name in chosen)


def _claim(ledger: Mapping[str, Any]) -> float | None:
    """The most changed answers, by a ledger's file."""
    bounds = [bound for bound in ledger.get("bounds", ()) if bound is not None]
    return min(bounds) if ledger.get("decided") and bounds else None


if __name__ == "__main__":
    typer.run(main)
