"""Requests with drafts have several rows of logits; in the same step, all others get theirs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM
from vllm import SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.adapters import PROJECTIONS, save_adapter
from tests.byte_model import save_byte_model
from tests.conftest import tiny_engine
from tests.e2e.drafted_engines import FixedCosts
from tests.e2e.drafted_traffic import (
    GRAMMARS,
    Ask,
    Got,
    assert_same,
    counted_drafts,
    place_of,
    prompts,
    scheduler_of,
    served,
)
from tests.e2e.scripted import parts
from tests.full import full_on_v2
from tests.tiny import tiny_artifact, tiny_config
from vllm_adainfer import stats
from vllm_adainfer.engine.scheduler.drafts import ROWS_PER_STEP_ON_CPU

SETTINGS: dict[str, Any] = {
    "max_model_len": 256,
    "kv_cache_memory_bytes": 64 << 20,
    "enable_lora": True,
    "max_loras": 3,  # one more than there are, as in test_adapters
    "max_lora_rank": 8,
    "structured_outputs_config": {"backend": "xgrammar"},
}
PROMPTS = prompts(5, 6, longest=60)
STRUCTURED = SamplingParams(
    temperature=0, max_tokens=40, structured_outputs=StructuredOutputsParams(**GRAMMARS["enums"])
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("bytes"))


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory) -> list[LoRARequest | None]:
    """None, and two that also change the LM head."""
    reference, folder = LlamaForCausalLM.from_pretrained(model), tmp_path_factory.mktemp("adapters")
    modules = *PROJECTIONS, "lm_head"
    paths = [save_adapter(reference, folder / str(number), number, modules) for number in (1, 2)]
    return [
        None,
        *(LoRARequest(path.name, int(path.name), str(path)) for path in paths),
    ]


@pytest.fixture(scope="module")
def policy(model, tmp_path_factory) -> Path:
    """It settles every row at the first exit point."""
    return tiny_artifact(model, tmp_path_factory.mktemp("artifact") / "policy")


@pytest.fixture(scope="module")
def stock(model) -> Any:
    return tiny_engine(model, None, **SETTINGS)


@pytest.fixture(scope="module")
def drafting(model) -> Any:
    return tiny_engine(model, {"draft_structure": True}, **SETTINGS)


@pytest.fixture(scope="module")
def exiting(model, policy) -> Any:
    return tiny_engine(model, {"artifact": str(policy), "min_rows_saved": 1}, **SETTINGS)


@pytest.fixture(scope="module")
def about_labels(model) -> SamplingParams:
    labels = [label.token_id for label in tiny_config(model).labels]
    return SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=labels)


def structured(adapters: list[LoRARequest | None], count: int) -> list[Ask]:
    """One prompt again and again, under each of `adapters` in turn."""
    return [
        Ask(PROMPTS[0], STRUCTURED, step=3 * place, lora=adapters[place % len(adapters)])
        for place in range(count)
    ]


def test_rows_of_drafts_keep_the_adapter_of_their_request(drafting, stock, adapters):
    asks = structured(adapters, 9)
    with counted_drafts(drafting) as counted:
        assert_same(served(drafting, asks), served(stock, asks), asks)
    assert {place % len(adapters) for place in counted.kept} == {0, 1, 2}


def labelled(asks: list[Ask], params: SamplingParams, adapters: list[LoRARequest | None]) -> Any:
    """One question for each few of `asks`, which comes while they run."""
    return [
        Ask(prompt, params, step=5 + 3 * place, lora=adapters[place % len(adapters)])
        for place, prompt in enumerate(PROMPTS * (len(asks) // 3))
    ]


def beside(llm: Any, asks: list[Ask], others: list[Ask]) -> tuple[list[Got], list[Got], int]:
    """What all get, and how many steps had drafts and requests of `others`."""
    scheduler, both = parts(llm)[2], Counter[bool]()
    update = scheduler.update_from_output

    def counting(scheduled: Any, output: Any) -> Any:
        last = max(map(place_of, scheduled.num_scheduled_tokens), default=-1)
        both[bool(scheduled.scheduled_spec_decode_tokens) and last >= len(asks)] += 1
        return update(scheduled, output)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "update_from_output", counting)
        found = served(llm, [*asks, *others])
    return found[: len(asks)], found[len(asks) :], both[True]


def test_labels_of_requests_that_exit_beside_drafts_are_those_they_get_alone(
    exiting, stock, about_labels, adapters
):
    asks = structured(adapters, 9)
    others = labelled(asks, about_labels, adapters)
    before = Counter(stats(exiting)["exit_histogram"])
    alone = served(exiting, others)
    assert len(Counter(stats(exiting)["exit_histogram"]) - before) == 2, "the base exits early"
    exiting.reset_prefix_cache()
    found, labels, both = beside(exiting, asks, others)
    assert both > 2
    assert [one.tokens for one in labels] == [one.tokens for one in alone]
    assert len({tuple(one.tokens[0]) for one in labels}) == 2
    assert_same(found, served(stock, asks), asks)


@full_on_v2
def test_shadow_requests_beside_drafts_are_compared_with_their_own_full_depth(
    model, policy, about_labels, monkeypatch
):
    switch = {"artifact": str(policy), "min_rows_saved": 1, "shadow_rate": 1.0}
    llm = tiny_engine(model, switch, **SETTINGS)
    # What a row costs is not measured, so that the same is drafted on any machine.
    monkeypatch.setattr(scheduler_of(llm).drafts, "_costs", FixedCosts(ROWS_PER_STEP_ON_CPU))
    asks = structured([None], 12)
    others = labelled(asks, about_labels, [None])

    def differed() -> int:
        return int(sum(one["disagreed"] for one in stats(llm)["shadow"].values()))

    served(llm, others)
    alone = differed()
    llm.reset_prefix_cache()
    _, _, both = beside(llm, asks, others)
    assert both > 2
    assert 0 < differed() - alone == alone
