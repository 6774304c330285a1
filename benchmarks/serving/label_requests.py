"""Classification requests: untimed, to compare answers, or as a timed load.

Each request asks for one greedy token among the labels. The load is ``vllm bench serve`` with a
custom data set. Both fail if a request fails or its answer is not exactly one label.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common.server import Server
from benchmarks.common.vllm_command import COMMAND
from vllm_adainfer.offline.calibration.data.examples import Example

TOGETHER = 64  # prompts per request when answers are compared


@dataclass(frozen=True)
class Load:
    """The requests to a server.

    `file` has the examples as a custom data set of ``vllm bench serve``, which uses the tokenizer
    of `model`. `labels` are the texts of the labels, stripped.
    """

    model: str
    examples: Sequence[Example]
    file: Path
    label_ids: tuple[int, ...]
    labels: frozenset[str]


def ask(
    server: Server,
    load: Load,
    examples: Sequence[Example],
    more: Mapping[str, Any] | None = None,
) -> list[str]:
    """The answer to each prompt."""
    post(server, "/reset_prefix_cache")
    body = {"model": "model", "max_tokens": 1, **sampling(load), **(more or {})}
    answers: list[str] = []
    for start in range(0, len(examples), TOGETHER):
        prompts = [example.text for example in examples[start : start + TOGETHER]]
        choices = post(server, "/v1/completions", {**body, "prompt": prompts})["choices"]
        answers += [choice["text"] for choice in sorted(choices, key=lambda one: one["index"])]
    check_answers(load, answers)
    return answers


def post(server: Server, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON reply to a POST request.

    A RuntimeError if the server refuses or fails; includes the end of its log.
    """
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, json.dumps(body or {}).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=600) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        log = server.log.read_text(errors="replace")
        reason = error.read().decode(errors="replace")
        raise RuntimeError(f"{path}: {error.code} {reason}\n{log[-4000:]}") from None
    return answer


def sampling(load: Load) -> dict[str, Any]:
    """Sampling parameters of both kinds of requests."""
    return {"temperature": 0, "allowed_token_ids": load.label_ids}


def bench(server: Server, load: Load, rate: float, seed: int) -> dict[str, Any]:
    """The result of ``vllm bench serve`` at a rate; `seed` fixes the order and times of prompts.

    A RuntimeError if it failed (includes the end of its output), or a check of `check` failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "backend": "openai",
            "base-url": server.url,
            "endpoint": "/v1/completions",
            "model": load.model,
            "served-model-name": "model",
            "dataset-name": "custom",
            "dataset-path": load.file,
            "custom-output-len": 1,
            "num-prompts": len(load.examples),
            "request-rate": rate,
            "seed": seed,
            "extra-body": json.dumps(sampling(load)),
            "percentile-metrics": "ttft,e2el",
            "metric-percentiles": "50,99",
            "result-dir": folder,
            "result-filename": "result.json",
        }
        flags = "skip-chat-template", "no-oversample", "disable-tqdm", "save-result"
        command = [*COMMAND, "bench", "serve"]
        command += [f"--{name}={value}" for name, value in options.items()]
        command += [f"--{name}" for name in (*flags, "save-detailed")]
        ended = subprocess.run(command, capture_output=True, text=True)
        if ended.returncode:
            raise RuntimeError(f"vllm bench serve failed:\n{ended.stdout}{ended.stderr[-4000:]}")
        result: dict[str, Any] = json.loads(Path(folder, "result.json").read_text())
    check(load, result)
    return result


def check(load: Load, result: Mapping[str, Any]) -> None:
    """Check that every request was answered, with the expected numbers of tokens.

    A RuntimeError if a request failed, or token counts or answers are wrong.
    """
    expected = {
        "completed": len(load.examples),
        "failed": 0,
        "total_input_tokens": tokens_of(load.examples),
        "total_output_tokens": len(load.examples),
    }
    found = {key: result[key] for key in expected}
    if found != expected:
        errors = sorted({error for error in result["errors"] if error})
        raise RuntimeError(f"{found} instead of {expected}; {' | '.join(errors)[-2000:]}")
    check_answers(load, result["generated_texts"])


def check_answers(load: Load, answers: Sequence[str]) -> None:
    """Check that all answers are labels. A RuntimeError if an answer is not a label."""
    strange = {answer.strip() for answer in answers} - load.labels
    if strange:
        raise RuntimeError(f"answers that are not labels: {sorted(strange)[:10]}")


def tokens_of(examples: Sequence[Example]) -> int:
    """Total number of prompt tokens."""
    return sum(len(example.token_ids) for example in examples)
