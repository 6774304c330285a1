"""A server that only watches answers as stock vLLM, and tells what came."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.request import Request

from tests.byte_model import save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.asking import ask
from tests.plugin.test_config_time import engine_config
from tests.triton_on_cpu import IS_V2
from vllm_adainfer import stats
from vllm_adainfer.auto.directory import AutoDirectory, read_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import RECURS
from vllm_adainfer.engine.scheduler.kinds import KindCounts
from vllm_adainfer.errors import AdaInferError

DRAW = np.random.default_rng(0)
PROMPTS = [DRAW.integers(5, 250, length).tolist() for length in DRAW.integers(2, 90, 2 * RECURS)]
INTERPRETED = IS_V2 and not torch.cuda.is_available()  # so is vLLM's kernel for grammars, and fails
ASKED: dict[str, tuple[Kind | None, dict[str, Any]]] = {
    "label": (Kind("label", (7, 11)), {"allowed_token_ids": [11, 7]}),
    "probabilities": (Kind("probabilities", (7, 11)), {"logprob_token_ids": [7, 11]}),
    "choice": (Kind("choice", choices=("no", "yes")), {"choice": ["yes", "no"], "max_tokens": 5}),
    "text": (None, {"max_tokens": 3, "ignore_eos": True}),
    "logprobs": (None, {"logprobs": 3}),
    "unique lists": (None, {}),
}
if INTERPRETED:
    del ASKED["choice"]
ENGINE: dict[str, Any] = {
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_prefix_caching": False,
    "disable_log_stats": False,
    "served_model_name": ["name", "other"],
}


def params_of(asked: str, number: int) -> SamplingParams:
    given = {"temperature": 0, "max_tokens": 1, **ASKED[asked][1]}
    if asked == "unique lists":
        given["allowed_token_ids"] = [20 + 2 * number, 21 + 2 * number]
    if "choice" in given:
        given["structured_outputs"] = StructuredOutputsParams(choice=given.pop("choice"))
    return SamplingParams(**given)


def answers(llm: Any, asked: str) -> list[Any]:
    """Tokens and log-probabilities, to the last bit; of the first requests, then of the others."""
    params = [params_of(asked, number) for number in range(len(PROMPTS))]
    found = [
        answer
        for part in (slice(RECURS), slice(RECURS, None))
        for answer in ask(llm, PROMPTS[part], params[part])
    ]
    return [
        (
            list(one.token_ids),
            [
                {token: entry.logprob for token, entry in place.items()}
                for place in one.logprobs or ()
            ],
        )
        for one in found
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    found: Path = tmp_path_factory.mktemp("auto") / "DIR"
    return found


@pytest.fixture(scope="module")
def given(model, directory) -> tuple[Any, dict[str, list[Any]]]:
    """The engine that watches, and its answers to all that is asked."""
    switch = {"auto": {"directory": str(directory), "watch": True}}
    watching = tiny_engine(model, switch, **ENGINE)
    return watching, {asked: answers(watching, asked) for asked in ASKED}


@pytest.fixture(scope="module")
def written(given, directory) -> dict[str, Any]:
    """What the engine has written of the requests, once it ends."""
    watching, _ = given
    scheduler = watching.llm_engine.engine_core.engine_core.scheduler
    for observer in scheduler.observers:
        observer.close()
    content: dict[str, Any] = json.loads((directory / "kinds.json").read_text())
    return content


def test_answers_are_those_of_stock_vllm_bit_for_bit(given, model):
    watching, told = given
    [architecture] = watching.llm_engine.vllm_config.model_config.hf_config.architectures
    assert architecture == "LlamaForCausalLM"
    stock = tiny_engine(model, None, **ENGINE)
    assert told == {asked: answers(stock, asked) for asked in ASKED}


def test_it_has_no_counters_of_exits(given):
    with pytest.raises(AdaInferError, match="runs without vllm-adainfer"):
        stats(given[0])


def test_each_kind_that_recurs_has_its_requests_and_their_rows(given, written, directory):
    _, told = given
    salt, prompts = AutoDirectory(directory).salt, sum(map(len, PROMPTS))
    kinds = {kind.name(salt): asked for asked, (kind, _) in ASKED.items() if kind is not None}
    assert written["kinds"].keys() == kinds.keys()
    rows = 0
    for asked, answered in told.items():
        later = sum(len(tokens) - 1 for tokens, _ in answered)  # the last one never runs
        rows += prompts + later
        if (kind := ASKED[asked][0]) is None:
            continue
        count = written["kinds"][kind.name(salt)]
        assert Kind.of_dict(count["kind"]) == kind
        assert (count["requests"], count["prompt_tokens"]) == (len(PROMPTS), prompts)
        assert count["longest_prompt"] == max(map(len, PROMPTS))
        assert count["tokens"] == prompts + later
        assert written["since"] <= count["first"] <= count["last"]
    assert (written["requests"], written["tokens"]) == (len(ASKED) * len(PROMPTS), rows)
    assert written["pools"] == []


def test_metrics_have_names_alone_from_when_a_kind_recurs(written):
    series: dict[str, dict[str, float]] = {"requests": {}, "tokens": {}}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.name in ("adainfer:kind_requests_total", "adainfer:kind_tokens_total"):
                of = series[sample.name.split("_")[1]]
                of[sample.labels["kind"]] = sample.value
    named = dict.fromkeys(written["kinds"], RECURS)
    once = len(PROMPTS)  # of each: free text, a token's log-probabilities, lists of one request
    rest = {"none": 2 * once, "others": once + RECURS * len(named)}
    assert series["requests"] == {**named, **rest}
    assert sum(series["tokens"].values()) == written["tokens"]


def test_only_the_servers_user_may_read_what_it_counts(written, directory):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}
    assert modes == {"salt": 0o600, "kinds.json": 0o600, "counts.lock": 0o600}
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_restart_goes_on_and_another_model_begins_anew(written, directory):
    auto = AutoDirectory(directory)
    facts = {name: written[name] for name in ("model", "tokenizer")}
    again = KindCounts(str(auto.root), "raw_logprobs", **facts)
    params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=[7, 11])
    again.arrived(Request("a", [3, 1, 4], params, None))
    again.close()
    name = Kind("label", (7, 11)).name(auto.salt)
    now = read_json(auto.kinds)
    assert now["kinds"][name]["requests"] == len(PROMPTS) + 1
    assert (now["requests"], now["since"]) == (written["requests"] + 1, written["since"])
    KindCounts(str(auto.root), "raw_logprobs", **{**facts, "model": "another"}).close()
    assert read_json(auto.kinds)["kinds"] == {}


def test_what_cannot_be_watched_is_refused_with_a_sentence(model, tmp_path):
    auto = {"directory": str(tmp_path / "open"), "watch": True}
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(ValueError, match=r"others may read .* chmod 700"):
        engine_config(model, {"auto": auto})
    auto = {"directory": str(tmp_path / "own"), "watch": True}
    with pytest.raises(ValueError, match="one engine: serve with --data-parallel-size 1"):
        engine_config(model, {"auto": auto}, data_parallel_size=2)
