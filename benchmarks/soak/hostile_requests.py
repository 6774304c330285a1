"""Odd requests that a server must either refuse with a sentence or answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

LONG = "x" * 2**20
MANY = range(5000)
DEEP: Any = 1
for _ in range(50):
    DEEP = [DEEP]

# Name -> value of ``vllm_xargs``.
REFUSED: dict[str, Any] = {
    "unknown policy": {"adainfer_policy": "nope"},
    "empty policy": {"adainfer_policy": ""},
    "number as policy": {"adainfer_policy": 1},
    "path as policy": {"adainfer_policy": "../../etc/passwd"},
    "absolute path as policy": {"adainfer_policy": "/etc/passwd"},
    "NUL in policy": {"adainfer_policy": "sst2\0"},
    "line breaks in policy": {"adainfer_policy": "a\nERROR: a line of the log"},
    "format string as policy": {"adainfer_policy": "{0.__class__}%s%n$(id)`id`"},
    "full_depth as policy": {"adainfer_policy": "full_depth"},
    "lone surrogate as policy": {"adainfer_policy": "\ud800"},
    "1 MiB policy": {"adainfer_policy": LONG},
    "1 MiB key of ours": {f"adainfer_{LONG}": 1},
    "1 MiB epsilon": {"adainfer_epsilon": LONG},
    "epsilon NaN": {"adainfer_epsilon": float("nan")},
    "epsilon Infinity": {"adainfer_epsilon": float("inf")},
    "epsilon -Infinity": {"adainfer_epsilon": float("-inf")},
    "epsilon 1e308": {"adainfer_epsilon": 1e308},
    "epsilon 1": {"adainfer_epsilon": 1},
    "epsilon below 0": {"adainfer_epsilon": -0.02},
    "epsilon as text": {"adainfer_epsilon": "0.02"},
    "epsilon as list": {"adainfer_epsilon": [0.02]},
    "epsilon stricter than certified": {"adainfer_epsilon": 1e-9},
    "epsilon denormal": {"adainfer_epsilon": 5e-324},
    "exit without a script": {"adainfer_exit": 4},
    "row without recording": {"adainfer_row": 0},
    "unknown key of ours": {"adainfer_nope": 1},
    "lone surrogate in a key of ours": {"adainfer_\ud800": 1},
    "our prefix alone": {"adainfer_": 1},
    "thousands of keys of ours": {f"adainfer_{number}": number for number in MANY},
    "object as value": {"adainfer": {"a": {"b": 1}}},
    "nested list": {"adainfer": DEEP},
    "null": {"adainfer": None},
    "list": {"adainfer": [1]},
    "empty list": {"adainfer": []},
    "2": {"adainfer": 2},
    "-1": {"adainfer": -1},
    "0.5": {"adainfer": 0.5},
    "NaN": {"adainfer": float("nan")},
    "maybe": {"adainfer": "maybe"},
    "empty string": {"adainfer": ""},
    "400 digits": {"adainfer": 10**400},
    "vllm_xargs is a list": [1],
    "vllm_xargs is text": "adainfer",
    "vllm_xargs is a number": 1e308,
}
ANSWERED: dict[str, Any] = {
    "no keys": {},
    "vllm_xargs is null": None,
    "0": {"adainfer": 0},
    "1": {"adainfer": 1},
    "true": {"adainfer": True},
    "1.0": {"adainfer": 1.0},
    "yes": {"adainfer": "yes"},
    "epsilon 0": {"adainfer_epsilon": 0},
    "epsilon -0.0": {"adainfer_epsilon": -0.0},
    "epsilon certified": {"adainfer_epsilon": 0.05},
    "the scheduler's own key": {"_adainfer": 1},
    "the scheduler's own key, 1 MiB": {"_adainfer": LONG},
    "another case": {"ADAINFER": "nope"},
    "thousands of keys of others": {f"key{number}": number for number in MANY},
    "1 MiB key and value of others": {LONG: LONG},
    "NaN of others": {"other": float("nan")},
}
# vLLM 0.32 answers these with a 500, with or without the plugin: it cannot encode them.
STOCK_500: dict[str, Any] = {
    "lone surrogate as value of others": {"other": "\ud800"},
    "lone surrogate in a key of others": {"other\ud800": 1},
}
# Bodies that are not JSON, or not an object.
BROKEN: dict[str, bytes] = {
    "empty": b"",
    "cut off": b'{"model": "model", "prompt": "a", "vllm_xargs": {"adainfer":',
    "not UTF-8": b'{"model": "model", "prompt": "\xff\xfe"}',
    "a list": b"[]",
    "100,000 brackets": b'{"model": "model", "prompt": "a", "vllm_xargs":' + b"[" * 100_000,
}


def hostile(body: Mapping[str, Any]) -> list[tuple[str, Any, tuple[int, ...]]]:
    """Name, body and permitted statuses of each request; `body` is their common part."""
    found: list[tuple[str, Any, tuple[int, ...]]] = []
    for cases, statuses in ((REFUSED, (400,)), (ANSWERED, (200,)), (STOCK_500, (400, 500))):
        found += [(name, {**body, "vllm_xargs": value}, statuses) for name, value in cases.items()]
    found += [(f"body: {name}", raw, (400, 422)) for name, raw in BROKEN.items()]
    return found


def cheap_refused(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The requests to be refused that are short."""
    bodies = [{**body, "vllm_xargs": value} for value in REFUSED.values()]
    return [body for body in bodies if len(json.dumps(body)) < 10_000]
