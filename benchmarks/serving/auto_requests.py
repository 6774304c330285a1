r"""Requests for `bench_auto.py`: lines of a vLLM batch file, each row of the data once.

    .venv/bin/python benchmarks/serving/auto_requests.py --model MODEL --data DIR \
        --traffic mixture --output requests.jsonl

DIR has a folder for each task, with `train.jsonl` and `test.jsonl`.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.tasks import TASKS
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer


class Part(NamedTuple):
    """Requests of one kind: the task whose template and labels they have, and their rows."""

    kind: str
    task: str
    rows: tuple[str, ...]
    is_choice: bool = False


REVIEWS = Part("SST-2 and CR", "sst2", ("sst2", "cr"))
TREC = Part("TREC", "trec", ("trec",))
SUBJ = Part("Subj and news, choice", "subj", ("subj",), is_choice=True)
NEWS = Part("Subj and news, choice", "subj", ("ag_news",), is_choice=True)
NEWS_AS_REVIEWS = Part("SST-2 and CR", "sst2", ("ag_news",))


Traffic = Literal["reviews", "mixture", "drift"]
# What comes, in phases; of each phase all rows, in random order.
PHASES: Mapping[Traffic, Sequence[Sequence[Part]]] = {
    "reviews": [[REVIEWS]],
    "mixture": [[REVIEWS, TREC, SUBJ, NEWS]],
    "drift": [[REVIEWS], [NEWS_AS_REVIEWS], [REVIEWS]],
}


def main(
    model: Annotated[str, typer.Option(help="Its tokenizer names the labels.")],
    data: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()],
    traffic: Annotated[Traffic, typer.Option()] = "reviews",
    limit: Annotated[int | None, typer.Option(min=1, help="The most of each phase.")] = None,
) -> None:
    """Write the requests."""
    tokenizer = load_config_and_tokenizer(model)[1]
    used: dict[str, int] = {}
    with output.open("w") as file:
        for number, parts in enumerate(PHASES[traffic]):
            asked = [(part, row) for part in parts for row in _rows(part, data)]
            random.Random(number).shuffle(asked)
            for place, (part, row) in enumerate(_unused(asked, used)):
                if limit is not None and place == limit:
                    break
                used[row["text"]] = number
                body = _body(part, row, tokenizer)
                line = {"custom_id": f"{part.kind}/{number}-{place}", "method": "POST"}
                file.write(json.dumps({**line, "url": "/v1/completions", "body": body}) + "\n")


def _rows(part: Part, data: Path) -> Iterator[Mapping[str, Any]]:
    for task in part.rows:
        for name in "train", "test":
            lines = (data / task / f"{name}.jsonl").read_text().splitlines()
            yield from map(json.loads, lines)


def _unused(
    asked: list[tuple[Part, Mapping[str, Any]]], used: Mapping[str, int]
) -> Iterator[tuple[Part, Mapping[str, Any]]]:
    """Rows that no earlier phase had: the prefix cache would have them."""
    return (one for one in asked if one[1]["text"] not in used)


def _body(part: Part, row: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    task = TASKS[part.task]
    texts = [f" {label}" for label in task.labels.values()]
    body = {
        "model": "model",
        "prompt": task.template.format(text=row["text"][:500]),
        "max_tokens": 1,
        "temperature": 0,
    }
    if part.is_choice:
        return {**body, "max_tokens": 16, "structured_outputs": {"choice": texts}}
    return {**body, "allowed_token_ids": [tokenizer.encode(text)[0] for text in texts]}


if __name__ == "__main__":
    typer.run(main)
