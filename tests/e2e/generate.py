"""Run by a test in a fresh process: start an engine from JSON settings, print what it says."""

from __future__ import annotations

import json
import sys
from typing import Any

from tests import triton_on_cpu

triton_on_cpu.install_for_v2()  # here, for processes that are spawned import this, too


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
    """Read one JSON object from stdin, write one to stdout."""
    from vllm import LLM, SamplingParams

    job = json.load(sys.stdin)
    llm = LLM(**job["engine"])
    answers = []
    for batch in job["batches"]:  # each finds an empty prefix cache
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in job["prompts"]],
            [SamplingParams(**params) for params in batch],
            use_tqdm=False,
        )
        answers.append([told(output) for output in outputs])
        llm.reset_prefix_cache()
    if "record" in job:
        llm.collective_rpc("adainfer_take_record", args=(job["record"],))
    try:
        from vllm_adainfer import stats

        counters = stats(llm)
    except ValueError as error:
        counters = {"error": str(error)}
    print("RESULT " + json.dumps({"answers": answers, "stats": counters}))  # noqa: T201


if __name__ == "__main__":
    main()
