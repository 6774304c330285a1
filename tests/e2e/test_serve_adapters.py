"""A real server with LoRA adapters, also loaded and unloaded while it is asked."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.common.server import Server, serving
from tests.adapters import merged, save_adapter
from tests.e2e.oracle import TIE, head_inputs, hidden_states
from tests.e2e.test_serve import FLAGS, environment, post
from tests.tiny import EXIT_POINTS, LAYERS, tiny_artifact, tiny_config, tiny_tensors
from tests.waiting import wait_for
from vllm_adainfer.offline.adapter import read_adapter

pytestmark = pytest.mark.full

NAMES = ("mood", "taste", "later")  # the last is loaded at run time, with its bundled policy
_GENERATOR = np.random.default_rng(5)
PROMPTS = [_GENERATOR.integers(5, 1000, 1 + 11 * i % 70).tolist() for i in range(40)]


@pytest.fixture(scope="module")
def saved(reference, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {name: save_adapter(reference, folder / name, i) for i, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def references(reference, saved) -> dict[str, Any]:
    return {"model": reference, **{name: merged(reference, path) for name, path in saved.items()}}


@pytest.fixture(scope="module")
def server(tiny_model, saved, tmp_path_factory) -> Iterator[Server]:
    """Its policies are for two of three adapters, and not for the base model."""
    folder = tmp_path_factory.mktemp("policies") / "mood"
    for name, place in (("mood", folder), ("later", saved["later"] / "adainfer")):
        adapter = read_adapter(f"{name}={saved[name]}").described
        tiny_artifact(tiny_model, place, adapter=adapter)
    # So many slots that the last stays empty, see `test_adapters`: each load takes another.
    lora = ("--enable-lora", "--max-loras", "8", "--max-lora-rank", "8", "--lora-modules")
    flags = (*FLAGS, *lora, *(f"{name}={saved[name]}" for name in ("mood", "taste")))
    log = tmp_path_factory.mktemp("log") / "server.log"
    switch = {"artifact": {"mood": str(folder)}, "exit_points": EXIT_POINTS, "min_rows_saved": 1}
    variables = environment(VLLM_ALLOW_RUNTIME_LORA_UPDATING="True")
    with serving(str(tiny_model), switch, log, flags, variables) as running:
        yield running


@pytest.fixture(scope="module")
def right(tiny_model, references) -> Any:
    """Whether a token is the one of a prompt's exit, or of full depth; also if it is a tie."""
    config = tiny_config(tiny_model)
    head = tiny_tensors(config)[f"exit.{EXIT_POINTS[0]}.head_weight"]
    ids = list(config.label_ids)

    @torch.inference_mode()
    def check(name: str, prompt: list[int], exits: bool, token: int) -> bool:
        model = references[name]
        if exits:
            scores = head @ hidden_states(model, prompt)[EXIT_POINTS[0]][-1]
        else:
            scores = model.lm_head(head_inputs(model, prompt, LAYERS)[-1])[ids]
        return bool(scores.max() - scores[ids.index(token)] < TIE)

    return check


def ask(server: Server, name: str, prompt: list[int], labels: tuple[int, ...]) -> tuple[int, Any]:
    body = {
        "model": name,
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "return_token_ids": True,
        "allowed_token_ids": list(labels),
    }
    return post(server, "/v1/completions", body)


def token_of(found: tuple[int, Any]) -> int:
    status, answer = found
    assert status == 200, answer
    token: int = answer["choices"][0]["token_ids"][0]
    return token


@pytest.mark.parametrize("asks", [{"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}])
def test_what_would_end_vllms_engine_with_adapters_is_refused_and_the_server_lives(
    server, tiny_model, asks
):
    body = {"model": "mood", "prompt": PROMPTS[9], "max_tokens": 1, **asks}
    status, answer = post(server, "/v1/completions", body)
    assert (status, "prompt_logprobs" in str(answer)) == (400, True)
    token_of(ask(server, "mood", PROMPTS[9], tiny_config(tiny_model).label_ids))


def test_an_adapter_whose_policy_cannot_be_served_is_not_loaded_and_the_answer_says_why(
    server, tiny_model, reference, tmp_path
):
    directory = save_adapter(reference, tmp_path / "saved", seed=9)
    tiny_artifact(tiny_model, directory / "adainfer")
    body = {"lora_name": "odd", "lora_path": str(directory)}
    status, answer = post(server, "/v1/load_lora_adapter", body)
    assert status == 500
    assert "was not calibrated with the adapter that it is bundled with" in str(answer)
    assert ask(server, "odd", PROMPTS[0], tiny_config(tiny_model).label_ids)[0] == 404


def test_adapters_come_and_go_under_traffic_with_the_policies_beside_them(
    server, tiny_model, saved, right
):
    labels = tiny_config(tiny_model).label_ids

    def served_right(name: str, prompt: list[int], found: tuple[int, Any]) -> None:
        """A prompt that came before runs at full depth, to complete the prefix cache."""
        token, may_exit = token_of(found), name != "model"
        assert right(name, prompt, False, token) or (may_exit and right(name, prompt, True, token))

    later = {"lora_name": "later", "lora_path": str(saved["later"])}
    with ThreadPoolExecutor(8) as pool:
        steady = [
            pool.submit(ask, server, ["mood", "model"][i % 2], PROMPTS[i % len(PROMPTS)], labels)
            for i in range(300)
        ]
        for _ in range(3):
            assert ask(server, "later", PROMPTS[0], labels)[0] == 404
            assert post_text(server, "/v1/load_lora_adapter", later) == 200
            for prompt in PROMPTS[:12]:
                served_right("later", prompt, ask(server, "later", prompt, labels))
            wait_for(lambda: described(server) == {("mood", "mood"), ("later", "later")})
            skipped = server.metrics("adainfer:layer_rows_skipped_total{")
            assert sum(value for series, value in skipped.items() if 'policy="later"' in series)
            assert post_text(server, "/v1/unload_lora_adapter", {"lora_name": "later"}) == 200
        for i, each in enumerate(steady):
            served_right(["mood", "model"][i % 2], PROMPTS[i % len(PROMPTS)], each.result())
    # The next report to come takes the series of the policy along with it.
    wait_for(
        lambda: (
            ask(server, "mood", PROMPTS[0], labels)[0] == 200
            and described(server) == {("mood", "mood")}
        )
    )


def described(server: Server) -> set[tuple[str, ...]]:
    """The policies that have series, and their adapters."""
    info = server.metrics("adainfer:policy_info{")
    return {tuple(re.findall(r'(?:policy|adapter)="(\w*)"', series)) for series in info}


def post_text(server: Server, path: str, body: dict[str, Any]) -> int:
    """The status of a request whose answer is not JSON."""
    content = {"Content-Type": "application/json"}
    request = urllib.request.Request(server.url + path, json.dumps(body).encode(), content)
    with urllib.request.urlopen(request, timeout=60) as response:
        return int(response.status)
