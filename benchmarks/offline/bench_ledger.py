r"""The requests that a ledger lets exit, and when it closes a kind, by simulated traffic.

    .venv/bin/python benchmarks/offline/bench_ledger.py --label after

The package's own ledger, at epsilon 2 %, with coins and misses of a seeded generator. No model
runs.
The output file keeps results by `--label`, so that two commits can be compared.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.common.report_files import write_report
from vllm_adainfer.offline.facts.document import markdown_grid, markdown_table
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.watch.ledger import Ledger

EPSILON, DELTA, RATE = 0.02, 0.1, 0.25
RECORDED = 1500  # requests before there is a policy
SIZES = (16, 64, 128, 256, 512)  # first tokens of the kind in a step
AGES = (2_000, 10_000, 30_000, 100_000, 200_000)
MISSES = 0.008  # of the answers, by the policy, in good times
STEADY, STEADY_RUNS, STEADY_REQUESTS = (0.012, 0.014, 0.016, 0.018), 30, 300_000
CHANGES, GOOD, PATIENCE = (0.04, 0.1, 0.3), (0, 20_000, 200_000), 200_000
CHANGE_SIZES = (16, 256)


class Traffic:
    """A ledger, the requests that its policy answered, and those whose answer it changed."""

    def __init__(self, size: int, seed: int) -> None:
        """Count the recorded requests, in steps of `size`."""
        self.size, self._random = size, np.random.default_rng([seed, size])
        self.ledger = Ledger(EPSILON, DELTA, RATE)
        self.exits = self.changed = 0
        while self.ledger.requests < RECORDED:
            self.ledger.add(size, 0, 0)

    def go_on(self, requests: int, share: float) -> None:
        """Send so many more requests, or fewer if the kind is closed."""
        end = self.ledger.requests + requests
        while self.ledger.requests < end and not self.ledger.is_closed:
            coins = self._random.random(self.size) < self.ledger.rate
            decided = self.ledger.decidable(coins.tolist())
            coins = coins[:decided]
            missed = self._random.random(decided) < share
            self.exits += int((~coins).sum())
            self.changed += int((missed & ~coins).sum())
            self.ledger.add(self.size, decided, int((missed & coins).sum()))


def main(
    label: Annotated[str, typer.Option(help="Name of the result in the file.")],
    streams: Annotated[int, typer.Option(min=1, help="Runs of each case.")] = 10,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/ledger.json"),
) -> None:
    """Simulate, and write the JSON and the Markdown of `output`."""
    report = json.loads(output.read_text()) if output.exists() else {}
    report[label] = {
        "provenance": provenance(),
        "streams": streams,
        "exits": {size: exits_by_age(size, streams) for size in tqdm(SIZES, desc="exits")},
        "steady": {f"{share:g}": steady(share) for share in tqdm(STEADY, desc="steady traffic")},
        "changes": [
            change(size, good, share, streams)
            for size in tqdm(CHANGE_SIZES, desc="changes")
            for good in GOOD
            for share in CHANGES
        ],
    }
    report = json.loads(json.dumps(report))  # sizes become texts, as in the file
    write_report(output, report, tables(report))


def exits_by_age(size: int, streams: int) -> list[float]:
    """The share of requests that exit between two of `AGES`."""
    shares = []
    for seed in range(streams):
        traffic = Traffic(size, seed)
        traffic.go_on(AGES[0] - traffic.ledger.requests, MISSES)
        shares.append([])
        for begin, end in pairwise(AGES):
            before = traffic.exits
            traffic.go_on(end - begin, MISSES)
            shares[-1].append((traffic.exits - before) / (end - begin))
    return np.mean(shares, axis=0).tolist()


def steady(share: float) -> int:
    """The number of `STEADY_RUNS` kinds that are closed although their traffic never changes."""
    closed = 0
    for seed in range(STEADY_RUNS):
        traffic = Traffic(64, seed)
        traffic.go_on(STEADY_REQUESTS, share)
        closed += traffic.ledger.is_closed
    return closed


def change(size: int, good: int, share: float, streams: int) -> dict[str, Any]:
    """The requests until a kind is closed whose traffic changes after a good past; medians."""
    requests, changed = [], []
    for seed in range(streams):
        traffic = Traffic(size, seed)
        traffic.go_on(good, MISSES)
        begin, before = traffic.ledger.requests, traffic.changed
        traffic.go_on(PATIENCE, share)
        requests.append(traffic.ledger.requests - begin)
        changed.append(traffic.changed - before)
        if not traffic.ledger.is_closed:
            requests[-1] = math.inf
    middle = float(np.median(requests))
    return {
        "size": size,
        "good": good,
        "share": share,
        "requests": middle if middle < math.inf else None,
        "changed": float(np.median(changed)),
    }


def tables(report: Mapping[str, Any]) -> str:
    """Exits by age and size of the steps, and the kinds that are closed, and when; by label."""
    ages = [f"{begin:,} to {end:,}" for begin, end in pairwise(AGES)]
    results = list(report.values())
    exits = [
        [
            str(size),
            *(
                " / ".join(f"{one['exits'][str(size)][age]:.0%}" for one in results)
                for age in range(len(ages))
            ),
        ]
        for size in SIZES
    ]
    closed = [
        {
            "the policy would change": f"{share:.1%}",
            "closed": " / ".join(str(one["steady"][f"{share:g}"]) for one in results),
        }
        for share in STEADY
    ]
    changes = [
        {
            "first tokens in a step": str(cases[0]["size"]),
            "good requests before": f"{cases[0]['good']:,}",
            "then the policy would change": f"{cases[0]['share']:.0%}",
            "closed after": " / ".join(_count(case["requests"]) for case in cases),
            "answers changed": " / ".join(_count(case["changed"]) for case in cases),
        }
        for cases in zip(*(one["changes"] for one in results), strict=True)
    ]
    return "\n".join(
        [
            f"Requests that exit, by how many came before, where the policy would change "
            f"{MISSES:.1%} of all answers; {' / '.join(report)}:\n",
            markdown_grid(["first tokens of the kind in a step", *ages], exits),
            f"\nKinds of {STEADY_RUNS} that are closed within {STEADY_REQUESTS:,} requests of "
            "traffic that never changes:\n",
            markdown_table(closed),
            "\nTraffic that changes: requests until the kind is closed, and answers changed by "
            "then (medians):\n",
            markdown_table(
                changes,
            ),
        ]
    )


def _count(number: float | None) -> str:
    return "never" if number is None else f"{number:,.0f}"


if __name__ == "__main__":
    typer.run(main)
