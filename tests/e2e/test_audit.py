"""The audit of a mixed load says of each request what the counters say of all."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import tiny_engine
from tests.e2e.asking import greedy
from tests.e2e.asking import outputs as outputs_of
from tests.tiny import LAYERS
from tests.waiting import wait_for
from vllm_adainfer import stats
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.settings.engine import NO_POLICY

DRAW = np.random.default_rng(0)
PROMPTS = [DRAW.integers(5, 1000, length).tolist() for length in DRAW.integers(2, 90, 40)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    found: Path = tmp_path_factory.mktemp("audit") / "lines"
    return found


@pytest.fixture(scope="module")
def audited(tiny_model, tiny_policy, directory) -> Any:
    switch = {
        "artifact": {"mood": str(tiny_policy)},
        "min_rows_saved": 1,
        "shadow_rate": 0.3,
        "audit": {"directory": str(directory)},
        "capture": {"directory": str(directory.with_name("captured")), "rate": 0.4},
    }
    return tiny_engine(tiny_model, switch, max_model_len=512, kv_cache_memory_bytes=64 << 20)


def lines_of(directory: Path, count: int) -> list[dict[str, Any]]:
    """The lines, once so many are written."""

    def lines() -> list[str]:
        return [line for path in sorted(directory.iterdir()) for line in path.open()]

    wait_for(lambda: len(lines()) >= count)
    return [json.loads(line) for line in lines()]


def test_each_request_has_a_line_and_all_lines_add_up_to_the_counters(
    audited, tiny_policy, directory
):
    artifact = load_artifact(str(tiny_policy))
    labels, loosest = list(artifact.config.label_ids), artifact.config.levels[-1].epsilon
    asked = {
        "label": greedy(allowed_token_ids=labels),
        "opted out": greedy(allowed_token_ids=labels, extra_args={"adainfer": 0}),
        "looser": greedy(allowed_token_ids=labels, extra_args={"adainfer_epsilon": loosest}),
        "text": greedy(max_tokens=5, ignore_eos=True),
    }
    params = [params for params in asked.values() for _ in PROMPTS]
    outputs = outputs_of(audited, PROMPTS * len(asked), params)
    engine = audited.llm_engine
    long = (PROMPTS[0] + PROMPTS[1]) * 9
    engine.add_request("hangs up", {"prompt_token_ids": long[:400]}, asked["text"])
    engine.step()
    engine.abort_request(["hangs up"])
    while engine.has_unfinished_requests():
        engine.step()

    lines = {line["request"]: line for line in lines_of(directory, len(outputs) + 1)}
    assert len(lines) == len(outputs) + 1
    layers: dict[str, Counter[int]] = {}
    for place, output in enumerate(outputs):
        line, kind = lines[output.request_id.split("-")[0]], list(asked)[place // len(PROMPTS)]
        assert line["answer"] == list(output.outputs[0].token_ids)
        assert line["ended"] == output.outputs[0].finish_reason
        assert sum(line["outcomes"].values()) == len(line["answer"])
        policy = line["policy"]
        assert line["artifact"] == (policy and artifact.digest)
        if kind in ("opted out", "text"):
            assert policy is None
        elif policy is not None:  # shadow requests have not closed the bound
            assert line["epsilon"] == (loosest if kind == "looser" else artifact.config.epsilon)
        if policy is None:
            assert (line["outcomes"].keys(), line["layers"].keys()) == (
                {"full_depth"},
                {str(LAYERS)},
            )
        count = layers.setdefault(policy or NO_POLICY, Counter())
        count.update({int(depth): tokens for depth, tokens in line["layers"].items()})
    hung_up = lines["hangs up"]
    assert (hung_up["ended"], hung_up["policy"]) == ("abort", None)

    counted = stats(audited)["policies"]
    assert dict(sorted(layers["mood"].items())) == counted["mood"]["exit_histogram"]
    tokens = layers[NO_POLICY][LAYERS] + sum(hung_up["outcomes"].values())
    assert counted[NO_POLICY]["exit_histogram"] == {LAYERS: tokens}
    by_outcome = sum((Counter(line["outcomes"]) for line in lines.values()), Counter())
    checked = sum(one["checked"] for one in counted["mood"]["shadow"].values())
    assert by_outcome["shadow"] == checked > 0
    assert by_outcome["early"] > 0

    captured = {
        line["custom_id"]: line["body"] for line in lines_of(directory.with_name("captured"), 1)
    }
    assert 0.2 * len(lines) < len(captured) < 0.6 * len(lines)
    for output in outputs:
        body = captured.get(output.request_id.split("-")[0])
        assert body is None or body["prompt"] == output.prompt_token_ids


def test_a_token_in_the_making_when_its_client_hangs_up_is_counted_but_is_no_answer(
    audited, directory, monkeypatch
):
    """vLLM takes up what has hung up while a step ran before it processes the step's output."""
    done, before = len(lines_of(directory, 0)), stats(audited)["policies"][NO_POLICY]
    engine = audited.llm_engine
    core = engine.engine_core.engine_core
    engine.add_request("leaves", {"prompt_token_ids": PROMPTS[0]}, greedy())
    monkeypatch.setattr(
        core, "_process_aborts_queue", lambda: core.abort_requests([*core.scheduler.requests])
    )
    engine.step()
    monkeypatch.undo()
    engine.abort_request(["leaves"])
    line = lines_of(directory, done + 1)[-1]
    assert (line["request"], line["ended"], line["answer"]) == ("leaves", "abort", [])
    assert line["outcomes"] == {"full_depth": 1}
    assert line["layers"] == {str(LAYERS): 1}
    after = stats(audited)["policies"][NO_POLICY]
    assert after["exit_histogram"][LAYERS] == before["exit_histogram"][LAYERS] + 1
