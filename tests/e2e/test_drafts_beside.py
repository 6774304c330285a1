"""Drafts beside what else vLLM and the plugin do: answers stay stock vLLM's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModelForCausalLM
from vllm import SamplingParams, envs
from vllm.lora.request import LoRARequest
from vllm.reasoning import ReasoningParser

from tests.adapters import save_adapter
from tests.byte_model import byte_tokenizer, save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.drafted_engines import ENGINE, assert_stocks, backend, drafting, stock_engine
from tests.e2e.drafted_traffic import assert_same, counted_drafts, served, traffic
from tests.e2e.scripted import EXIT_AT, drawn, parts
from tests.families import FAMILIES, SHAPE
from tests.full import needed
from tests.tiny import tiny_artifact
from tests.triton_on_cpu import IS_V2

pytestmark = pytest.mark.skipif(IS_V2, reason="Model Runner V1 verifies as it samples")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return stock_engine(model, **backend("xgrammar"))


@pytest.fixture(scope="module")
def both(model) -> Any:
    """With both keys that work on stock vLLM's model."""
    switch = {"draft_structure": True, "finish_choices": True}
    return tiny_engine(model, switch, **ENGINE, **backend("xgrammar"))


@pytest.mark.full
def test_answers_under_adapters_are_drafted_from_those_under_the_same(model, tmp_path):
    adapters: list[Any] = [None]
    weights = AutoModelForCausalLM.from_pretrained(model)
    for number in (1, 2):
        directory = save_adapter(weights, tmp_path / str(number), seed=number)
        adapters.append(LoRARequest(f"adapter-{number}", number, str(directory)))
    # On a CPU vLLM 0.32 runs requests without an adapter with the last slot's: leave that empty.
    settings = {"enable_lora": True, "max_loras": 3, **backend("xgrammar")}
    ours, theirs = drafting(model, **settings), stock_engine(model, **settings)
    generator = np.random.default_rng(0)
    asks = [
        replace(ask, lora=adapters[generator.integers(3)])
        for ask in traffic(5, 150)
        if ask.params.prompt_logprobs is None  # vLLM 0.32 on a CPU crashes at these
    ]
    _, counted = assert_stocks(ours, theirs, asks)
    kept: Counter[int] = Counter()
    for place, tokens in counted.kept.items():
        kept[adapters.index(asks[place].lora)] += tokens
    assert min(kept[number] for number in range(3)) > 30


@pytest.mark.full
@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral"])
def test_layers_with_sliding_windows_see_what_they_see_in_stock(family, tmp_path):
    tokenizer = byte_tokenizer()
    shape = {**SHAPE, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = FAMILIES[family](**shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = drafting(tmp_path, **backend("xgrammar"))
    theirs = stock_engine(tmp_path, **backend("xgrammar"))
    _, counted = assert_stocks(ours, theirs, traffic(6, 100))
    assert counted.kept.total() > 100


def test_requests_that_exit_beside_drafts_change_neither(model, stock, tmp_path):
    """Whole texts whose tokens each leave at an exit point of their own, beside drafts."""
    artifact = tiny_artifact(model, tmp_path / "policy")
    switch = {"artifact": str(artifact), "min_rows_saved": 1, "finish_choices": False}
    settings = {**ENGINE, **backend("xgrammar")}
    ours = tiny_engine(model, switch, **settings)
    without = tiny_engine(model, {**switch, "draft_structure": False}, **settings)
    free = SamplingParams(temperature=0, max_tokens=30)
    asks = []
    for place, ask in enumerate(traffic(7, 80)):
        params = free.clone()
        params.extra_args = {EXIT_AT: place}
        asks += [ask, replace(ask, params=params, is_streamed=False, aborted_after=None)]
    with drawn(without):
        theirs = served(without, asks)
    with drawn(ours) as ran, counted_drafts(ours) as counted:
        found = served(ours, asks)
    assert_same(found, theirs, asks)
    assert_same(found[::2], served(stock, asks[::2]), asks[::2])
    assert counted.kept.total() > 100
    layers = Counter(one.layers for requests in ran.values() for one in requests)
    assert len(layers) == 4


@pytest.mark.parametrize("seed", needed(1, of=range(2)))
def test_answers_that_end_once_they_are_decided_have_stocks_texts(both, stock, seed):
    """The tokens of a rest are the tokenizer's, not the model's."""
    asks = [replace(ask, aborted_after=None) for ask in traffic(20 + seed, 100)]
    with counted_drafts(both) as counted:
        found = served(both, asks)
    for ask, own, other in zip(asks, found, served(stock, asks), strict=True):
        assert (own.texts, own.ends) == (other.texts, other.ends), ask
    assert counted.kept.total() > 100


@pytest.mark.full
@pytest.mark.parametrize("kind", ["recording", "outlines"])
def test_where_nothing_is_drafted_answers_are_stocks(model, stock, kind):
    """Not beside vLLM's own drafts: after numba is loaded, no engine starts in this process."""
    switch: dict[str, Any] = {"draft_structure": True}
    settings = backend("xgrammar")
    if kind == "recording":
        switch = {"record": (2, 5)}
    else:
        settings = backend("outlines")
        stock = stock_engine(model, **settings)
    ours = tiny_engine(model, switch, **{**ENGINE, **settings})
    _, counted = assert_stocks(ours, stock, traffic(8, 60, ["regex", "choice"]))
    assert not counted.drafted
    drafts = parts(ours)[2].drafts
    assert drafts is None or not drafts.report()


class Thinking(ReasoningParser):
    """Thoughts end with any of many tokens."""

    ENDS = frozenset(range(100, 200))

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return any(token in self.ENDS for token in input_ids)

    def is_reasoning_end_streaming(self, input_ids: Sequence[int], delta_ids: Any) -> bool:
        return any(token in self.ENDS for token in delta_ids)


def test_thoughts_before_an_answer_are_neither_drafted_nor_learnt(model, stock, monkeypatch):
    ours = drafting(model, **backend("xgrammar"))
    for llm in (ours, stock):
        manager = parts(llm)[2].structured_output_manager
        monkeypatch.setattr(manager, "reasoner_cls", Thinking)
    asks = [ask for ask in traffic(9, 120) if ask.params.min_tokens == 0]
    found, counted = assert_stocks(ours, stock, asks)
    thought = [
        place
        for place, got in enumerate(found)
        if not any(token in Thinking.ENDS for tokens in got.tokens.values() for token in tokens)
    ]
    assert 0 < len(thought) < len(asks)
    assert not counted.drafted.keys() & set(thought)
    assert counted.kept.total() > 100


@pytest.mark.full
def test_two_ranks_keep_the_same_drafts(model, stock, all_cores, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{all_cores[0]}|{all_cores[-1]}")
    envs.disable_envs_cache()  # an engine that ran in this process has frozen vLLM's view
    ours = drafting(model, tensor_parallel_size=2, **backend("xgrammar"))
    _, counted = assert_stocks(ours, stock, traffic(10, 60))
    assert counted.kept.total() > 100
