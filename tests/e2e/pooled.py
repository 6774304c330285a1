"""Policies that read whole prompts: some of them, what ran under each, and the definition.

Of transformers' states after some layers, each divided by the root of its mean square: the last
one, and the mean of those from position `POOLED_FROM` on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm import SamplingParams

from tests import student
from tests.e2e.oracle import TIE, hidden_states
from tests.e2e.scripted import parts, running_of
from tests.tiny import LAYERS
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig
from vllm_adainfer.artifact.fields import Label, LastToken, Level, SharedTokens
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.policy.encoders import StateEncoder
from vllm_adainfer.policy.policy import tensors_of
from vllm_adainfer.settings.engine import NO_POLICY

POOLED_FROM, STEP = 40, 128  # tokens
# What a student's prompts begin with; it answers no others, nor do the heads beside it.
ASKED = SharedTokens(start=tuple(np.random.default_rng(20).integers(100, 1000, 20).tolist()))
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
        "branches": (2,),
        "last_token": LastToken(exit_points=(2, 4), levels=LEVELS),
    },
    "pool": {
        "probe": "pooled-label-head",
        "pooled_from": POOLED_FROM,
        "exit_points": (0, 4),
        "branches": (4,),
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
    "student": {
        "probe": "pooled-label-head",
        "pooled_from": POOLED_FROM,
        "exit_points": (0, 2, 4),
        "last_token": LastToken(exit_points=(0, 4), levels=LEVELS),
        "labels": (Label(name="c", token_id=31), Label(name="d", token_id=32)),
        **student.asked_with(ASKED, most_tokens=48),
        "never_early": ("d",),
    },
}


def thresholds(config: ArtifactConfig) -> list[Tensor]:
    """Those of each part."""
    return [
        torch.tensor([*GAPS[part.is_pooled].values()]).unsqueeze(1).repeat(1, len(part.exit_points))
        for part in config.parts("").values()
    ]


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
    """Yields, by a client's id, what ran; by policy and exit point, what each request was read by.

    That is [1, width], or for a branch [tokens, width].
    """
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
            resolved = running._requests[request_id]
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
            lens = [1] * len(rows.hidden) if not rows.lens.size else rows.lens.tolist()
            read[name, exit_index] += rows.hidden.clone().split(lens)
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


def what_is_read(states: Tensor, pooled_from: int | None) -> Tensor:
    """Of the states [prompt, hidden size] after a layer; None: by the last token alone."""
    if pooled_from is None:
        return states[-1]
    normed = states / (states.square().mean(1, keepdim=True) + 1e-6).sqrt()
    return torch.cat([normed[-1], normed[pooled_from:].mean(0)])


def encoder_after(layer: int, part: Artifact) -> StateEncoder:
    """Its own definition is `tests/unit/test_branch.py`."""
    return StateEncoder.of(tensors_of(part.tensors, f"exit.{layer}.branch."), torch.device("cpu"))


@torch.inference_mode()
def expected(
    reference: Any, part: Artifact | None, prompt: list[int], params: Any
) -> tuple[int, int] | None:
    """Depth and token; None where it is too close to call. `part` None: full depth."""
    states, own = hidden_states(reference, prompt), params.allowed_token_ids
    config = None if part is None else part.config
    for layer, what in zip(config.exit_points, config.probe_inputs, strict=True) if config else ():
        gap = GAPS[part.config.is_pooled][params.extra_args["adainfer_epsilon"]]
        head = f"exit.{layer}.head"
        if what is ProbeInput.TEXT:
            text = student.reader(part.config.student, part.config.shared)(prompt)
            if not text:
                continue
            read = student.bert()(torch.tensor([text])).last_hidden_state[0].mean(0)
        elif layer in part.config.branches:
            read = encoder_after(layer, part)([states[layer][part.config.pooled_from :]])[0]
        else:
            read = what_is_read(states[layer], part.config.pooled_from)
        scores = part.tensors[f"{head}_weight"] @ read + part.tensors[f"{head}_bias"]
        among = scores[[part.config.label_ids.index(token) for token in own]].softmax(0)
        best = among.sort().values
        lead = float(best[-1] - best[-2])
        if abs(lead - gap) < TIE or lead < TIE:
            return None
        answer = own[int(among.argmax())]
        never = {one.token_id for one in config.labels if one.name in config.never_early}
        if lead > gap and answer not in never:
            return layer, answer
    best = reference.lm_head(reference.model.norm(states[LAYERS][-1]))[own].topk(2)
    tie = best.values[0] - best.values[1] < TIE
    return None if tie else (LAYERS, own[int(best.indices[0])])


def part_of(kind: str, prompt: list[int], cached: int, artifacts: dict[str, Artifact]) -> str:
    """The name of the part of a policy that is to decide a request."""
    if not artifacts[kind].config.shared.are_in(prompt):
        return NO_POLICY
    if not artifacts[kind].config.is_pooled:
        return kind
    if len(prompt) > POOLED_FROM and cached <= POOLED_FROM:
        return kind
    last_token = f"{kind}:{LAST_TOKEN}"
    return last_token if last_token in artifacts else NO_POLICY


def mixed_load(seed: int) -> list[list[int]]:
    """Short, chunked, alike up to `POOLED_FROM`, alike beyond it, and again; most with `ASKED`."""
    generator, asked = np.random.default_rng(seed), list(ASKED.start)
    head = [*asked, *random_prompt(generator, POOLED_FROM - len(asked))]
    longer = [*head, *random_prompt(generator, 60)]
    prompts = [random_prompt(generator, n) for n in (1, 39, 90, 300)]
    prompts += [
        [*asked, *random_prompt(generator, n - len(asked))] for n in (40, 41, 42, 128, 129, 170)
    ]
    prompts += [[*head, *random_prompt(generator, n)] for n in (1, 20, 100, 200)]
    prompts += [[*longer, *random_prompt(generator, n)] for n in (1, 20, 100, 200)]
    prompts += [prompts[index] for index in (5, 8, 12)]
    return [prompts[index] for index in generator.permutation(len(prompts))]


def finished(llm: Any) -> dict[str, Any]:
    """Step until all requests have ended; their outputs."""
    outputs = {}
    while llm.llm_engine.has_unfinished_requests():
        outputs |= {one.request_id: one for one in llm.llm_engine.step() if one.finished}
    return outputs
