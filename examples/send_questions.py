"""Send questions about the demo's reviews, as a client of a decision server would.

    python examples/send_questions.py --part calibration

There are two questions about each review, one with lettered options and one with yes or no. See
docs/decisions.md.
"""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from typing import Annotated, Any, Literal

import typer

QUESTIONS = {
    ("A", "B"): "Question: What does the customer think?\nA: it is bad\nB: it is good\n"
    "Answer with the letter of one option only.",
    ("yes", "no"): "Question: Is the customer satisfied?\nyes\nno\nAnswer with yes or no only.",
}


def main(
    part: Annotated[Literal["calibration", "test"], typer.Option()] = "test",
    server: Annotated[str, typer.Option()] = "http://127.0.0.1:8000",
    clients: Annotated[int, typer.Option(help="Concurrent requests.")] = 32,
) -> None:
    """Send all questions, and print how often each label was the answer."""

    def post(path: str, body: dict[str, Any]) -> Any:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(server + path, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def token(label: str) -> int:
        [found] = post("/tokenize", {"prompt": label, "add_special_tokens": False})["tokens"]
        return int(found)

    def ask(text: str, labels: tuple[str, ...]) -> str:
        message = {"role": "user", "content": f"{text}\n\n{QUESTIONS[labels]}"}
        body = {
            "messages": [message],
            "max_completion_tokens": 1,
            "temperature": 0,
            "allowed_token_ids": [tokens[label] for label in labels],
        }
        answer = post("/v1/chat/completions", body)
        return str(answer["choices"][0]["message"]["content"])

    tokens = {label: token(label) for labels in QUESTIONS for label in labels}
    lines = files("vllm_adainfer.offline.demo").joinpath(f"{part}.jsonl").read_text().splitlines()
    questions = [(json.loads(line)["text"], labels) for line in lines for labels in QUESTIONS]
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda question: ask(*question), questions))
    for label, count in sorted(Counter(answers).items()):
        typer.echo(f"{label}: {count}")


if __name__ == "__main__":
    typer.run(main)
