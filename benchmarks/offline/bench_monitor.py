r"""How soon shadow requests close a bound that no longer holds, and how often one that does.

    .venv/bin/python benchmarks/offline/bench_monitor.py

Simulated answers, the project's own monitors, a few minutes on one core; no model. Beside them
stands the rule by which bounds were closed before: once the whole interval since start lies above
epsilon. It is computed from the interval that the monitors still show.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer

from benchmarks.common.intervals import share_of
from benchmarks.common.report_files import write_report
from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.engine.compat.requests import request_group
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.watch.intervals import confidence_interval
from vllm_adainfer.watch.units import ENDED_SINCE, Grouping
from vllm_adainfer.watch.watch import Watch

EPSILON, ALPHA, GOOD = 0.02, 0.1, 0.01
PASTS, THEN = (0, 2_000, 20_000, 200_000), (0.04, 0.1, 0.3)
MOST = 40_000  # answers after the change
HOLDING, WATCHED = (0.012, 0.018, 0.02), 20_000  # rates within epsilon; answers compared in a run
QUESTIONS, COIN = (8, 20), 0.2  # of one text; the shadow rate where each question is drawn alone
STEP = 1_000  # answers that are given to a monitor at a time


def closed_after(monitor: Watch, wrong: Bools) -> int | None:
    """The number of answers after which the monitor closes; None if it does not."""
    before = monitor.readings()[0].checked
    for start in range(0, len(wrong), STEP):
        part = wrong[start : start + STEP]
        for told in monitor.observe([""] * len(part), np.zeros(len(part), np.int64), part):
            return told.checked - before
    return None


def closed_before(wrong: Bools, past: int = 0) -> int | None:
    """The same by the interval since start, after `past` answers that are the first of `wrong`."""
    found = wrong.cumsum()
    for place in np.flatnonzero(wrong & (found > EPSILON * np.arange(1, len(wrong) + 1))).tolist():
        if confidence_interval(int(found[place]), place + 1, ALPHA)[0] >= EPSILON:
            return int(place) + 1 - past
    return None


def noticed(past: int, runs: int, generator: np.random.Generator) -> list[dict[str, Any]]:
    """After how many answers each rate is noticed that follows on `past` good ones."""
    found: dict[float, list[tuple[int | None, int | None]]] = {rate: [] for rate in THEN}
    for _ in range(runs):
        good = generator.random(past) < GOOD
        monitor = Watch([EPSILON], ALPHA)
        if closed_after(monitor, good) is not None:
            continue  # a false alarm, which is counted elsewhere
        for rate in THEN:
            bad = generator.random(MOST) < rate
            before = closed_before(np.concatenate([good, bad]), past)
            found[rate].append((before, closed_after(deepcopy(monitor), bad)))
    return [
        {"past": past, "rate": rate, "runs": len(pairs)}
        | {
            name: median(MOST if one is None else one for one in column)
            for name, column in zip(("before", "now"), zip(*pairs, strict=True), strict=True)
        }
        for rate, pairs in found.items()
    ]


def falsely_closed(rate: float, runs: int, generator: np.random.Generator) -> dict[str, Any]:
    """In how many runs a bound that holds is closed, where answers are independent."""
    streams = [generator.random(WATCHED) < rate for _ in range(runs)]
    now = [closed_after(Watch([EPSILON], ALPHA), one) for one in streams]
    before = [closed_before(one) for one in streams]
    return {"questions": 1, "rate": rate, "runs": runs, **_closings(before, now)}


def falsely_closed_groups(
    questions: int, rate: float, runs: int, generator: np.random.Generator
) -> dict[str, Any]:
    """The same where all answers about one text are wrong, or none is."""
    before: list[int | None] = []
    now: list[int | None] = []
    for _ in range(runs):
        drawn = generator.binomial(questions, COIN, round(WATCHED / questions / COIN))
        before.append(closed_before(np.repeat(generator.random(len(drawn)) < rate, drawn)))
        now.append(_closed_by_group(generator.random(WATCHED // questions) < rate, questions))
    return {"questions": questions, "rate": rate, "runs": runs, **_closings(before, now)}


def _closed_by_group(wrong: Bools, questions: int) -> int | None:
    """After how many texts the monitor of such requests closes; None if it does not."""
    monitor = Watch([EPSILON], ALPHA, Grouping(questions, request_group))
    levels: Ints = np.zeros(questions, np.int64)
    for text, all_wrong in enumerate(wrong.tolist()):
        ids = [f"decision-{text}-{place}" for place in range(questions)]
        monitor.observe(ids, levels, np.full(questions, all_wrong))
        for one in ids:
            monitor.ended(one)
        if monitor.tightened[0]:
            return text
    for _ in range(ENDED_SINCE):
        monitor.ended("another")
    return len(wrong) if monitor.tightened[0] else None


def _closings(before: Sequence[int | None], now: Sequence[int | None]) -> dict[str, int]:
    return {
        name: sum(one is not None for one in found)
        for name, found in (("before", before), ("now", now))
    }


def main(
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/monitor.json"),
    runs: Annotated[int, typer.Option(min=10, help="Runs of most cells.")] = 100,
) -> None:
    """Simulate, and write JSON and Markdown tables."""
    generator = np.random.default_rng(0)
    report = {
        "epsilon": EPSILON,
        "alpha": ALPHA,
        "good": GOOD,
        "most": MOST,
        "compared": WATCHED,
        "coin": COIN,
        "noticed": [
            row
            for past in PASTS
            for row in noticed(past, runs // (5 if past == PASTS[-1] else 1), generator)
        ],
        "falsely_closed": [
            *(falsely_closed(rate, 2 * runs, generator) for rate in HOLDING),
            *(
                falsely_closed_groups(questions, rate, runs // 2, generator)
                for questions in QUESTIONS
                for rate in (HOLDING[0], HOLDING[-1])
            ),
        ],
        "provenance": provenance(),
    }
    write_report(output, report, tables(report))


def tables(report: Mapping[str, Any]) -> str:
    """Markdown: how soon bad traffic is noticed, and how often good traffic is taken for it."""
    most = report["most"]

    def answers(row: Mapping[str, Any]) -> str:
        before, now = (
            f"{row[name]:,.0f}" if row[name] < most else f"not in {most:,}"
            for name in ("before", "now")
        )
        return f"{before} / **{now}**"

    cells = {(row["past"], row["rate"]): answers(row) for row in report["noticed"]}
    pasts, rates = (list(dict.fromkeys(one)) for one in zip(*cells, strict=True))
    noticed = markdown_grid(
        ["good answers compared before", *(f"then {100 * rate:g} % wrong" for rate in rates)],
        [[f"{past:,}", *(cells[past, rate] for rate in rates)] for past in pasts],
    )
    closed = markdown_grid(
        ["questions about one text", "wrong", "runs", "before (95 %)", "now (95 %)"],
        [
            [
                f"{row['questions']}",
                f"{100 * row['rate']:g} %",
                f"{row['runs']}",
                *(share_of(row[name] / row["runs"], row["runs"]) for name in ("before", "now")),
            ]
            for row in report["falsely_closed"]
        ],
    )
    return (
        "Compared answers until a bound closes (median, before / **now**), at epsilon "
        f"{100 * report['epsilon']:g} %, delta {100 * report['alpha']:g} %, after answers of which "
        f"{100 * report['good']:g} % were wrong:\n\n{noticed}\n\n"
        f"Runs of {report['compared']:,} compared answers in which a bound that holds is closed. "
        "Questions about one text are wrong together; before, each was drawn alone (shadow rate "
        f"{report['coin']:g}), now all of them or none:\n\n{closed}"
    )


if __name__ == "__main__":
    typer.run(main)
