"""Installed but idle, and configured but never exiting, are stock vLLM; in fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.full import FULL_ON_V2, full_on_v2
from tests.tiny import EXIT_POINTS, LAYERS, tiny_config
from tests.triton_on_cpu import IS_V2

ROOT = Path(__file__).parents[2]
LENGTHS = [3, 40, 170, 1, 90]
_GENERATOR = np.random.default_rng(0)
PROMPTS = [_GENERATOR.integers(5, 1000, length).tolist() for length in LENGTHS]


def answer(
    model: Path,
    params: list[dict[str, Any]],
    env: dict[str, str],
    prompts: list[list[int]] = PROMPTS,
    **engine: Any,
) -> Any:
    """What an engine in a fresh process answers, and its counters."""
    found = answer_each(model, [params], env, prompts, **engine)
    return {**found, "answers": found["answers"][0]}


def answer_each(
    model: Path,
    batches: list[list[dict[str, Any]]],
    env: dict[str, str],
    prompts: list[list[int]] = PROMPTS,
    **engine: Any,
) -> Any:
    """The same of several batches of `prompts`, one after the other."""
    [found] = answers_of_engines([job(model, batches, prompts, **engine)], env)
    return found


def job(
    model: Path, batches: list[list[dict[str, Any]]], prompts: Any = PROMPTS, **engine: Any
) -> dict[str, Any]:
    """An engine to start, and the batches of `prompts` to send it."""
    settings = {
        "model": str(model),
        "dtype": "bfloat16",
        "max_model_len": 512,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 64 << 20,
        **engine,
    }
    return {"engine": settings, "prompts": prompts, "batches": batches}


def answers_of_engines(jobs: list[dict[str, Any]], env: dict[str, str]) -> list[Any]:
    """What each engine answers; all of them in one fresh process, one after the other."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.generate"],
        input=json.dumps(jobs),
        env={**os.environ, **env},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # an engine whose core has died may be waited for without end
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(jobs), done.stderr[-3000:]
    return [json.loads(line.removeprefix("RESULT ")) for line in results]


def deep(**more: Any) -> list[dict[str, Any]]:
    return [{"temperature": 0, "max_tokens": 6, "logprobs": 5, **more} for _ in LENGTHS]


def deep_with_prompts(**more: Any) -> list[dict[str, Any]]:
    """Two of the requests want log-probabilities of their prompts, which need all rows."""
    params = deep(**more)
    params[0]["prompt_logprobs"] = params[4]["prompt_logprobs"] = 3
    return params


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> Any:
    """vLLM with the plugin not even loaded: answers to `deep`, and to `deep_with_prompts`."""
    batches = [deep(), deep_with_prompts()]
    return answer_each(tiny_model, batches, {"VLLM_PLUGINS": ""}, enforce_eager=True)["answers"]


@full_on_v2
def test_killed_by_the_environment_is_stock_bit_for_bit(tiny_model, tiny_policy, stock):
    killed = answer(
        tiny_model,
        deep(),
        {"VLLM_ADAINFER": "0"},
        enforce_eager=True,
        additional_config={"adainfer": {"artifact": str(tiny_policy)}},
    )
    assert killed["answers"] == stock[0]
    assert "runs without vllm-adainfer" in killed["stats"]["error"]


@pytest.fixture(scope="module")
def bf16_policy(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy for weights served in bfloat16."""
    from tests.tiny import served_fingerprint, tiny_tensors
    from vllm_adainfer.artifact.files import save_artifact

    config = tiny_config(tiny_model, weights_fingerprint=served_fingerprint(tiny_model, "bfloat16"))
    directory = tmp_path_factory.mktemp("bf16") / "policy"
    save_artifact(directory, config, tiny_tensors(config), {}, "card\n")
    return directory


@pytest.fixture(scope="module")
def never_exiting(tiny_model: Path, bf16_policy: Path) -> Any:
    """Three engines of a process, none of whose requests exits.

    All of the first opt out, the epsilon of the second is 0, and the third is not configured.
    """
    opt_out, policy = {"extra_args": {"adainfer": 0}}, {"artifact": str(bf16_policy)}
    batches = [deep(**opt_out), deep_with_prompts(**opt_out)], [deep()], [deep()]
    configs = {"adainfer": policy}, {"adainfer": {**policy, "epsilon": 0}}, {}
    jobs = [
        job(tiny_model, asked, enforce_eager=True, additional_config=config)
        for asked, config in zip(batches, configs, strict=True)
    ]
    return answers_of_engines(jobs, {})


def test_installed_but_not_configured_is_stock_bit_for_bit(stock, never_exiting):
    _, _, idle = never_exiting
    assert idle["answers"][0] == stock[0]
    assert "runs without vllm-adainfer" in idle["stats"]["error"]


@pytest.mark.parametrize("engine", [0, 1], ids=["adainfer 0 on the request", "epsilon 0"])
def test_configured_but_never_exiting_is_stock_bit_for_bit(stock, engine, never_exiting):
    never = never_exiting[engine]
    assert never["answers"][0] == stock[0]
    assert never["stats"]["layers_run"] == never["stats"]["layers_possible"]
    assert set(never["stats"]["exit_histogram"]) == {str(LAYERS)}


def test_log_probabilities_of_prompts_are_those_of_stock_bit_for_bit(stock, never_exiting):
    _, found = never_exiting[0]["answers"]
    assert found == stock[1]
    assert len(found[4]["prompt_logprobs"]) == LENGTHS[4]


TRACED = pytest.param({"VLLM_CPU_CI_ENV": "1"}, id="traced")
COMPILED = pytest.param({}, marks=FULL_ON_V2, id="compiled")


@pytest.mark.parametrize("env", [COMPILED, TRACED] if IS_V2 else [COMPILED])
def test_compiled_segments_give_stock_tokens_and_exits_count_what_ran(
    env, tiny_model, tiny_policy, reference
):
    """Half of the requests exit at the first point, half run at full depth, compiled, fp32.

    The first step is a chunk, of which the last segment gets one row.
    """
    from tests.e2e.oracle import continuation, hidden_states, same
    from vllm_adainfer.artifact.files import load_artifact

    policy = load_artifact(str(tiny_policy))
    labels = list(policy.config.label_ids)
    leaves = {"temperature": 0, "max_tokens": 1, "allowed_token_ids": labels}
    stays = {"temperature": 0, "max_tokens": 4}
    prompts, params = sorted(PROMPTS, key=len, reverse=True), [stays, leaves, stays, leaves, leaves]
    found = answer(
        tiny_model,
        params,
        env,
        prompts,
        dtype="float32",
        additional_config={"adainfer": {"artifact": str(tiny_policy), "min_rows_saved": 1}},
    )
    first = EXIT_POINTS[0]
    for prompt, asked, given in zip(prompts, params, found["answers"], strict=True):
        if asked is stays:
            assert same(given["tokens"], continuation(reference, prompt, 4, LAYERS))
            continue
        state = hidden_states(reference, prompt)[first][-1]
        scores = policy.tensors[f"exit.{first}.head_weight"] @ state
        assert given["tokens"] == [labels[int(scores.argmax())]]
    assert found["stats"]["exit_histogram"][str(first)] == 3
    assert found["stats"]["layers_run"] < found["stats"]["layers_possible"]
