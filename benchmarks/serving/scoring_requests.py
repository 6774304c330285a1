"""Requests to ``/generative_scoring``: untimed, to compare scores, or as a timed load.

A score is the first label's probability among the labels. ``vllm bench serve`` does not support
that endpoint, so the load is sent from here: at a rate with exponential gaps, as there, or all at
once.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.common.server import Server
from benchmarks.serving.label_requests import TOGETHER, Load, post
from benchmarks.serving.sending import send
from benchmarks.serving.serve_report import OURS, STOCK
from vllm_adainfer.offline.calibration.data.examples import Example


def scores(server: Server, load: Load, examples: Sequence[Example]) -> list[float]:
    """The score of each prompt; a request holds many prompts as items."""
    post(server, "/reset_prefix_cache")
    found: list[float] = []
    for start in range(0, len(examples), TOGETHER):
        texts = [example.text for example in examples[start : start + TOGETHER]]
        data = post(server, "/generative_scoring", body_of(load, texts))["data"]
        found += [one["score"] for one in sorted(data, key=lambda one: one["index"])]
    check_scores(found)
    return found


def body_of(load: Load, texts: Sequence[str]) -> dict[str, Any]:
    """The body of a request for the scores of `texts`."""
    labels = list(load.label_ids)
    return {"model": "model", "query": "", "items": list(texts), "label_token_ids": labels}


def compare_scores(
    servers: Mapping[str, Server], load: Load, examples: Sequence[Example], tolerance: float
) -> dict[str, Any]:
    """How far our scores are from stock's, and stock's from its own in batches of one.

    This also warms up both servers.
    """
    stock, ours = (np.array(scores(servers[name], load, examples)) for name in (STOCK, OURS))
    alone = np.array([scores(servers[STOCK], load, [example])[0] for example in examples])
    return {
        "n": len(examples),
        "tolerance": tolerance,
        "moves": moves(ours, stock, tolerance),
        "moves_of_stock_alone": moves(alone, stock, tolerance),
    }


def moves(some: np.ndarray, others: np.ndarray, tolerance: float) -> dict[str, float]:
    """Statistics of the absolute differences between two sets of scores."""
    moved = np.abs(some - others)
    return {
        "mean": float(moved.mean()),
        "p95": float(np.quantile(moved, 0.95)),
        "largest": float(moved.max()),
        "beyond_tolerance": float((moved > tolerance).mean()),
    }


def bench(server: Server, load: Load, rate: float, seed: int) -> dict[str, Any]:
    """Send the load, one prompt per request; returns figures named as in ``vllm bench serve``.

    `rate` is in requests per second, infinity sends all at once; `seed` fixes order and times.

    A RuntimeError if a request failed, or its score is not a probability.
    """
    generator = random.Random(seed)
    examples = list(load.examples)
    generator.shuffle(examples)
    finite = math.isfinite(rate)
    gaps = [generator.expovariate(rate) if finite else 0.0 for _ in examples]
    bodies = [body_of(load, [example.text]) for example in examples]
    sent = send(server, "/generative_scoring", bodies, gaps)
    check_scores([item["score"] for answer in sent.answers for item in answer["data"]])
    mean = 1000 * statistics.mean(sent.latencies)
    p50, p99 = sent.latency(0.5), sent.latency(0.99)
    return {
        "request_throughput": len(examples) / sent.seconds,
        "mean_ttft_ms": mean,
        "median_ttft_ms": p50,
        "p99_ttft_ms": p99,
        "mean_e2el_ms": mean,
        "p50_e2el_ms": p50,
        "p99_e2el_ms": p99,
        "duration": sent.seconds,
        "completed": len(examples),
        "failed": 0,
    }


def check_scores(found: Sequence[float]) -> None:
    """Check that all scores are probabilities. A RuntimeError if a score is not a probability."""
    strange = [score for score in found if not 0 <= score <= 1]
    if strange:
        raise RuntimeError(f"scores that are not probabilities: {strange[:10]}")
