"""Pooled policies read whole prompts, and what they cannot see as a whole by its last token.

The definition written out: of transformers' states after some layers, each divided by the root of
its mean square, the last one, and the mean of those from position `POOLED_FROM` on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import SamplingParams

from tests.conftest import small_engine, tiny_engine
from tests.e2e.oracle import TIE, hidden_states
from tests.e2e.scripted import parts, running_of
from tests.full import needed
from tests.tiny import LAYERS, tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer import stats
from vllm_adainfer.artifact.config import LAST_TOKEN, Artifact, ArtifactConfig
from vllm_adainfer.artifact.fields import Label, LastToken, Level
from vllm_adainfer.monitoring.monitor import AnswerMonitor
from vllm_adainfer.settings.engine import NO_POLICY

POOLED_FROM, STEP = 40, 128  # tokens
NEVER_TIGHTENED = 1e-99  # an alpha of monitors
NEVER, SOME, ALWAYS = 0.01, 0.02, 0.05  # epsilons, and who leaves at them
# The lead in probability at which rows settle: of the last token alone, and of whole prompts.
GAPS = {
    False: {NEVER: np.inf, SOME: 0.12, ALWAYS: -1.0},
    True: {NEVER: np.inf, SOME: 0.5, ALWAYS: -1.0},
}
LEVELS = tuple(
    Level(epsilon=epsilon, disagreement=0.0, risk=0.0, bound=0.01, layers_saved=0.1)
    for epsilon in (NEVER, SOME, ALWAYS)
)
POOL = tuple(Label(name=f"label {token}", token_id=token) for token in (40, 7, 300, 12))
OTHERS = tuple(Label(name=f"other {token}", token_id=token) for token in (60, 50))
KINDS: dict[str, dict[str, Any]] = {
    "whole": {
        "probe": "pooled-label-head",
        "pooled_from": POOLED_FROM,
        "exit_points": (0, 2, 4),
        "last_token": LastToken(exit_points=(2, 4), levels=LEVELS),
    },
    "pool": {
        "probe": "pooled-label-head",
        "pooled_from": POOLED_FROM,
        "exit_points": (0, 4),
        "last_token": LastToken(exit_points=(4,), levels=LEVELS),
        "labels": POOL,
        "label_pool": True,
        "risk": "probability",
        "tolerance": 0.05,
        "label_mass": True,
    },
    "alone": {
        "probe": "pooled-label-head",
        "pooled_from": POOLED_FROM,
        "exit_points": (2, 5),
        "labels": (Label(name="a", token_id=21), Label(name="b", token_id=22)),
    },
    "last": {"exit_points": (2, 3), "labels": OTHERS},
}


def thresholds(config: ArtifactConfig) -> list[Tensor]:
    """Those of each part."""
    return [
        torch.tensor([*GAPS[part.is_pooled].values()]).unsqueeze(1).repeat(1, len(part.exit_points))
        for part in config.parts("").values()
    ]


@pytest.fixture(scope="module")
def artifacts(tiny_model) -> dict[str, Artifact]:
    """Each part of each policy, by name."""
    found = {}
    for name, kind in KINDS.items():
        config = tiny_config(tiny_model, levels=LEVELS, **kind)
        found |= Artifact(config, tiny_tensors(config, *thresholds(config))).parts(name)
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


@dataclass(frozen=True)
class Ran:
    """Under which policy a request's last prompt token ran, through how many layers.

    `forced` says whether it had to run to full depth, to complete a prefix for others.
    """

    policy: str
    depth: int
    forced: bool
    state: Tensor


@contextmanager
def traced(llm: Any) -> Iterator[tuple[dict[str, Ran], dict[Any, list[Tensor]]]]:
    """Yields, by a client's id, what ran; by policy and exit point, all that the policy read."""
    model, runner, _ = parts(llm)
    loop, running = model.loop, running_of(runner)
    ran: dict[str, Ran] = {}
    read: dict[Any, list[Tensor]] = defaultdict(list)
    depths: dict[int, int] = {}
    run, regroup, policy_set = loop.run, loop._regroup, loop.policies

    def noting(batch: Any, input_ids: Tensor, step: Any) -> Any:
        depths.clear()
        names, owners = loop.policies.names, loop.policies.owners(step.threshold_rows)
        output = run(batch, input_ids, step)
        for place in np.flatnonzero(step.yields_token).tolist():
            request_id, last = step.request_ids[place], int(step.layout.ends[place]) - 1
            resolved = running._admitted[request_id].resolved
            ran[request_id.split("-")[0]] = Ran(
                names[owners[place]],
                depths.get(place, LAYERS),
                resolved.force_full_depth_prefill,
                output.hidden[last].clone(),
            )
        return output

    def noting_who_leaves(exit_index: int, forward: Any) -> None:
        before = set(forward.step.exited.tolist())
        regroup(exit_index, forward)
        for place in set(forward.step.exited.tolist()) - before:
            depths[place] = loop.policies.exit_points[exit_index]

    def noting_what_is_read(name: str, decide: Any) -> Any:
        def deciding(exit_index: int, rows: Any) -> Any:
            read[name, exit_index] += rows.hidden.clone().unbind()
            return decide(exit_index, rows)

        return deciding

    loop.run, loop._regroup = noting, noting_who_leaves
    for name, policy in zip(policy_set.names, policy_set.policies, strict=False):
        policy.decide = noting_what_is_read(name, policy.decide)
    try:
        yield ran, read
    finally:
        del loop.run, loop._regroup
        for policy in policy_set.policies:
            del policy.decide


def request(kind: str, epsilon: float, artifacts: dict[str, Artifact], **more: Any) -> Any:
    """For one of the labels of a policy; of a pool, for one of the first three."""
    own = [*artifacts[kind].config.label_ids][: 3 if kind == "pool" else None]
    return SamplingParams(
        temperature=0,
        max_tokens=1,
        allowed_token_ids=own,
        extra_args={"adainfer_epsilon": epsilon, **more},
    )


def random_prompt(generator: np.random.Generator, length: int) -> list[int]:
    return generator.integers(100, 1000, length).tolist()


def ask(llm: Any, prompts: Sequence[list[int]], params: Any) -> list[Any]:
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, params, use_tqdm=False)


def what_is_read(states: Tensor, pooled_from: int | None) -> Tensor:
    """Of the states [prompt, hidden size] after a layer; None: by the last token alone."""
    if pooled_from is None:
        return states[-1]
    normed = states / (states.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return torch.cat([normed[-1], normed[pooled_from:].mean(0)])


@torch.inference_mode()
def expected(
    reference: Any, part: Artifact | None, prompt: list[int], params: Any
) -> tuple[int, int] | None:
    """Depth and token; None where it is too close to call. `part` None: full depth."""
    states, own = hidden_states(reference, prompt), params.allowed_token_ids
    for layer in () if part is None else part.config.exit_points:
        gap = GAPS[part.config.is_pooled][params.extra_args["adainfer_epsilon"]]
        head = f"exit.{layer}.head"
        read = what_is_read(states[layer], part.config.pooled_from)
        scores = part.tensors[f"{head}_weight"] @ read + part.tensors[f"{head}_bias"]
        among = scores[[part.config.label_ids.index(token) for token in own]].softmax(0)
        best = among.sort().values
        lead = float(best[-1] - best[-2])
        if abs(lead - gap) < TIE or lead < TIE:
            return None
        if lead > gap:
            return layer, own[int(among.argmax())]
    best = reference.lm_head(reference.model.norm(states[LAYERS][-1]))[own].topk(2)
    tie = best.values[0] - best.values[1] < TIE
    return None if tie else (LAYERS, own[int(best.indices[0])])


def part_of(kind: str, prompt: list[int], cached: int, artifacts: dict[str, Artifact]) -> str:
    """The name of the part of a policy that is to decide a request."""
    if not artifacts[kind].config.is_pooled:
        return kind
    if len(prompt) > POOLED_FROM and cached <= POOLED_FROM:
        return kind
    last_token = f"{kind}:{LAST_TOKEN}"
    return last_token if last_token in artifacts else NO_POLICY


def mixed_load(seed: int) -> list[list[int]]:
    """Short, chunked, alike up to `POOLED_FROM`, alike beyond it, and again."""
    generator = np.random.default_rng(seed)
    head = random_prompt(generator, POOLED_FROM)
    longer = [*head, *random_prompt(generator, 60)]
    prompts = [random_prompt(generator, n) for n in (1, 39, 40, 41, 42, 90, 128, 129, 170, 300)]
    prompts += [[*head, *random_prompt(generator, n)] for n in (1, 20, 100, 200)]
    prompts += [[*longer, *random_prompt(generator, n)] for n in (1, 20, 100, 200)]
    prompts += [prompts[index] for index in (5, 8, 12)]
    return [prompts[index] for index in generator.permutation(len(prompts))]


@pytest.mark.parametrize("seed", needed(2, of=range(10)))
def test_each_request_is_answered_by_the_part_that_sees_what_is_left_of_it(
    llm, reference, artifacts, seed
):
    """Twice: the second time prefixes are cached, or are completed for the next one."""
    prompts, generator = mixed_load(seed), np.random.default_rng(seed)
    kinds = [str(one) for one in generator.choice([*KINDS], len(prompts), p=(0.5, 0.2, 0.1, 0.2))]
    asked = [
        request(kind, float(generator.choice([SOME, ALWAYS], p=(0.7, 0.3))), artifacts)
        for kind in kinds
    ]
    llm.reset_prefix_cache()
    found: Counter[Any] = Counter()
    for _ in range(3):
        before = stats(llm)["policies"]
        with traced(llm) as (ran, _):
            outputs = ask(llm, prompts, asked)
        for output, kind, prompt, params in zip(outputs, kinds, prompts, asked, strict=True):
            own = ran[output.request_id]
            name = part_of(kind, prompt, output.num_cached_tokens, artifacts)
            assert own.policy == (NO_POLICY if own.forced else name)
            found[own.policy, own.depth] += 1
            wanted = expected(reference, artifacts.get(own.policy), prompt, params)
            if wanted is not None:
                assert (own.depth, output.outputs[0].token_ids[0]) == wanted
        counted = Counter((one.policy, one.depth) for one in ran.values())
        for name, own in stats(llm)["policies"].items():
            new = Counter(own["exit_histogram"])
            new.subtract(before.get(name, {}).get("exit_histogram", {}))
            assert {d: n for d, n in new.items() if n} == {
                int(d): n for (policy, d), n in counted.items() if policy == name
            }
    for place in ("whole", 0), ("whole", LAYERS), ("pool", 0), (f"whole:{LAST_TOKEN}", 2):
        assert found[place], "the case must have such requests"


def test_a_request_that_leaves_before_the_first_layer_runs_none_and_caches_nothing(llm, artifacts):
    prompt = random_prompt(np.random.default_rng(7), 100)
    llm.reset_prefix_cache()
    before = stats(llm)["layers_run"]
    params = request("whole", ALWAYS, artifacts)
    with traced(llm) as (ran, _):
        [first] = ask(llm, [prompt], params)
        assert stats(llm)["layers_run"] == before
        [second] = ask(llm, [prompt], params)
        assert stats(llm)["layers_run"] == before + 100 * LAYERS
        [third] = ask(llm, [prompt], params)
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
        ask(llm, prompts, params)
    for prompt in prompts:
        llm.reset_prefix_cache()
        with traced(llm) as (_, read):
            ask(llm, [prompt], params)
        for (policy, exit_index), [alone] in read.items():
            others = torch.stack(among[policy, exit_index])
            distances = (others - alone).abs().amax(1)
            assert policy == "whole"
            assert distances.min() <= (0 if exit_index == 0 else 1e-4)


def test_what_never_leaves_has_the_states_of_what_may_not(llm, artifacts):
    prompts = mixed_load(4)
    states = []
    for opted_in in 1, 0:
        llm.reset_prefix_cache()
        with traced(llm) as (ran, _):
            outputs = ask(llm, prompts, request("whole", NEVER, artifacts, adainfer=opted_in))
        assert {one.depth for one in ran.values()} == {LAYERS}
        states.append([ran[one.request_id].state for one in outputs])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def finished(llm: Any) -> dict[str, Any]:
    """Step until all requests have ended; their outputs."""
    outputs = {}
    while llm.llm_engine.has_unfinished_requests():
        outputs |= {one.request_id: one for one in llm.llm_engine.step() if one.finished}
    return outputs


def test_a_prompt_that_a_reload_interrupts_is_read_by_its_last_token(llm, reference, artifacts):
    prompt = random_prompt(np.random.default_rng(11), 300)
    params = request("whole", SOME, artifacts)
    llm.reset_prefix_cache()
    llm.llm_engine.add_request("interrupted", {"prompt_token_ids": prompt}, params)
    llm.llm_engine.step()
    carried = parts(llm)[0].loop.carried
    assert list(carried._ends.values()) == [STEP]
    llm.collective_rpc("adainfer_reload")
    with traced(llm) as (ran, _):
        outputs = finished(llm)
    own, name = ran["interrupted"], f"whole:{LAST_TOKEN}"
    token = outputs["interrupted"].outputs[0].token_ids[0]
    assert own.policy == name
    assert expected(reference, artifacts[name], prompt, params) in (None, (own.depth, token))
    assert not carried._sums
    assert not carried._ends


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
    assert not parts(scarce)[0].loop.carried._sums


def test_shadow_requests_are_watched_by_the_part_that_decides_them(
    llm, reference, artifacts, monkeypatch
):
    _, _, scheduler = parts(llm)
    monkeypatch.setattr(scheduler.admission, "is_shadow", lambda request_id: True)
    prompts, params = mixed_load(6), request("whole", SOME, artifacts)
    llm.reset_prefix_cache()
    loop, unsure = parts(llm)[0].loop, 0
    patient = {n: AnswerMonitor([*GAPS[True]], NEVER_TIGHTENED) for n in loop.monitors}
    monkeypatch.setattr(loop, "monitors", patient)
    wanted: dict[str, list[bool]] = defaultdict(list)
    with traced(llm) as (ran, _):
        for output, prompt in zip(ask(llm, prompts, params), prompts, strict=True):
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
        found = loop.monitors[name].as_dict()[SOME]
        assert 0 <= found["checked"] - len(disagreed) <= unsure
        assert 0 <= found["disagreed"] - sum(disagreed) <= unsure
