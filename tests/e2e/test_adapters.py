"""With LoRA adapters, rows keep their adapter through every cut, and policies decide for theirs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from tests.adapters import PROJECTIONS, merged, save_adapter
from tests.conftest import tiny_engine
from tests.e2e.asking import ask, ask_and_count, greedy
from tests.e2e.oracle import TIE, hidden_states
from tests.e2e.patterns import drawn_pattern, wrong_of
from tests.e2e.scripted import parts, running_of
from tests.full import needed
from tests.tiny import EXIT_POINTS, FROM_ZERO, LAYERS, tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer import stats
from vllm_adainfer.artifact.fields import Choice, Label
from vllm_adainfer.engine.runner import adapters as adapter_files
from vllm_adainfer.engine.runner.build_loop import monitors_of, policies_of
from vllm_adainfer.offline.adapter import read_adapter
from vllm_adainfer.settings.engine import NO_POLICY

MODULES = {
    "all": PROJECTIONS,
    "few": ("q_proj", "down_proj"),
    "values": ("v_proj",),
    "head": (*PROJECTIONS, "lm_head"),
}
# One slot more than there are adapters: on a CPU, vLLM 0.32 gives rows without an adapter the one
# in the last slot (its pull requests 48421 and 49656).
SETTINGS = {"enable_lora": True, "max_loras": len(MODULES) + 1, "max_lora_rank": 8}
CACHE = {"max_model_len": 320, "kv_cache_memory_bytes": 8 << 20}
WRITTEN_OTHERWISE = {
    "labels": (Label(name="bad", token_id=1), Label(name="good", token_id=2)),
    "choices": (
        Choice(text="bad", token_ids=(1, 3), first_tokens=(1,)),
        Choice(text="good", token_ids=(2, 3), first_tokens=(2,)),
    ),
}
_GENERATOR = np.random.default_rng(3)
PROMPTS = [_GENERATOR.integers(5, 1000, 1 + 7 * i % 60).tolist() for i in range(30)]


@pytest.fixture(scope="module")
def adapters(reference, tmp_path_factory) -> list[LoRARequest]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        LoRARequest(name, number, str(save_adapter(reference, folder / name, number, modules)))
        for number, (name, modules) in enumerate(MODULES.items(), start=1)
    ]


@pytest.fixture(scope="module")
def references(reference, adapters) -> dict[str | None, Any]:
    """The oracle's model for each adapter, by its name; None for the base."""
    oracles = {one.lora_name: merged(reference, Path(one.lora_path)) for one in adapters}
    return {None: reference, **oracles}


@pytest.fixture(scope="module")
def engine(tiny_model, adapters, tmp_path_factory) -> Any:
    """Policies for the base and the first two adapters; requests preempt each other.

    Others may come with their adapter.
    """
    folder = tmp_path_factory.mktemp("policies")
    artifacts = {"base": str(tiny_artifact(tiny_model, folder / "base"))}
    for adapter in adapters[:2]:
        described = read_adapter(f"{adapter.lora_name}={adapter.lora_path}").described
        directory = folder / adapter.lora_name
        artifacts[f"for-{adapter.lora_name}"] = str(
            tiny_artifact(tiny_model, directory, adapter=described)
        )
    switch = {"artifact": artifacts, "exit_points": FROM_ZERO, "min_rows_saved": 1}
    return tiny_engine(tiny_model, switch, num_gpu_blocks_override=12, **CACHE, **SETTINGS)


@pytest.fixture(scope="module")
def stock(tiny_model) -> Any:
    return tiny_engine(tiny_model, None, num_gpu_blocks_override=12, **CACHE, **SETTINGS)


@pytest.mark.parametrize("seed", needed(2, of=range(12)))
def test_drawn_exits_of_requests_with_and_without_adapters_reproduce_the_oracle(
    engine, adapters, references, seed
):
    pattern, ran = drawn_pattern(engine, 500 + seed, adapters=[None, *adapters])
    for name, request in enumerate(pattern.requests):
        own = references[request.adapter and request.adapter.lora_name]
        assert wrong_of(own, pattern, name, ran) == [], request.adapter


def test_requests_that_never_exit_are_those_of_stock_bit_for_bit(engine, stock, adapters):
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3)
    asked = [[None, *adapters][i % (1 + len(adapters))] for i in range(len(PROMPTS))]

    def answers(llm: Any) -> list[Any]:
        llm.reset_prefix_cache()
        found = ask(llm, PROMPTS, params, lora_request=asked)
        return [(answer.token_ids, answer.logprobs) for answer in found]

    assert answers(engine) == answers(stock)


@pytest.fixture(scope="module")
def asked_about_labels(engine, tiny_model, adapters, references) -> Any:
    """Of requests about the labels: how many left after which layer, and which answers are wrong.

    Given are the adapters with a policy, None for the base model; of each request its adapter.
    """
    config = tiny_config(tiny_model)
    head = tiny_tensors(config)[f"exit.{EXIT_POINTS[0]}.head_weight"]
    params = greedy(allowed_token_ids=list(config.label_ids))
    asked = [[None, *adapters][i % (1 + len(adapters))] for i in range(len(PROMPTS))]

    def left_and_wrong(leaving: list[LoRARequest | None]) -> tuple[Counter[int], list[int]]:
        engine.reset_prefix_cache()
        found, left = ask_and_count(engine, PROMPTS, params, lora_request=asked)
        wrong_answers = []
        for prompt, adapter, answer in zip(PROMPTS, asked, found, strict=True):
            if adapter in leaving:
                own = references[adapter and adapter.lora_name]
                scores = (head @ hidden_states(own, prompt)[EXIT_POINTS[0]][-1]).tolist()
                best = config.label_ids[scores.index(max(scores))]
                if abs(scores[0] - scores[1]) > TIE and answer.token_ids != [best]:
                    wrong_answers.append(len(prompt))
        return left, wrong_answers

    return left_and_wrong


def leaving_alone(policies: int) -> tuple[Counter[int], list[int]]:
    """Each fifth request leaves for each of so many of the base model and four adapters."""
    fifth = len(PROMPTS) // 5
    return Counter({EXIT_POINTS[0]: policies * fifth, LAYERS: (5 - policies) * fifth}), []


def test_a_request_leaves_by_the_policy_of_its_adapter_alone(asked_about_labels, adapters):
    assert asked_about_labels([None, *adapters[:2]]) == leaving_alone(3)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "other cuts": (
        "new",
        {"exit_points": (1,)},
        r"has exit points \[1\], this engine only \[0, 2, ",
    ),
    "other weights": ("new", {"weights_fingerprint": "0"}, "other weights"),
    "other tokens": (
        "new",
        WRITTEN_OTHERWISE,
        "tokenizer writes the choice 'bad' with other tokens",
    ),
    "a name in use": (
        "base",
        {},
        "base is the name of another one: load the adapter under another",
    ),
    "a reserved name": ("full_depth", {}, "full_depth is the name of another one"),
    "the base model's": ("new", {"adapter": None}, r"bundled with: calibrate with --lora new="),
    "no memory": ("new", {}, "out of memory"),
    "a rank too high": ("new", {}, "rank"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_policy_beside_an_adapter_that_cannot_be_served_is_refused_with_the_adapter(
    engine, tiny_model, reference, adapters, tmp_path, asked_about_labels, monkeypatch, why
):
    """And the others stay as they were: tags of those that come later are numbered on."""
    name, changes, sentence = REFUSED[why]
    directory = save_adapter(reference, tmp_path / "saved", seed=9)
    described = read_adapter(f"any={directory}").described
    tiny_artifact(tiny_model, directory / "adainfer", **{"adapter": described, **changes})
    model, runner, _ = parts(engine)
    before = list(model.artifacts)

    def out_of_memory(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        if why == "no memory":
            patch.setattr("vllm_adainfer.engine.runner.build_loop.Policy", out_of_memory)
        if why == "a rank too high":
            patch.setattr(runner.lora_manager.lora_config, "max_lora_rank", 1)
        with pytest.raises(Exception, match=sentence):
            engine.llm_engine.add_lora(LoRARequest(name, 90, str(directory)))
    assert list(model.artifacts) == before
    assert 90 not in engine.llm_engine.list_loras()
    assert asked_about_labels([None, *adapters[:2]]) == leaving_alone(3)


def test_a_running_engine_reads_no_files_of_adapters_that_are_loaded(engine, adapters, monkeypatch):
    adapter = adapters[0]
    engine.llm_engine.add_lora(adapter)
    monkeypatch.setattr(adapter_files, "fingerprint_of", None)
    fingerprint = read_adapter(f"any={adapter.lora_path}").described.fingerprint
    assert running_of(parts(engine)[1]).adapters.fingerprint_of(adapter) == fingerprint


def test_a_policy_beside_an_adapter_decides_once_vllm_loads_it(
    engine, tiny_model, adapters, asked_about_labels
):
    """It was calibrated with the adapter under another name."""
    third = adapters[2]
    described = read_adapter(f"elsewhere={third.lora_path}").described
    folder = Path(third.lora_path, "adainfer")
    tiny_artifact(tiny_model, folder, adapter=described)
    assert asked_about_labels([None, *adapters[:2]]) == leaving_alone(3)
    engine.llm_engine.add_lora(third)
    assert asked_about_labels([None, *adapters[:3]]) == leaving_alone(4)
    engine.llm_engine.add_lora(adapters[0])  # has a policy of the switch, and none bundled
    engine.llm_engine.add_lora(third)  # again
    assert asked_about_labels([None, *adapters[:3]]) == leaving_alone(4)
    assert list(parts(engine)[0].loop.policies.names)[3:] == [third.lora_name, NO_POLICY]
    assert stats(engine)["policies"][third.lora_name]["layers_run"] > 0


def test_a_reload_keeps_what_was_seen_of_policies_that_came_with_adapters(engine, adapters):
    """They are not read again, so that their closed bounds stay closed."""
    model, _, _ = parts(engine)
    unwatched, came = model.settings, adapters[2].lora_name
    # Watched, but no request is drawn.
    model.settings = unwatched.model_copy(update={"shadow_rate": 1e-9})
    try:
        model.loop.use_policies(policies_of(model, model.exit_points), monitors_of(model))
        for name in "base", came:
            model.loop.monitors[name].tightened[:] = True
        engine.collective_rpc("adainfer_reload")
        assert model.loop.monitors[came].tightened.all()
        assert not model.loop.monitors["base"].tightened.any()
    finally:
        model.settings = unwatched
        model.loop.use_policies(policies_of(model, model.exit_points), {})


def test_a_policy_goes_with_its_adapter_and_the_others_and_all_counters_stay(
    engine, adapters, asked_about_labels
):
    third, model = adapters[2], parts(engine)[0]
    first_names = list(model.artifacts)[:3]
    before = stats(engine)["policies"]
    under_way = {"prompt_token_ids": (PROMPTS[8] * 5)[:280]}  # chunks of 128
    params = SamplingParams(temperature=0, max_tokens=4)
    engine.llm_engine.add_request("under way", under_way, params, lora_request=third)
    engine.llm_engine.step()
    assert engine.llm_engine.remove_lora(third.lora_int_id)
    while engine.llm_engine.has_unfinished_requests():
        engine.llm_engine.step()
    assert list(model.artifacts) == first_names
    assert list(model.loop.policies.names) == [*first_names, NO_POLICY]
    assert asked_about_labels([None, *adapters[:2]]) == leaving_alone(3)
    after = stats(engine)["policies"]
    assert after[third.lora_name] == before[third.lora_name]
    engine.llm_engine.add_lora(third)
    assert asked_about_labels([None, *adapters[:3]]) == leaving_alone(4)
    assert (
        stats(engine)["policies"][third.lora_name]["layers_run"]
        > (after[third.lora_name]["layers_run"])
    )
