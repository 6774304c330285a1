"""Run by a test in a fresh process: start an engine from JSON settings, print what it says."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests import triton_on_cpu

triton_on_cpu.install_for_v2()  # here, for processes that are spawned import this, too

ENGINES: list[Any] = []


def told(output: Any) -> dict[str, Any]:
    """What an output says, for JSON."""

    def plain(step: Any) -> Any:
        return step and {str(token): entry.logprob for token, entry in step.items()}

    return {
        "tokens": list(output.outputs[0].token_ids),
        "logprobs": [plain(step) for step in output.outputs[0].logprobs or []],
        "prompt_logprobs": [plain(step) for step in output.prompt_logprobs or []],
    }


def main() -> None:
    """Read a JSON list of jobs from stdin, write an object for each to stdout."""
    for job in json.load(sys.stdin):
        run(job)


def run(job: dict[str, Any]) -> None:
    """Start an engine of its own, which lives as long as the process, and print what it says."""
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    ENGINES.append(llm)
    answers = []
    for batch in job["batches"]:  # each finds an empty prefix cache
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
            [SamplingParams(**params) for params in batch],
            use_tqdm=False,
        )
        answers.append([told(output) for output in outputs])
        llm.reset_prefix_cache()
    try:
        from vllm_adainfer import stats

        counters = stats(llm)
    except ValueError as error:
        counters = {"error": str(error)}
    print("RESULT " + json.dumps({"answers": answers, "stats": counters}))  # noqa: T201


if __name__ == "__main__":
    main()
