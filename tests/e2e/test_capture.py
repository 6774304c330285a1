"""An engine that captures requests answers as it does without, and writes what the model sees."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.admitted import draw_by_the_clients_ids
from tests.conftest import tiny_engine
from tests.tiny import LABELS
from tests.triton_on_cpu import IS_V2
from vllm_adainfer import stats
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.engine.admission.traffic_sample import in_traffic_sample
from vllm_adainfer.errors import AdaInferError

_GENERATOR = np.random.default_rng(0)
PROMPTS = [_GENERATOR.integers(5, 1000, length).tolist() for length in (3, 40, 170, 1, 90)]
LABEL_IDS = [7, 11]
SETTINGS: dict[str, dict[str, Any]] = {
    "label": {"allowed_token_ids": LABEL_IDS},
    "logprobs": {"logprobs": 3},
    "label probabilities": {"logprob_token_ids": LABEL_IDS},
    "text": {"max_tokens": 6},
    "sampled": {"temperature": 0.8, "seed": 5, "max_tokens": 3},
    "choice": {"structured_outputs": {"choice": list(LABELS)}},
}
ENGINE: dict[str, Any] = {
    "max_model_len": 512,
    "kv_cache_memory_bytes": 64 << 20,
    "served_model_name": ["name", "other"],
}
INTERPRETED = IS_V2 and not torch.cuda.is_available()  # so is vLLM's kernel for grammars, and fails


def params_of(kind: str) -> SamplingParams:
    settings = {"temperature": 0, "max_tokens": 1, **SETTINGS[kind]}
    if "structured_outputs" in settings:
        settings["structured_outputs"] = StructuredOutputsParams(**settings["structured_outputs"])
    return SamplingParams(**settings)


def told(llm: Any, params: SamplingParams) -> Any:
    """Tokens and log-probabilities, to the last bit."""
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [
        (
            list(one.outputs[0].token_ids),
            [
                {token: entry.logprob for token, entry in place.items()}
                for place in one.outputs[0].logprobs or ()
            ],
        )
        for one in outputs
    ]


def lines_of(directory: Path, count: int) -> list[dict[str, Any]]:
    """The last `count` lines, once they are written."""
    end = time.monotonic() + 10
    while True:
        text = "".join(path.read_text() for path in sorted(directory.iterdir()))
        if text.count("\n") >= count or time.monotonic() > end:
            return [json.loads(line) for line in text.splitlines()][-count:]
        time.sleep(0.02)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    found: Path = tmp_path_factory.mktemp("captured") / "requests"
    return found


@pytest.fixture(scope="module")
def capturing(tiny_model, directory) -> Any:
    capture = {"directory": str(directory), "rate": 1, "limit": 5 * len(SETTINGS)}
    return tiny_engine(tiny_model, {"capture": capture}, **ENGINE)


@pytest.fixture(scope="module")
def stock(tiny_model) -> Any:
    return tiny_engine(tiny_model, None, **ENGINE)


@pytest.mark.parametrize(
    "kind", [kind for kind in SETTINGS if not (INTERPRETED and kind == "choice")]
)
def test_stock_vllm_answers_the_same_bit_for_bit_and_each_request_is_a_line(
    capturing, stock, directory, kind
):
    assert told(capturing, params_of(kind)) == told(stock, params_of(kind))
    said = {key: value for key, value in SETTINGS[kind].items() if key != "seed"}
    if kind == "label probabilities":
        said["logprobs"] = len(LABEL_IDS)
    lines = lines_of(directory, len(PROMPTS))
    assert [line["body"] for line in lines] == [
        {"model": "name", "prompt": prompt, "max_tokens": 1, "temperature": 0, **said}
        for prompt in PROMPTS
    ]
    assert {(line["method"], line["url"]) for line in lines} == {("POST", "/v1/completions")}
    assert len({line["custom_id"] for line in lines}) == len(PROMPTS)


def test_capture_alone_has_vllms_own_model_and_no_counters(capturing):
    [architecture] = capturing.llm_engine.vllm_config.model_config.hf_config.architectures
    assert architecture == "LlamaForCausalLM"
    with pytest.raises(AdaInferError, match="runs without vllm-adainfer"):
        stats(capturing)


def test_beside_an_artifact_requests_leave_early_and_the_share_is_captured(
    tiny_model, tiny_policy, engine, tmp_path, monkeypatch
):
    draw_by_the_clients_ids("scheduler.capture", monkeypatch)
    switch = {"artifact": str(tiny_policy), "min_rows_saved": 1}
    capture = {"directory": str(tmp_path), "rate": 0.4}
    both = tiny_engine(tiny_model, {**switch, "capture": capture}, **ENGINE)
    label_ids = list(load_artifact(str(tiny_policy)).config.label_ids)
    params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=label_ids)
    for _ in range(4):
        both.reset_prefix_cache()
        engine.reset_prefix_cache()
        assert told(both, params) == told(engine, params)
    assert min(stats(both)["exit_histogram"]) == 2
    drawn = [str(i) for i in range(4 * len(PROMPTS)) if in_traffic_sample(str(i), 0.4, "capture")]
    assert 0 < len(drawn) < 4 * len(PROMPTS)
    lines = lines_of(tmp_path, len(drawn))
    assert [line["custom_id"] for line in lines] == drawn
    for line in lines:
        assert line["body"]["prompt"] == PROMPTS[int(line["custom_id"]) % len(PROMPTS)]
        assert line["body"]["allowed_token_ids"] == label_ids
