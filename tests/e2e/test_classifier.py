"""Classifiers, which vLLM runs as pooling models: `LLM.classify` and `LLM.encode`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from vllm import PoolingParams
from vllm.distributed import parallel_state

from tests.classifier import COLUMNS, classifier
from tests.conftest import tiny_engine
from tests.delta_net import allow_fp32
from tests.e2e.oracle import hidden_states
from tests.e2e.recorded import taken_from
from tests.e2e.scripted import parts
from tests.families import FAMILIES, tiny_checkpoint
from tests.full import FULL_ON_V2, needed
from tests.tiny import (
    EXIT_POINTS,
    LAYERS,
    served_fingerprint,
    tiny_artifact,
    tiny_config,
    tiny_tensors,
)
from tests.waiting import wait_for
from vllm_adainfer import stats
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Row
from vllm_adainfer.offline.calibration.data.pairs import Pairs, read_pairs
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.promise.first_documents import FirstDocuments
from vllm_adainfer.promise.gates import Gate
from vllm_adainfer.watch.units import ENDED_SINCE

PAIR_TEMPLATE = "Review : {{ messages[0].content }} Sentiment : {{ messages[1].content }}"
CLOSE = 2e-4  # fp32 sums in another order
TIE = 1e-3
SETTINGS = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 512}
_GENERATOR = np.random.default_rng(0)
# Some have several chunks, some share a block of their beginning with an earlier one.
_OWN = [_GENERATOR.integers(5, 1000, 1 + 17 * i % 190).tolist() for i in range(16)]
PROMPTS = [*_OWN, *([*_OWN[i][:64], 7, 8, 9] for i in (5, 8))]
PROMISES: dict[str, dict[str, Any]] = {
    "label": {},
    "tolerance": {"risk": "probability", "tolerance": 0.05},
    "gate": {"risk": "probability", "gates": (Gate(label="c1", probability=0.5),)},
}


# Model Runner V2 reads the same head, and its interpreter takes its time.
@pytest.fixture(scope="module", params=["softmax", pytest.param("sigmoid", marks=FULL_ON_V2)])
def model(request, tiny_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("classifier") / request.param
    return classifier(tiny_model, directory, COLUMNS[request.param])


@pytest.fixture(scope="module")
def score(model) -> Tensor:
    return load_file(model / "model.safetensors")["score.weight"]


@pytest.fixture(scope="module")
def states(reference) -> list[list[Tensor]]:
    """Of each prompt, its last row after each number of layers."""
    return [[state[-1] for state in hidden_states(reference, prompt)] for prompt in PROMPTS]


def config_of(model: Path, promise: str = "label", fingerprint: str = "") -> dict[str, Any]:
    columns = COLUMNS[model.name]
    labels = tuple(Label(name=f"c{column}", token_id=column) for column in range(max(2, columns)))
    return dict(
        architecture="LlamaForSequenceClassification",
        weights_fingerprint=fingerprint or served_fingerprint(model),
        score_head=model.name,
        labels=labels,
        **PROMISES[promise],
    )


def probabilities(scores: Tensor) -> Tensor:
    """As vLLM's pooler makes them of a classifier's scores."""
    return scores.sigmoid() if len(scores) == 1 else scores.softmax(0)


def answers(llm: Any, prompts: list[list[int]] = PROMPTS, **params: Any) -> list[Tensor]:
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    pooling = PoolingParams(task="classify", **params)
    found = llm.encode(asked, pooling, pooling_task="classify", use_tqdm=False)
    return [output.outputs.data for output in found]


@pytest.fixture(scope="module")
def stock(model) -> list[Tensor]:
    return answers(tiny_engine(model, None, **SETTINGS))


@pytest.fixture(scope="module", params=PROMISES)
def served(request, model, states, tmp_path_factory) -> tuple[Any, dict[str, Tensor], float]:
    """An engine with a policy, its heads and its threshold: half leave at the first exit point."""
    promise = config_of(model, request.param)
    heads = tiny_tensors(tiny_config(model, **promise))
    leads = [lead(scores_at(EXIT_POINTS[0], after, heads), request.param)[1] for after in states]
    threshold = float(np.median(leads))
    thresholds = torch.full((2, len(EXIT_POINTS)), threshold)
    directory = tmp_path_factory.mktemp("artifact") / "policy"
    policy = tiny_artifact(model, directory, thresholds, **promise)
    audit = {"directory": str(directory.with_name("audit"))}
    switch = {"artifact": str(policy), "min_rows_saved": 1, "audit": audit}
    return tiny_engine(model, switch, **SETTINGS), heads, threshold


def scores_at(layer: int, after: list[Tensor], heads: dict[str, Tensor]) -> Tensor:
    """What a head says of a prompt."""
    weight, bias = heads[f"exit.{layer}.head_weight"], heads[f"exit.{layer}.head_bias"]
    return after[layer] @ weight.T + bias


def lead(scores: Tensor, promise: str) -> tuple[Tensor, float]:
    """The labels' probabilities, and what decides whether they are settled."""
    among = (scores if promise == "label" else scores[:-1]).softmax(0)
    if promise == "gate":
        return among, abs(float(torch.logit(among[1])))
    best = among.sort().values
    return among, float(best[-1] - best[-2])


def expected(
    after: list[Tensor], heads: dict[str, Tensor], threshold: float, promise: str
) -> tuple[int, Tensor] | None:
    """Where a prompt leaves, and with which probabilities; None if it is too close to call."""
    for layer in EXIT_POINTS:
        among, by = lead(scores_at(layer, after, heads), promise)
        if abs(by - threshold) < TIE:
            return None
        if by > threshold:
            return layer, among
    return LAYERS, torch.empty(0)


def test_each_prompt_gets_the_probabilities_of_its_exit_and_others_those_of_stock(
    request, model, states, stock, served
):
    llm, heads, threshold = served
    promise = request.node.callspec.params["served"]
    before = Counter(stats(llm)["exit_histogram"])
    found = answers(llm, _OWN)  # one whose beginning is shared may run at full depth
    left = Counter(stats(llm)["exit_histogram"]) - before
    wanted: Counter[int] = Counter()
    for after, answer, deep in zip(states, found, stock, strict=False):
        depth, among = expected(after, heads, threshold, promise) or (None, None)
        wanted[depth] += 1
        if depth == LAYERS:
            torch.testing.assert_close(answer, deep, atol=CLOSE, rtol=0)
        elif depth is not None:
            labels = torch.cat([1 - answer, answer]) if len(answer) == 1 else answer
            torch.testing.assert_close(labels, among, atol=CLOSE, rtol=0)
    unclear = wanted.pop(None, 0)
    assert sum((left - wanted).values()) <= unclear
    assert len(wanted) > 2
    written = wait_for(lambda: audited(llm, before.total() + len(found)))
    answered = [line["answer"] for line in written[before.total() :]]
    assert answered == [pytest.approx(one.tolist(), abs=1e-6) for one in found]


def audited(llm: Any, count: int) -> list[Any]:
    """The lines of the audit in the order of the requests; none before there are so many."""
    switch = llm.llm_engine.vllm_config.additional_config["adainfer"]
    lines = [
        json.loads(line) for p in Path(switch["audit"]["directory"]).iterdir() for line in p.open()
    ]
    return sorted(lines, key=lambda line: int(line["request"])) if len(lines) >= count else []


@pytest.mark.parametrize(
    "promise",
    [{"tolerance": 0.05}, {"gates": (Gate(label="c1", probability=0.5),)}],
    ids=["tolerance", "gate"],
)
def test_labels_that_may_hold_together_get_a_probability_each(
    tiny_model, tmp_path, states, promise
):
    """All prompts leave at the first exit point, so each probability is a head's sigmoid."""
    directory = classifier(tiny_model, tmp_path / "softmax", 3)
    overrides = {"problem_type": "multi_label_classification"}
    config = config_of(directory) | {"score_head": "sigmoids", "risk": "probability", **promise}
    thresholds = torch.full((2, len(EXIT_POINTS)), -100.0)
    policy = tiny_artifact(directory, tmp_path / "policy", thresholds, **config)
    switch = {"artifact": str(policy), "min_rows_saved": 1, "shadow_rate": 0.5}
    stock = answers(tiny_engine(directory, None, hf_overrides=overrides, **SETTINGS))
    ours = tiny_engine(directory, switch, hf_overrides=overrides, **SETTINGS)
    model, _, scheduler = parts(ours)
    scheduler.admission.arrival.is_shadow = lambda request_id: False
    heads = tiny_tensors(tiny_config(directory, **config))
    for found, after in zip(answers(ours, _OWN), states, strict=False):
        early = scores_at(EXIT_POINTS[0], after, heads)[:3].sigmoid()
        torch.testing.assert_close(found, early, atol=CLOSE, rtol=0)
    assert max(float(probabilities.sum()) for probabilities in stock) > 1.1
    scheduler.admission.arrival.is_shadow = lambda request_id: True
    ours.reset_prefix_cache()
    torch.testing.assert_close(answers(ours, _OWN), stock[: len(_OWN)], atol=CLOSE, rtol=0)
    [monitor] = model.loop.monitors.values()
    assert monitor.tightened.any()  # random heads break the promise


def test_never_exiting_is_stock_bit_for_bit(model, tmp_path):
    """With chunks and a prefix cache, in the dtype in which models are served."""
    fingerprint = served_fingerprint(model, "bfloat16")
    policy = tiny_artifact(model, tmp_path / "policy", **config_of(model, fingerprint=fingerprint))
    stock = tiny_engine(model, None, "bfloat16", **SETTINGS)
    ours = tiny_engine(model, {"artifact": str(policy)}, "bfloat16", **SETTINGS)
    for _ in range(2):  # the second time from the prefix cache
        never = answers(ours, extra_kwargs={"adainfer": 0})
        assert all(map(torch.equal, never, answers(stock)))


def test_raw_scores_are_those_of_full_depth(served, stock):
    """No policy promises anything about them."""
    raw = answers(served[0], use_activation=False)
    for scores, answer in zip(raw, stock, strict=True):
        torch.testing.assert_close(probabilities(scores), answer, atol=CLOSE, rtol=0)


def test_a_prompt_that_left_spoils_no_later_one(served, stock):
    """The prefix cache holds no block that lacks layers."""
    llm, _, _ = served
    llm.reset_prefix_cache()
    answers(llm)
    for answer, deep in zip(answers(llm, extra_kwargs={"adainfer": 0}), stock, strict=True):
        torch.testing.assert_close(answer, deep, atol=CLOSE, rtol=0)


def test_shadow_queries_compare_the_scores_of_all_their_documents(
    tiny_model, tmp_path, states, monkeypatch
):
    """Here a query is every three requests; on a server, the documents of an HTTP request."""
    directory = classifier(tiny_model, tmp_path / "sigmoid", 1)
    promise = {"risk": "probability", "top_k": FirstDocuments(k=1, margin=1e-6)}
    config = config_of(directory) | promise
    thresholds = torch.full((2, len(EXIT_POINTS)), -10.0)  # all leave at the first
    policy = tiny_artifact(directory, tmp_path / "policy", thresholds, **config)
    switch = {"artifact": str(policy), "min_rows_saved": 1, "shadow_rate": 1.0}
    llm = tiny_engine(directory, switch, **SETTINGS)
    model, _, scheduler = parts(llm)
    [watch] = model.loop.monitors.values()
    ids: list[str] = []

    def query_of(request_id: str) -> str:
        ids.append(request_id)
        return ids[(len(ids) - 1) // 3 * 3]

    monkeypatch.setattr(scheduler.admission.arrival, "_query", query_of)
    full = answers(llm)
    heads = tiny_tensors(tiny_config(directory, **config))
    early = [scores_at(EXIT_POINTS[0], after, heads)[:-1].softmax(0)[1] for after in states]
    compared = {
        one: pair for query in watch._units._of_parts.values() for one, pair in query.scores.items()
    }
    assert len(compared) == len(PROMPTS) > len(watch._units._of_parts) > 1
    for request_id, ours, deep in zip(ids, early, full, strict=True):
        assert compared[request_id] == pytest.approx((float(ours), float(deep)), abs=CLOSE)
    for number in range(ENDED_SINCE):
        model.loop.ended(str(number))
    counters = stats(llm)["shadow"]
    assert sum(level["checked"] for level in counters.values()) == len(compared) // 3


@pytest.mark.parametrize("chat_template", [None, PAIR_TEMPLATE], ids=["joined", "template"])
@pytest.mark.parametrize("of_tokens", [False, True], ids=["checkpoint", "of tokens"])
def test_pairs_are_the_prompts_that_vllm_makes_of_them(
    tiny_model, tmp_path, chat_template, of_tokens
):
    overrides: dict[str, Any] = {}
    directory = tiny_model
    if of_tokens:
        overrides = {
            "architectures": ["LlamaForSequenceClassification"],
            "classifier_from_token": ["bad", "good"],
            "method": "from_2_way_softmax",
        }
    else:
        directory = classifier(tiny_model, tmp_path / "sigmoid", 1)
    llm = tiny_engine(directory, None, hf_overrides=overrides, **SETTINGS)
    query, documents = "a warm film", ["good bad", "the plot is thin"]
    outputs = llm.score(query, documents, chat_template=chat_template, use_tqdm=False)
    hf_config, tokenizer = load_config_and_tokenizer(str(directory), overrides)
    row = Row("line 1", {"query": query, "documents": documents})
    pairs = read_pairs([row], Pairs.of(tokenizer, hf_config, chat_template), 64)
    assert [output.prompt_token_ids for output in outputs] == [one.token_ids for one in pairs]


# vLLM 0.32 itself cannot make a classifier of OPT's tied embeddings.
CAUSAL = [name for name in FAMILIES if "multimodal" not in name and not name.startswith("opt")]


@pytest.mark.parametrize("family", needed(["gemma2", "qwen3"], of=CAUSAL))
def test_a_classifier_of_each_family_scores_as_stock_does(family, tmp_path, monkeypatch):
    """Made by vLLM of the rows of two tokens; recording runs all layers, and reads the head."""
    monkeypatch.setattr("vllm.model_executor.layers.rotary_embedding._ROPE_DICT", {})
    allow_fp32()
    if parallel_state._EP is None:  # see `test_families`
        parallel_state._EP = parallel_state._TP
    directory = tiny_checkpoint(family, tmp_path / family)
    [architecture] = json.loads((directory / "config.json").read_text())["architectures"]
    overrides = {
        "architectures": [architecture.replace("ForCausalLM", "ForSequenceClassification")],
        "classifier_from_token": ["bad", "good"],
        "method": "from_2_way_softmax",
    }
    stock, ours = (
        tiny_engine(directory, switch, **SETTINGS, hf_overrides=overrides)
        for switch in (None, {"record": [0, 3, LAYERS]})
    )
    expected, found = (answers(llm, _OWN[:8], use_activation=False) for llm in (stock, ours))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    asked = [PoolingParams(task="classify", extra_kwargs={"adainfer_row": row}) for row in range(8)]
    prompts = [{"prompt_token_ids": prompt} for prompt in _OWN[:8]]
    ours.reset_prefix_cache()
    ours.encode(prompts, asked, pooling_task="classify", use_tqdm=False)
    rows, lens = taken_from(ours, tmp_path)
    labels = lens.score(lens.readout(rows["final"]), return_scores=True).scores
    torch.testing.assert_close(
        list((labels[:, 1] - labels[:, 0]).unsqueeze(1)), expected, atol=2e-3, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"problem_type": "multi_label_classification"},
            "for 3 labels .softmax., and the score head",
        ),
        ({"problem_type": "regression"}, "made into something else"),
        ({"num_labels": 4}, "policy default was calibrated for 3 labels"),
    ],
)
def test_scores_that_a_policy_says_nothing_about_are_refused(
    tiny_model, tmp_path, overrides, sentence
):
    directory = classifier(tiny_model, tmp_path / "softmax", overrides.get("num_labels", 3))
    policy = tiny_artifact(directory, tmp_path / "policy", **config_of(directory))
    with pytest.raises(AdaInferError, match=sentence):
        tiny_engine(
            directory,
            {"artifact": str(policy)},
            hf_overrides={key: overrides[key] for key in overrides if key != "num_labels"},
            **SETTINGS,
        )
