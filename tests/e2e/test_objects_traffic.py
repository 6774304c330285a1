"""Objects beside all kinds of requests: each answer is that of the heads, or stock vLLM's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from tests.byte_model import save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.drafted_traffic import (
    GRAMMARS,
    LETTERS,
    Ask,
    Drafted,
    Got,
    assert_same,
    counted_drafts,
    served,
)
from tests.e2e.objects import ENGINE, POOLED_FROM, SCHEMA, save_policy
from tests.e2e.scripted import parts
from tests.e2e.test_objects import Oracle
from tests.full import needed
from tests.tiny import tiny_artifact
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.engine.worker.served_policies import check_replaces
from vllm_adainfer.errors import AdaInferError

OBJECT = StructuredOutputsParams(json=SCHEMA)
LEVELS = {0.02: 0, 0.05: 1}  # of `tiny_config`, by epsilon
# What requests for the policy's object ask for, how often, and whether they may be early.
KINDS: list[tuple[int, bool, dict[str, Any]]] = [
    (10, True, {}),
    (3, True, {"extra_args": {"adainfer_epsilon": 0.02}}),
    (3, True, {"output_kind": RequestOutputKind.DELTA}),
    (2, True, {"stop_token_ids": list(range(34, 60))}),  # some stand in every object
    (2, False, {"extra_args": {"adainfer": 0}}),
    (1, False, {"extra_args": {"adainfer_epsilon": 0}}),
    (2, False, {"temperature": 0.8, "seed": 1}),
    (1, False, {"temperature": 1.2, "seed": 2, "top_p": 0.9, "top_k": 20, "n": 3}),
    (2, False, {"logprobs": 3}),
    (1, False, {"logprobs": 0, "temperature": 0.7, "seed": 3}),
    (1, False, {"prompt_logprobs": 1}),
    (1, False, {"stop": ["ood", "ega"]}),
    (1, False, {"min_tokens": 3}),
    (1, False, {"presence_penalty": 0.5, "frequency_penalty": 0.1}),
    (1, False, {"repetition_penalty": 1.2}),
    (1, False, {"logit_bias": {40: 2.0}}),
    (1, False, {"max_tokens": 9}),
    (2, False, {"structured_outputs": StructuredOutputsParams(**GRAMMARS["enums"])}),
    (1, False, {"structured_outputs": StructuredOutputsParams(**GRAMMARS["choice"])}),
    (2, False, {"structured_outputs": None, "max_tokens": 12}),
    (1, False, {"structured_outputs": None, "max_tokens": 9, "temperature": 0.9, "seed": 4}),
]


@dataclass(frozen=True)
class Traffic:
    """Requests, and which of them a policy may answer early."""

    asks: list[Ask]
    of_objects: set[int]
    of_labels: set[int]


def texts(seed: int, amount: int, longest: int) -> list[str]:
    """Some go on from others, so that their first blocks are equal."""
    generator = np.random.default_rng(seed)
    found: list[str] = []
    for length in generator.integers(POOLED_FROM + 1, longest, amount).tolist():
        new = "".join(generator.choice(LETTERS, length))
        shared = found[generator.integers(len(found))] if found and generator.random() < 0.4 else ""
        found.append((shared[: length - 3] + new)[:length])
    return found


def traffic(labels: Sequence[int], seed: int, amount: int, longest: int = 110) -> Traffic:
    generator = np.random.default_rng(seed)
    prompts = texts(seed, amount // 2, longest)
    often = np.array([one for one, *_ in KINDS], dtype=float)
    made, step = Traffic([], set(), set()), 0
    for place in range(amount):
        _, may_be_early, more = KINDS[generator.choice(len(KINDS), p=often / often.sum())]
        values: dict[str, Any] = {"temperature": 0, "max_tokens": 120, "structured_outputs": OBJECT}
        if generator.random() < 0.12:
            may_be_early, more = False, {}
            values |= {"max_tokens": 1, "structured_outputs": None, "allowed_token_ids": [*labels]}
            made.of_labels.add(place)
        if may_be_early:
            made.of_objects.add(place)
        params = SamplingParams(**{**values, "output_kind": RequestOutputKind.FINAL_ONLY, **more})
        is_streamed = params.output_kind is RequestOutputKind.DELTA
        prompt = prompts[generator.integers(len(prompts))]
        made.asks.append(Ask(prompt, params, step, is_streamed=is_streamed))
        step += int(generator.choice([0, 0, 0, 1, 4]))
    return made


@dataclass
class Judged:
    """How many objects were early, and how many might have been, by the heads."""

    early: int = 0
    sure: int = 0
    labels: Counter[bool] = field(default_factory=Counter)


@dataclass(frozen=True)
class Engine:
    """One that serves a policy for objects, and one for labels."""

    llm: Any
    oracle: Oracle
    label_ids: tuple[int, ...]
    labels: dict[str, torch.Tensor]

    def label(self, prompt: str) -> int:
        """What its policy for labels says of a prompt, at its first exit point."""
        state = self.oracle.states(self.oracle.tokenizer.encode(prompt))[2][0, -1]
        weight, bias = (self.labels[f"exit.2.head_{name}"] for name in ("weight", "bias"))
        return self.label_ids[int((weight @ state + bias).argmax())]

    def early_tokens(self, ask: Ask) -> list[int] | None:
        """The object that the heads are sure of, as a client gets it."""
        epsilon = (ask.params.extra_args or {}).get("adainfer_epsilon", 0.05)
        tokens, _ = self.oracle.early_tokens(ask.prompt, LEVELS[epsilon])
        if tokens is None:
            return None
        whole = [*tokens, self.oracle.tokenizer.eos_token_id]
        stops = {*(ask.params.stop_token_ids or ())}
        last = next((place for place, one in enumerate(whole) if one in stops), len(whole) - 1)
        return whole[: last + 1]

    def judge(self, made: Traffic, ours: list[Got], theirs: list[Got]) -> Judged:
        """Fails unless each answer is the heads' or stock's."""
        judged, stocks = Judged(), []
        for place, (ask, own, stock) in enumerate(zip(made.asks, ours, theirs, strict=True)):
            early = None
            if place in made.of_labels:
                early = [self.label(ask.prompt)]
                judged.labels[own.tokens[0] == early] += 1
            elif place in made.of_objects:
                early = self.early_tokens(ask)
                judged.sure += early is not None
            if early is not None and own.tokens[0] == early:
                judged.early += place in made.of_objects
            else:
                stocks.append((own, stock, ask))
        assert_same(*map(list, zip(*stocks, strict=True)))
        return judged


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return tiny_engine(model, None, **ENGINE)


@pytest.fixture(scope="module")
def engine_of(model, tmp_path_factory) -> Callable[..., Engine]:
    def made(probe: str = "label-head", **settings: Any) -> Engine:
        folder = tmp_path_factory.mktemp("artifacts")
        more = {"pooled_from": POOLED_FROM} if probe == "pooled-label-head" else {}
        objects = save_policy(model, folder / "objects", probe=probe, **more)
        labels = tiny_artifact(model, folder / "labels")
        policies = {"objects": str(objects), "labels": str(labels)}
        llm = tiny_engine(
            model, {"artifact": policies, "min_rows_saved": 1}, **{**ENGINE, **settings}
        )
        artifact = load_artifact(labels)
        return Engine(
            llm,
            Oracle(model, load_artifact(objects)),
            artifact.config.label_ids,
            artifact.tensors,
        )

    return made


@pytest.fixture(scope="module")
def engine(engine_of) -> Engine:
    return engine_of()


def run(engine: Engine, stock: Any, made: Traffic) -> tuple[Judged, Drafted]:
    theirs = served(stock, deepcopy(made.asks))  # vLLM writes to the parameters of requests
    with counted_drafts(engine.llm) as counted:
        found = served(engine.llm, deepcopy(made.asks))
    return engine.judge(made, found, theirs), counted


SMALL_CACHE = {"num_gpu_blocks_override": 13, "kv_cache_memory_bytes": 8 << 20}
ENGINES: dict[str, dict[str, Any]] = {
    "small steps": {"max_num_batched_tokens": 96},
    "a small KV cache": SMALL_CACHE,
    "pooled, small steps": {"probe": "pooled-label-head", "max_num_batched_tokens": 96},
    "pooled": {"probe": "pooled-label-head"},
    "small steps and cache": {"max_num_batched_tokens": 128, **SMALL_CACHE},
    "no guess fits": {"max_num_batched_tokens": 24},
    "no prefix cache": {"enable_prefix_caching": False},
    "one request at a time": {"max_num_seqs": 1},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": 256},
}


@pytest.mark.parametrize("seed", needed(1, of=range(4)))
def test_mixed_traffic_gets_the_heads_objects_or_stocks(engine, stock, seed):
    judged, _ = run(engine, stock, traffic(engine.label_ids, seed, 120))
    assert judged.early > 10
    assert judged.labels[True] > 3


def test_no_sampler_sees_a_row_of_logits_without_a_token(engine, stock, monkeypatch):
    """Those of early objects have none of their own."""
    network, _, _ = parts(engine.llm)
    compute, rows = network.compute_logits, Counter[bool]()

    def checked(*args: Any) -> torch.Tensor:
        logits: torch.Tensor = compute(*args)
        assert not logits.isneginf().all(dim=1).any()
        assert logits.isfinite().any()
        rows.update((logits == 0).all(dim=1).tolist())
        return logits

    monkeypatch.setattr(network, "compute_logits", checked)
    run(engine, stock, traffic(engine.label_ids, 31, 30))
    assert rows[True] > 20
    assert rows[False] > 100


def test_a_reload_may_not_change_what_the_scheduler_writes(engine):
    """It keeps the values' tokens, and the guess, of the policy that it started with."""
    before = engine.oracle.artifact.config
    assert before.objects is not None
    first, *others = before.objects.fields
    other = before.objects.model_copy(
        update={"fields": (first.model_copy(update={"guess": 0}), *others)}
    )
    check_replaces("objects", before, before)
    with pytest.raises(AdaInferError, match="how its objects are written"):
        check_replaces("objects", before.model_copy(update={"output": other}), before)


@pytest.mark.parametrize("kind", needed(["small steps and cache"], of=ENGINES))
def test_in_every_engine(engine_of, stock, kind):
    engine = engine_of(**ENGINES[kind])
    judged, counted = run(engine, stock, traffic(engine.label_ids, 20, 90))
    assert (judged.early > 0) == (kind != "no guess fits"), judged
    assert (counted.preempted > 0) == ("cache" in kind and "prefix" not in kind)
