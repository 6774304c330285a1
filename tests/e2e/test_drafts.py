"""Drafts change no answer: what requests get is stock vLLM's, to the token."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.byte_model import save_byte_model
from tests.e2e.drafted_engines import assert_stocks, backend, drafting, stock_engine
from tests.e2e.drafted_traffic import GRAMMARS, Ask, counted_drafts, prompts, served, traffic
from tests.e2e.scripted import parts
from tests.full import needed
from tests.triton_on_cpu import IS_V2
from vllm_adainfer.drafts.grammars import Grammars
from vllm_adainfer.engine.admission.requested_output import only_grammar_decides
from vllm_adainfer.engine.compat.drafts import why_nothing_is_drafted
from vllm_adainfer.engine.startup.refusals import REQUEST_CHECK

pytestmark = pytest.mark.skipif(IS_V2, reason="Model Runner V1 verifies as it samples")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return stock_engine(model, **backend("xgrammar"))


@pytest.fixture(scope="module")
def engine(model) -> Any:
    return drafting(model, **backend("xgrammar"))


@pytest.mark.parametrize("seed", needed(1, of=range(5)))
def test_mixed_traffic_gets_stocks_answers_in_fewer_steps(engine, stock, seed):
    asks = traffic(seed, 120)
    _, counted = assert_stocks(engine, stock, asks)
    assert counted.kept.total() > 300
    for place in counted.drafted:
        assert only_grammar_decides(asks[place].params)


@pytest.mark.parametrize("kind", needed(["enums", "tag"], of=GRAMMARS))
def test_answers_to_each_kind_of_grammar_are_drafted(engine, stock, kind, monkeypatch):
    monkeypatch.setattr(parts(engine)[2].drafts, "_grammars", Grammars())  # none is at rest
    structured = StructuredOutputsParams(**GRAMMARS[kind])
    params = SamplingParams(temperature=0, max_tokens=60, structured_outputs=structured)
    # One after the other: how long vLLM compiles a grammar must not decide what was learnt before.
    counted = [assert_stocks(engine, stock, [Ask(text, params)])[1] for text in prompts(3, 2) * 3]
    assert min(one.kept.total() for one in counted[4:]) > 1, counted
    assert not counted[0].drafted, "a grammar may never come again: its first answer is not kept"


@pytest.mark.parametrize(
    ("processors", "drafts"), [(["theirs.Processor"], False), ([f"{REQUEST_CHECK}:Check"], True)]
)
def test_nothing_is_drafted_beside_processors_that_see_one_token_of_a_request_at_a_time(
    engine, monkeypatch, processors, drafts
):
    config = parts(engine)[2].vllm_config
    monkeypatch.setattr(config.model_config, "logits_processors", processors)
    assert (why_nothing_is_drafted(config) is None) == drafts


@pytest.mark.parametrize(
    ("part", "name", "value", "reason"),
    [
        ("model_config", "runner_type", "pooling", "does not generate"),
        ("parallel_config", "pipeline_parallel_size", 2, "over a pipeline"),
        ("parallel_config", "decode_context_parallel_size", 2, "spread over ranks"),
        ("parallel_config", "enable_batch_sharded_sampling", True, "on several ranks"),
        ("parallel_config", "worker_cls", "theirs.Worker", "custom worker"),
        ("cache_config", "kv_offloading_size", 1.0, "KV connector"),
        ("model_config", "return_sampling_mask", True, "sampling masks"),
        ("model_config", "enable_trace_replay", True, "traces"),
        ("observability_config", "per_request_spec_decode_metrics", "basic", "metrics"),
        ("scheduler_config", "async_scheduling", True, "Model Runner V1"),
        ("", "speculative_config", object(), "speculative decoding"),
        ("", "kv_transfer_config", object(), "KV connector"),
        ("", "watermark_config", object(), "watermarked"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_why_nothing_is_drafted_is_said(engine, monkeypatch, part, name, value, reason):
    config = parts(engine)[2].vllm_config
    assert why_nothing_is_drafted(config) is None
    monkeypatch.setattr(getattr(config, part) if part else config, name, value)
    said = why_nothing_is_drafted(config)
    assert said is not None
    assert reason in said


NO_SPACE = backend("xgrammar", disable_any_whitespace=True)
SMALL_CACHE = {"num_gpu_blocks_override": 12, "kv_cache_memory_bytes": 8 << 20}
ENGINES: dict[str, dict[str, Any]] = {
    "guidance": backend("guidance"),
    "a small KV cache": {**SMALL_CACHE, **backend("xgrammar")},
    "objects without white space": NO_SPACE,
    "guidance, without white space": backend("guidance", disable_any_whitespace=True),
    "no prefix cache": {"enable_prefix_caching": False, **backend("xgrammar")},
    "small steps": {"max_num_batched_tokens": 16, **backend("xgrammar")},
    "large steps": {"max_num_batched_tokens": 2048, **backend("xgrammar")},
    "small steps and cache": {"max_num_batched_tokens": 24, **SMALL_CACHE, **backend("guidance")},
    "one request at a time": {"max_num_seqs": 1, **backend("xgrammar")},
    "large blocks": {"block_size": 64, **backend("xgrammar")},
}


@pytest.mark.parametrize("kind", needed(2, of=ENGINES))
def test_they_are_stocks_in_every_engine(model, stock, kind):
    settings = ENGINES[kind]
    ours = drafting(model, **settings)
    same = settings["structured_outputs_config"] == backend("xgrammar")["structured_outputs_config"]
    structured = {"structured_outputs_config": settings["structured_outputs_config"]}
    theirs = stock if same else stock_engine(model, **structured)
    _, counted = assert_stocks(ours, theirs, traffic(100, 80))
    # Drafts take what is left of a step: of 16 or 24 rows, prompts leave hardly any.
    assert counted.kept.total() > (10 if "small steps" in kind else 100)
    assert (counted.preempted > 0) == ("cache" in kind and "prefix" not in kind)


@pytest.mark.parametrize("seed", needed(1, of=range(3)))
def test_refused_drafts_never_enter_the_prefix_cache(engine, stock, seed):
    """Later requests go on from earlier answers, whose blocks they find in the cache."""
    asks = traffic(200 + seed, 50, grammars=["enums", "nested", "free text"])
    asks = [replace(ask, aborted_after=None) for ask in asks]
    hits = []
    for _ in range(2):
        found, counted = assert_stocks(engine, stock, asks)
        assert counted.drafted.total() > counted.kept.total() > 0
        generator, tokenizer = np.random.default_rng(seed), engine.get_tokenizer()
        again = []
        for ask, got in zip(asks, found, strict=True):
            before = ask.prompt
            tokens = before["prompt_token_ids"] if isinstance(before, dict) else None
            whole = [*(tokens or tokenizer.encode(before)), *got.tokens[0]]
            cut = int(generator.integers(len(whole) // 2, len(whole))) + 1
            more = {} if cut > 160 else {"max_tokens": 60}
            if cut < 180:
                prompt = {"prompt_token_ids": [*whole[:cut], 70]}
                again.append(replace(ask, prompt=prompt, params=_changed(ask.params, **more)))
        hits.append(len(again))
        asks = again
    assert min(hits) > 15


def _changed(params: SamplingParams, **changes: Any) -> SamplingParams:
    changed = params.clone()
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


@pytest.mark.full
def test_samples_without_a_seed_have_stocks_distribution(engine, stock, monkeypatch):
    monkeypatch.setattr(parts(engine)[2].drafts, "_grammars", Grammars())  # none is at rest
    structured = StructuredOutputsParams(regex="the (film|plot) is (good|bad), no [abc]{2}")
    params = SamplingParams(temperature=1.5, max_tokens=60, structured_outputs=structured)
    asks = [Ask("abc", params)] * 900
    with counted_drafts(engine) as counted:
        ours = Counter(got.texts[0] for got in served(engine, asks))
    theirs = Counter(got.texts[0] for got in served(stock, asks))
    assert counted.kept.total() > 5 * len(asks)
    often = [text for text in ours | theirs if ours[text] + theirs[text] >= 10]
    assert len(often) > 5
    chi_square = sum((ours[one] - theirs[one]) ** 2 / (ours[one] + theirs[one]) for one in often)
    assert chi_square < len(often) + 5 * (2 * len(often)) ** 0.5
