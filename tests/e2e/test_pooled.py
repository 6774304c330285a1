"""Pooled policies read whole prompts, and what they cannot see as a whole by its last token."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams

from tests import student
from tests.conftest import small_engine, tiny_engine
from tests.e2e.asking import outputs as outputs_of
from tests.e2e.pooled import (
    ALWAYS,
    GAPS,
    KINDS,
    LEVELS,
    NEVER,
    POOLED_FROM,
    SOME,
    STEP,
    expected,
    finished,
    mixed_load,
    part_of,
    random_prompt,
    request,
    thresholds,
    traced,
)
from tests.e2e.scripted import parts
from tests.full import needed
from tests.tiny import LAYERS, tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer import stats
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import LAST_TOKEN
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.evaluation.same_pass import compare_in_same_pass
from vllm_adainfer.settings.engine import DEFAULT_POLICY, NO_POLICY
from vllm_adainfer.watch.watch import Watch

NEVER_TIGHTENED = 1e-99  # an alpha of monitors


@pytest.fixture(scope="module")
def artifacts(tiny_model) -> dict[str, Artifact]:
    """Each part of each policy, by name."""
    found = {}
    for name, kind in KINDS.items():
        config = tiny_config(tiny_model, levels=LEVELS, **kind)
        tensors = tiny_tensors(config, *thresholds(config))
        encoder = None if config.student is None else student.encoder()
        found |= Artifact(config, tensors, encoder=encoder).parts(name)
    return found


@pytest.fixture(scope="module")
def sources(tiny_model, tmp_path_factory) -> dict[str, str]:
    folder, found = tmp_path_factory.mktemp("pooled"), {}
    for name, kind in KINDS.items():
        config = tiny_config(tiny_model, levels=LEVELS, **kind)
        artifact = tiny_artifact(
            tiny_model, folder / name, *thresholds(config), levels=LEVELS, **kind
        )
        found[name] = str(artifact)
    return found


@pytest.fixture(scope="module")
def llm(tiny_model, sources) -> Any:
    """With monitors, though its own draw makes no request a shadow request."""
    switch = {"artifact": sources, "min_rows_saved": 1, "shadow_rate": 1e-12}
    return tiny_engine(tiny_model, switch, max_model_len=512, kv_cache_memory_bytes=64 << 20)


@pytest.mark.parametrize("seed", needed(2, of=range(10)))
def test_each_request_is_answered_by_the_part_that_sees_what_is_left_of_it(
    llm, reference, artifacts, seed
):
    """Twice: the second time prefixes are cached, or are completed for the next one."""
    prompts, generator = mixed_load(seed), np.random.default_rng(seed)
    counts = {"whole": 8, "student": 6, "pool": 3, "last": 3, "alone": 1}
    one_each = [kind for kind, count in counts.items() for _ in range(count)]
    kinds = [str(kind) for kind in generator.permutation(one_each)]
    epsilons = [
        SOME if kinds[:place].count(kind) % 2 else ALWAYS for place, kind in enumerate(kinds)
    ]
    asked = [request(*one, artifacts) for one in zip(kinds, epsilons, strict=True)]
    llm.reset_prefix_cache()
    found: Counter[Any] = Counter()
    for _ in range(3):
        before, work_before, other_prompts = stats(llm)["policies"], work_of(llm), 0
        with traced(llm) as (ran, _):
            outputs = outputs_of(llm, prompts, asked)
        for output, kind, prompt, params in zip(outputs, kinds, prompts, asked, strict=True):
            own = ran[output.request_id]
            name = part_of(kind, prompt, output.num_cached_tokens, artifacts)
            assert own.policy == (NO_POLICY if own.forced else name)
            found[own.policy, own.depth] += 1
            other_prompts += not artifacts[kind].config.shared.are_in(prompt)
            wanted = expected(reference, artifacts.get(own.policy), prompt, params)
            if wanted is not None:
                assert (own.depth, output.outputs[0].token_ids[0]) == wanted
        computed = sum(len(p) - o.num_cached_tokens for p, o in zip(prompts, outputs, strict=True))
        assert work_of(llm) - work_before == LAYERS * computed
        refused = Counter(stats(llm)["policies"]["student"]["not_covered"])
        refused.subtract(before.get("student", {}).get("not_covered", {}))
        assert refused == Counter(other_prompt=other_prompts)
        counted = Counter((one.policy, one.depth) for one in ran.values())
        for name, own in stats(llm)["policies"].items():
            new = Counter(own["exit_histogram"])
            new.subtract(before.get(name, {}).get("exit_histogram", {}))
            assert {d: n for d, n in new.items() if n} == {
                int(d): n for (policy, d), n in counted.items() if policy == name
            }
    assert found["whole", 0], "the case must have requests of every kind"
    assert found["student", 0] + found[f"student:{LAST_TOKEN}", 0]
    assert {policy for policy, _ in found} >= {"whole", f"whole:{LAST_TOKEN}", "last", NO_POLICY}


def work_of(llm: Any) -> int:
    """Token-layers run or skipped, of all policies."""
    policies = stats(llm)["policies"].values()
    return sum(one["layers_run"] + one["layers_skipped"] for one in policies)


def test_a_request_that_leaves_before_the_first_layer_runs_none_and_caches_nothing(llm, artifacts):
    prompt = random_prompt(np.random.default_rng(7), 100)
    llm.reset_prefix_cache()
    before = stats(llm)["layers_run"]
    params = request("whole", ALWAYS, artifacts)
    with traced(llm) as (ran, _):
        [first] = outputs_of(llm, [prompt], params)
        assert stats(llm)["layers_run"] == before
        [second] = outputs_of(llm, [prompt], params)
        assert stats(llm)["layers_run"] == before + 100 * LAYERS
        [third] = outputs_of(llm, [prompt], params)
    depths = [ran[one.request_id].depth for one in (first, second, third)]
    assert depths == [0, LAYERS, 2]  # the second completes the prefix, which the third reads
    assert [one.num_cached_tokens for one in (first, second, third)] == [0, 0, 96]


def test_what_is_read_of_a_prompt_is_the_same_alone_among_others_and_in_other_chunks(
    llm, artifacts
):
    """Bit for bit, where the layers before give the same states bit for bit; else nearly so."""
    generator = np.random.default_rng(3)
    prompts = [random_prompt(generator, n) for n in (300, 41, 90, 129, 64, 200)]
    params = request("whole", NEVER, artifacts)
    llm.reset_prefix_cache()
    with traced(llm) as (_, among):
        outputs_of(llm, prompts, params)
    for prompt in prompts:
        llm.reset_prefix_cache()
        with traced(llm) as (_, read):
            outputs_of(llm, [prompt], params)
        for (policy, exit_index), [alone] in read.items():
            others = [one for one in among[policy, exit_index] if one.shape == alone.shape]
            distances = [float((one - alone).abs().max()) for one in others]
            assert policy == "whole"
            assert min(distances) <= (0 if exit_index == 0 else 1e-4)


def test_what_never_leaves_has_the_states_of_what_may_not(llm, artifacts):
    prompts = mixed_load(4)
    states = []
    for opted_in in 1, 0:
        llm.reset_prefix_cache()
        with traced(llm) as (ran, _):
            outputs = outputs_of(
                llm, prompts, request("whole", NEVER, artifacts, adainfer=opted_in)
            )
        assert {one.depth for one in ran.values()} == {LAYERS}
        states.append([ran[one.request_id].state for one in outputs])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_a_prompt_that_a_reload_interrupts_is_read_by_its_last_token(llm, reference, artifacts):
    prompt = random_prompt(np.random.default_rng(11), 300)
    params = request("whole", SOME, artifacts)
    llm.reset_prefix_cache()
    llm.llm_engine.add_request("interrupted", {"prompt_token_ids": prompt}, params)
    llm.llm_engine.step()
    carried = parts(llm)[0].loop.carried
    assert list(carried.ends.values()) == [STEP]
    llm.collective_rpc("adainfer_reload")
    with traced(llm) as (ran, _):
        outputs = finished(llm)
    own, name = ran["interrupted"], f"whole:{LAST_TOKEN}"
    token = outputs["interrupted"].outputs[0].token_ids[0]
    assert own.policy == name
    assert expected(reference, artifacts[name], prompt, params) in (None, (own.depth, token))
    assert not carried.read
    assert not carried.ends


@pytest.fixture(scope="module")
def scarce(tiny_model, sources) -> Any:
    return small_engine(tiny_model, sources["whole"])


@pytest.mark.parametrize("part", ["default", f"default:{LAST_TOKEN}"])
def test_a_preempted_prompt_begins_its_mean_again(scarce, reference, artifacts, monkeypatch, part):
    """Texts take the blocks that its second chunk needs. Later it finds its first chunk cached.

    Unless it does not look: then it is read as a whole.
    """
    generator = np.random.default_rng(5)
    prompts = [random_prompt(generator, n) for n in (250, 200)]
    params = request("whole", SOME, artifacts)
    params.skip_reading_prefix_cache = part == "default"
    _, _, scheduler = parts(scarce)
    preempted, preempt = [], scheduler._preempt_request

    def noting(one: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append((one.request_id.split("-")[0], one.num_computed_tokens))
        return preempt(one, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", noting)
    scarce.reset_prefix_cache()
    engine, text = scarce.llm_engine, SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    for number in range(3):
        prompt = {"prompt_token_ids": random_prompt(generator, 31)}
        engine.add_request(f"text{number}", prompt, text)
    engine.step()
    for number, prompt in enumerate(prompts):
        engine.add_request(f"long{number}", {"prompt_token_ids": prompt}, params)
    with traced(scarce) as (ran, read):
        outputs = finished(scarce)
    assert any(name == "long0" and tokens > POOLED_FROM for name, tokens in preempted)
    assert all(row.isfinite().all() for rows in read.values() for row in rows)
    assert ran["long0"].policy == part
    for number, prompt in enumerate(prompts):
        own, output = ran[f"long{number}"], outputs[f"long{number}"]
        wanted = artifacts[own.policy.replace("default", "whole")]
        token = output.outputs[0].token_ids[0]
        assert expected(reference, wanted, prompt, params) in (None, (own.depth, token))
    assert not parts(scarce)[0].loop.carried.read


def test_shadow_requests_are_watched_by_the_part_that_decides_them(
    llm, reference, artifacts, monkeypatch
):
    _, _, scheduler = parts(llm)
    monkeypatch.setattr(scheduler.admission.arrival, "is_shadow", lambda request_id: True)
    prompts, params = mixed_load(6), request("whole", SOME, artifacts)
    llm.reset_prefix_cache()
    loop, unsure = parts(llm)[0].loop, 0
    patient = {n: Watch([*GAPS[True]], NEVER_TIGHTENED) for n in loop.monitors}
    monkeypatch.setattr(loop, "monitors", patient)
    monkeypatch.setattr(loop.stats, "shadow", patient)
    wanted: dict[str, list[bool]] = defaultdict(list)
    with traced(llm) as (ran, _):
        for output, prompt in zip(outputs_of(llm, prompts, params), prompts, strict=True):
            own = ran[output.request_id]
            assert own.depth == LAYERS
            if own.forced:
                continue
            early = expected(reference, artifacts[own.policy], prompt, params)
            full = expected(reference, None, prompt, params)
            unsure += early is None or full is None
            if early is not None and full is not None:
                assert output.outputs[0].token_ids[0] == full[1]
                wanted[own.policy].append(early[1] != full[1])
    assert wanted.keys() == {"whole", f"whole:{LAST_TOKEN}"}
    for name, disagreed in wanted.items():
        found = stats(llm)["policies"][name]["shadow"][SOME]
        assert 0 <= found["checked"] - len(disagreed) <= unsure
        assert 0 <= found["disagreed"] - sum(disagreed) <= unsure


def test_a_comparison_in_the_same_pass_counts_whatever_part_decided_the_prompt(tiny_model, sources):
    """Prompts that share more than all do are in the cache, and are decided by their last token."""
    llm = tiny_engine(
        tiny_model,
        {"artifact": sources["whole"], "compare": True},
        max_model_len=512,
        kv_cache_memory_bytes=64 << 20,
    )
    generator = np.random.default_rng(3)
    start = random_prompt(generator, 2 * POOLED_FROM)
    prompts = [start + random_prompt(generator, 20) for _ in range(30)]
    prompts += [random_prompt(generator, 100) for _ in range(10)]
    examples = [Example(str(place), "", prompt, None) for place, prompt in enumerate(prompts)]
    config = load_artifact_config(sources["whole"])
    [found] = compare_in_same_pass(llm, examples, config, [ALWAYS]).values()
    counted = stats(llm)["policies"]
    whole, last = (
        sum(counted[name]["exit_histogram"].values())
        for name in (DEFAULT_POLICY, f"{DEFAULT_POLICY}:{LAST_TOKEN}")
    )
    assert min(whole, last) >= 10
    assert found.compared == whole + last
    assert found.broken == sum(
        counted[name]["shadow"][ALWAYS]["disagreed"]
        for name in (DEFAULT_POLICY, f"{DEFAULT_POLICY}:{LAST_TOKEN}")
    )
