r"""Requests of one kind for `bench_auto.py`: is a review positive or negative?

    .venv/bin/python benchmarks/serving/auto_requests.py --model MODEL --data DIR \
        --output requests.jsonl

DIR has `sst2` and `cr`, each with `train.jsonl` and `test.jsonl`. All their rows become requests,
in random order.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.tasks import TASKS
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer

FILES = [f"{task}/{part}.jsonl" for task in ("sst2", "cr") for part in ("train", "test")]


def main(
    model: Annotated[str, typer.Option(help="Its tokenizer names the labels.")],
    data: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()],
    limit: Annotated[int | None, typer.Option(min=1, help="The most requests.")] = None,
) -> None:
    """Write lines of a vLLM batch file."""
    tokenizer = load_config_and_tokenizer(model)[1]
    labels = [tokenizer.encode(f" {label}")[0] for label in TASKS["sst2"].labels]
    rows = [json.loads(line) for file in FILES for line in (data / file).read_text().splitlines()]
    random.Random(0).shuffle(rows)
    lines = [
        {
            "custom_id": f"reviews/{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {
                "model": "model",
                "prompt": TASKS["sst2"].template.format(text=row["text"]),
                "max_tokens": 1,
                "temperature": 0,
                "allowed_token_ids": labels,
            },
        }
        for number, row in enumerate(rows[:limit])
    ]
    output.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


if __name__ == "__main__":
    typer.run(main)
