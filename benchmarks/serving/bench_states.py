r"""Several questions about one state, as decision endpoints send them: ours against stock.

    .venv/bin/python benchmarks/serving/bench_states.py --model MODEL --artifact POLICY \
        --data texts.jsonl

POLICY has a label pool of letters, yes and no. States are made by joining the `text` of rows; the
questions are those that `suite/fine_tune.py --questions` teaches. vLLM sends several questions
about a state as simultaneous requests that share a prefix, as this does. Each state is asked
about twice with the same questions: when it is new, and again when its prefix may be cached. Stock,
our server and one of ours that never exits run side by side and take turns at each state.

Ours and stock's answers are compared, and stock's when the state is new with those again, which
rounding alone changes. The benchmark fails if a request fails or does not get exactly one answer.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, cycle
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer
from tqdm import tqdm

from benchmarks.common.decisions import QUESTIONS
from benchmarks.common.intervals import control, share_of
from benchmarks.common.report_files import write_report
from benchmarks.common.server import Server, let_others_rest
from benchmarks.serving.label_requests import post
from benchmarks.serving.serve_report import NEVER, OURS, STOCK
from benchmarks.serving.side_by_side import side_by_side
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.offline.calibration.data.examples import read_rows
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.speedup import Speedup
from vllm_adainfer.promise.tolerance import Tolerance

ASKED = [*chain.from_iterable(QUESTIONS.values())]
COUNTS, LENGTHS = (1, 4, 16), (100, 400, 1500)
WARM_UP = 4  # untimed states before the timed ones


def main(
    model: Annotated[str, typer.Option()],
    artifact: Annotated[str, typer.Option()],
    data: Annotated[Path, typer.Option(help="JSON lines with a `text`.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/states.json"),
    states: Annotated[
        int, typer.Option(min=1, help="States per length and number of questions.")
    ] = 8,
) -> None:
    """Measure, and write JSON and a Markdown table."""
    config = load_artifact_config(artifact)
    hf_config, tokenizer = load_config_and_tokenizer(model)
    config.check_served_by(hf_config)
    texts = cycle([str(row.fields["text"]) for row in read_rows(data)])
    key = "allowed_token_ids" if not isinstance(config.promise, Tolerance) else "logprob_token_ids"
    flags = ["--max-model-len", "2048"]
    with side_by_side(model, {"artifact": artifact}, flags, control=True) as servers:
        cells = [
            cell(servers, state_of(texts, tokenizer, length), tokenizer, key, length, count, states)
            for length in tqdm(LENGTHS, desc="lengths")
            for count in COUNTS
        ]
    report = {
        "model": config.base_model,
        "artifact": Path(artifact).name,
        "epsilon": config.epsilon,
        "states": states,
        "cells": cells,
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def state_of(texts: Iterator[str], tokenizer: Any, tokens: int) -> Iterator[str]:
    """States of about `tokens` tokens; no text is used twice before all are used up."""
    while True:
        state = ""
        while len(tokenizer.encode(state)) < tokens:
            state += f"{next(texts)} "
        yield tokenizer.decode(tokenizer.encode(state)[:tokens])


def questions(state: str, count: int, tokenizer: Any, key: str) -> list[dict[str, Any]]:
    """Requests as ``/v1/systemone`` makes them for `count` questions, all of them different."""
    bodies = []
    for number in range(count):
        question = ASKED[number % len(ASKED)]
        if number >= len(ASKED):
            question = replace(question, text=f"Once more: {question.text}")
        replies = question.replies
        ids = [tokenizer.encode(reply, add_special_tokens=False)[0] for reply in replies]
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": question.prompt(state)}],
            "max_completion_tokens": 1,
            "temperature": 0,
            key: ids,
        }
        bodies.append({**body, "logprobs": True} if key == "logprob_token_ids" else body)
    return bodies


def cell(
    servers: dict[str, Server],
    texts: Iterator[str],
    tokenizer: Any,
    key: str,
    length: int,
    count: int,
    states: int,
) -> dict[str, Any]:
    """Seconds per state, new and again, by server, after `WARM_UP` untimed states; and answers.

    ``differ`` counts answers of ours that are not stock's, of so many ``answers``; ``rounding``
    those of stock's to a state again that are not its first ones.
    """
    seconds: dict[str, dict[str, list[float]]] = {
        name: {"new": [], "again": []} for name in servers
    }
    changed: Counter[str] = Counter(differ=0, answers=0, rounding=0)
    for server in servers.values():
        post(server, "/reset_prefix_cache")
    for number in range(-WARM_UP, states):
        bodies = questions(next(texts), count, tokenizer, key)
        order = list(servers) if number % 2 else list(servers)[::-1]
        answers: dict[tuple[str, str], list[str]] = {}
        for name in order:
            let_others_rest()
            for touch in "new", "again":
                spent, answers[name, touch] = ask(servers[name], bodies)
                if number >= 0:
                    seconds[name][touch].append(spent)
        if number >= 0:
            for touch in "new", "again":
                changed["differ"] += differing(answers[OURS, touch], answers[STOCK, touch])
            changed["answers"] += 2 * count
            changed["rounding"] += differing(answers[STOCK, "again"], answers[STOCK, "new"])
    return {"state_tokens": length, "questions": count, "seconds": seconds, **changed}


def differing(some: Sequence[str], others: Sequence[str]) -> int:
    """How many answers differ."""
    return sum(one != other for one, other in zip(some, others, strict=True))


def ask(server: Server, bodies: Sequence[dict[str, Any]]) -> tuple[float, list[str]]:
    """Seconds until all questions, sent together, are answered; and the answers."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = list(pool.map(lambda body: post(server, "/v1/chat/completions", body), bodies))
    spent = time.perf_counter() - start
    strange = [answer for answer in answers if len(answer["choices"]) != 1]
    if strange:
        raise RuntimeError(f"not one answer: {strange[0]}")
    return spent, [answer["choices"][0]["message"]["content"] for answer in answers]


def table(report: dict[str, Any]) -> str:
    """Markdown: a row per length and count, with median times and their ratio."""
    rows = []
    for one in report["cells"]:
        cells = [str(one["state_tokens"]), str(one["questions"])]
        for touch in "new", "again":
            stock, ours, never = (one["seconds"][name][touch] for name in (STOCK, OURS, NEVER))
            cells += [
                f"{1000 * statistics.median(stock):.0f} / {1000 * statistics.median(ours):.0f}",
                Speedup.of(stock, ours).bold,
                control(Speedup.of(stock, never)),
            ]
        answers = one["answers"]
        cells.append(share_of(one["differ"] / answers, answers))
        cells.append(share_of(2 * one["rounding"] / answers, answers // 2))
        rows.append(cells)
    columns = ["tokens of the state", "questions"]
    columns += [
        name for touch in ("new", "again") for name in (f"{touch}, ms", "", "never exiting")
    ]
    columns += ["answers other than stock's (95 %)", "stock's own, again (95 %)"]
    return markdown_grid(columns, rows, text_columns=0) + "\n"


if __name__ == "__main__":
    typer.run(main)
