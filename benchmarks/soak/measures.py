"""A server's metrics and memory, to compare before and after a scenario."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import psutil

from benchmarks.common.server import Server

REST_SECONDS = 120
UNHEARD = 8  # steps a request may still run after its client disconnected
MIB = 2**20


def totals(server: Server) -> dict[str, float]:
    """Each metric, summed over its labels."""
    sums: Counter[str] = Counter()
    for prefix in ("vllm:", "adainfer:"):
        for series, value in server.metrics(prefix).items():
            sums[series.partition("{")[0]] += value
    return dict(sums)


def of_policy(server: Server, name: str) -> dict[str, float]:
    """The plugin's metrics of one policy; they vanish when its adapter is unloaded."""
    return {
        series.partition("{")[0]: value
        for series, value in server.metrics("adainfer:").items()
        if f'policy="{name}"' in series and "_bucket{" not in series
    }


def at_rest(server: Server) -> dict[str, float]:
    """Metrics, read once no request runs or waits and no counter moves.

    A RuntimeError if the server is still busy after `REST_SECONDS`.
    """
    end = time.monotonic() + REST_SECONDS
    before: dict[str, float] = {}
    while time.monotonic() < end:
        now = totals(server)
        keys = [key for key in now if key.startswith("adainfer:") or "tokens" in key]
        busy = now["vllm:num_requests_running"] + now["vllm:num_requests_waiting"]
        if not busy and before and all(now[key] == before[key] for key in keys):
            return now
        before = now
        time.sleep(1)
    raise RuntimeError(f"the server is not idle {REST_SECONDS} s after the last request")


def counters(
    before: Mapping[str, float], after: Mapping[str, float], layers: int
) -> dict[str, Any]:
    """The numbers that a scenario added to the plugin's counters, and to vLLM's for comparison.

    A row is a token that goes through the layers: each uncached prompt token, and each generated
    token but a request's last. vLLM counts what it has sent to the API server. So after a client
    disconnects, vLLM misses tokens decided in the current step or before the engine learns of it,
    and a prompt whose first token was never sent. The rest of a choice, which the scheduler
    appends, is not decided and has no rows.
    """

    def added(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    run, skipped = (added(f"adainfer:layer_rows_{what}_total") for what in ("executed", "skipped"))
    prompts = added("vllm:prompt_tokens_total") - added("vllm:prompt_tokens_cached_total")
    generated = added("vllm:generation_tokens_total")
    generated -= added("adainfer:choice_tokens_appended_total")
    return {
        "tokens_decided": added("adainfer:exit_layer_count"),
        "tokens_generated": generated,
        "rows": (run + skipped) / layers,
        "rows_by_vllm": prompts + generated - added("vllm:request_success_total"),
        "layers_saved": skipped / max(run + skipped, 1),
        "preemptions": added("vllm:num_preemptions_total"),
    }


def counter_problems(found: Mapping[str, Any], left: int, longest: int) -> list[str]:
    """Sentences on counters that do not add up, see `counters`.

    The clients of `left` requests disconnected; the longest prompt has `longest` tokens.
    """
    problems = []
    tokens = found["tokens_decided"] - found["tokens_generated"]
    if not 0 <= tokens <= left * UNHEARD:
        problems.append(
            f"{tokens:+.0f} tokens decided beyond vLLM's count, with {left} requests left"
        )
    rows = found["rows"] - found["rows_by_vllm"]
    if not found["preemptions"] and not -left <= rows <= left * (longest + UNHEARD):
        problems.append(f"{rows:+.1f} rows beyond vLLM's count, with {left} requests left")
    return problems


def memory(server: Server) -> dict[str, float]:
    """Memory of all processes of a server, in MiB."""
    parent = psutil.Process(server.process.pid)
    infos = [one.memory_full_info() for one in (parent, *parent.children(recursive=True))]
    return {
        "rss": sum(info.rss for info in infos) / MIB,
        "uss": sum(info.uss for info in infos) / MIB,
    }
