"""Objects of one schema: all unseen requests once, then rounds by the number in flight."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.offline.structured_engine import OURS, STOCK, Engine, Request
from benchmarks.offline.structured_requests import Body, read
from benchmarks.offline.structured_rounds import in_round, summed
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.offline.evaluation.rounds import in_rounds
from vllm_adainfer.stats import stats

DRAFTS, STUDENT = "drafts alone", "with a student"
OBJECTS = {1: 4, 16: 32, 64: 64}  # in a round, by the number in flight
UNSEEN_IN_FLIGHT = 16


def of_schema(
    engines: Mapping[str, Engine], bodies: Sequence[Body], rounds: int, policy: Path
) -> dict[str, Any]:
    """All that is measured of requests with these bodies, whose objects `policy` decides."""
    requests = read(bodies, engines[STOCK].llm.get_tokenizer())
    unseen = of_unseen(engines, requests, policy)
    number = dict.fromkeys(engines, 0)

    def once(name: str) -> dict[int, Any]:
        number[name] += 1
        return {
            in_flight: engines[name].send(in_round(requests, number[name] - 1, count), in_flight)
            for in_flight, count in OBJECTS.items()
        }

    runs = in_rounds(list(engines), rounds, once)
    return {
        "unseen": unseen,
        "in_flight": [
            {"number": one, "objects": count}
            | {name: summed([run[one] for run in each]) for name, each in runs.items()}
            for one, count in OBJECTS.items()
        ],
    }


def of_unseen(
    engines: Mapping[str, Engine], requests: Sequence[Request], policy: Path
) -> dict[str, Any]:
    """What each engine writes for all requests, beside drafts alone, which run at full depth.

    Stock writes them a second time, with other requests in a step: what rounding changes.
    """
    objects = load_artifact_config(str(policy)).objects
    assert objects is not None
    fields = [field.path for field in objects.fields]
    found, texts = {}, {}
    for name, engine in engines.items():
        before = counted(engine, name)
        sent = engine.send(requests, UNSEEN_IN_FLIGHT)
        after = counted(engine, name)
        texts[name] = [values_of(text) for text in sent.texts]
        found[name] = {key: after[key] - before[key] for key in after} | {
            "rows": sent.counts.rows,
            "steps": sent.counts.steps,
            "tokens": sent.tokens,
        }
    again = engines[STOCK].send(requests[::-1], 1 + UNSEEN_IN_FLIGHT // 2).texts[::-1]
    texts["stock again"] = [values_of(text) for text in again]
    pairs = {name: (DRAFTS, name) for name in engines if name not in (DRAFTS, STOCK)}
    pairs |= {DRAFTS: (STOCK, DRAFTS), STOCK: (STOCK, "stock again")}
    for name, (full, other) in pairs.items():
        both = [*zip(texts[full], texts[other], strict=True)]
        found[name]["differ"] = sum(one != another for one, another in both)
        found[name]["by_field"] = {
            path: sum(one.get(path) != another.get(path) for one, another in both)
            for path in fields
        }
    return {"compared": len(requests), "engines": found}


def counted(engine: Engine, name: str) -> dict[str, int]:
    """Objects that were early, and layers of rows that ran, of all that could."""
    if name not in (OURS, STUDENT):
        return {}
    now = stats(engine.llm)
    depth = max(now["exit_histogram"], default=0)
    early = sum(count for layer, count in now["exit_histogram"].items() if layer < depth)
    return {key: now[key] for key in ("layers_run", "layers_possible")} | {"early": early}


def values_of(text: str) -> dict[str, str]:
    """The values of an object, as JSON, by their paths; empty for a text that is none."""
    try:
        json.loads(text)
    except ValueError:
        return {}
    return {path: json.dumps(value) for path, value in leaves(json.loads(text))}


def leaves(value: Any, path: str = "") -> list[tuple[str, Any]]:
    """The values in nested objects, by their paths."""
    if not isinstance(value, dict):
        return [(path, value)]
    return [
        leaf
        for name, inner in value.items()
        for leaf in leaves(inner, f"{path}.{name}" if path else name)
    ]
