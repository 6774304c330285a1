"""Calibrate: prompts in, artifact out (data -> collect -> fit -> choose -> certify -> write)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.outputs import LabelPool, Objects
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.label_pool import subsets_of
from vllm_adainfer.offline.calibration.data.objects import Schema
from vllm_adainfer.offline.calibration.data.questions import ends_of
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.choose import candidate_layers
from vllm_adainfer.offline.calibration.fit.guesser import taught
from vllm_adainfer.offline.calibration.fit.probes import (
    Target,
    full_depth_labels,
    full_depth_objects,
)
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, fit_policy
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.offline.calibration.prompts import Prompts, load_prompts
from vllm_adainfer.offline.calibration.record.collect import Plan, recorded
from vllm_adainfer.offline.calibration.record.objects import Untaught, recorded_objects
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.calibration.record.values import check_tells
from vllm_adainfer.offline.calibration.write.policy_artifact import write_artifact
from vllm_adainfer.offline.pretrained import engine_settings
from vllm_adainfer.offline.progress import say
from vllm_adainfer.policy.first_tokens import FirstTokens

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest

# How many tokens an exit point can answer with when the vocabulary is open. They make up 87 % of
# what SmolLM2 writes, and the tokens it is sure of early are common ones: simulated at epsilon
# 0.02, a probe of all 49,152 tokens saves 8.0 % of the layers and this one 6.8 %, but the former
# costs an LM head at every exit point.
SHORTLIST = 1024
# If more of the answers begin with a token that decides no choice, that is why nothing is saved.
UNDECIDED_IS_WHY = 0.5


def calibrate(request: CalibrationRequest) -> ArtifactConfig:
    """Calibrate a policy and write its artifact.

    An AdaInferError if the input, the model or the bound does not allow it; nothing is written.
    """
    started = time.monotonic()
    prompts = load_prompts(request)
    if prompts.schema is None:
        rows = record_prompts(request, prompts)
    else:
        prompts, rows = record_objects(request, prompts, prompts.schema)
    say_what_they_share(prompts)
    return fit_and_certify(request, prompts, rows, started)


def record_prompts(
    request: CalibrationRequest, prompts: Prompts, branches: Sequence[int] = ()
) -> Rows:
    """Run the model at full depth; for `branches`, once more with the states of all tokens."""
    options, hf_config, labels = request.options, prompts.hf_config, prompts.output.labels
    depth, first_tokens = hf_config.num_hidden_layers, FirstTokens.of(prompts.output)
    label_ids = [label.token_id for label in labels]
    answers = label_ids if first_tokens is None else first_tokens.token_ids.tolist()
    plan = Plan(
        branches or candidate_layers(depth, options.exit_points, prompts.probe),
        answers,
        options.max_tokens,
        len(prompts.split.fit) if prompts.probe == "lens" else 0,
        prompts.pooled_from,
        branches,
    )
    adapter, settings = engine_of(request)
    rows = recorded(request.model, hf_config, prompts.examples, plan, adapter, **settings)
    if first_tokens is None:
        return rows
    return replace(rows, tokens=np.array(label_ids)[first_tokens.labels_of(rows.tokens)])


def engine_of(request: CalibrationRequest) -> tuple[LoRARequest | None, dict[str, Any]]:
    """The adapter that prompts are run with, and the settings of the engine that runs them."""
    settings = engine_settings(request.adapter, request.hf_overrides, request.engine_options)
    return request.adapter and request.adapter.request, settings


def record_objects(
    request: CalibrationRequest, prompts: Prompts, schema: Schema
) -> tuple[Prompts, Rows]:
    """Run the model at full depth, with a guessed object behind each prompt."""
    hf_config, (adapter, settings) = prompts.hf_config, engine_of(request)
    layers = candidate_layers(
        hf_config.num_hidden_layers, request.options.exit_points, prompts.probe
    )
    plan = Plan(layers, pooled_from=prompts.pooled_from)
    tokens = [example.token_ids for example in prompts.examples]
    rows, guesser = recorded_objects(
        request.model,
        hf_config,
        prompts.examples,
        plan,
        schema,
        prompts.tokenizer,
        Untaught(prompts.split.fit, partial(taught, tokens, prompts.split, prompts.shared)),
        adapter,
        **settings,
    )
    check_tells(guesser.objects, request.options.promise)
    return replace(prompts, output=guesser.objects, guesser=guesser), rows


def say_what_they_share(prompts: Prompts) -> None:
    """Say how many prompts repeat others, and which requests the policy will serve."""
    repeats, shared = prompts.split.repeats, prompts.shared
    if repeats is not None:
        say(
            f"{np.count_nonzero(repeats)} of {len(repeats)} prompts repeat another one: "
            "equal prompts are in one part, and the bound must hold both with each of them counted "
            "and with each prompt counted once"
        )
    if shared:
        say(
            f"prompts begin with {len(shared.start)} and end with {len(shared.end)} tokens that "
            "all of them have (template, chat template, question): requests without these will run "
            "all layers"
        )


def fit_and_certify(
    request: CalibrationRequest, prompts: Prompts, rows: Rows, started: float | None = None
) -> ArtifactConfig:
    """Make the policy and write its artifact; `started` is when calibration did, if that counts.

    An AdaInferError if no policy keeps the bound and is worth its cost; nothing is written.
    """
    calibration = calibration_of(request, prompts, rows)
    policy = fit_policy(
        calibration,
        request.probe,
        prompts.student,
        None
        if prompts.schema is not None
        else lambda layers: record_prompts(request, prompts, layers).own_states,
    )
    epsilon = request.options.epsilon
    if epsilon not in policy.points:
        undecided = float(np.mean(rows.tokens == calibration.target.undecided))
        if undecided > UNDECIDED_IS_WHY:
            raise AdaInferError(
                f"{undecided:.0%} of the answers of {request.model} begin with a token that "
                "decides no choice, such as a lone space, and no such request can exit: end the "
                "template where a choice begins, show answered examples in it, or use --labels"
            )
        raise AdaInferError(
            f"no exit point of {request.model} is worth its cost on these prompts within epsilon "
            f"{epsilon:g}: raise --epsilon, or give new rows (another try on the same held-out "
            "half would have a larger delta)"
        )
    if prompts.schema is not None:
        check_spares_rows(policy, [example.token_ids for example in prompts.examples])
    if started is not None:
        policy = replace(policy, seconds=time.monotonic() - started)
    adapter = None if request.adapter is None else request.adapter.described
    output, template = request.output, request.template
    schema = None if prompts.schema is None else prompts.schema.text
    return write_artifact(
        policy, request.model, prompts.hf_config, template, output, adapter, schema
    )


def check_spares_rows(policy: FittedPolicy, prompts: Sequence[Sequence[int]]) -> None:
    """Check that early objects spare more rows than wrong guesses waste, on the held-out prompts.

    An AdaInferError if they do not: drafts alone, which end at unsure values, are faster then.
    """
    calibration = policy.calibration
    rows, held_out, guesser = calibration.rows, calibration.held_out, calibration.guesser
    assert guesser is not None, "the objects that are decided have one"
    exits = policy.points[calibration.options.epsilon].exits
    layers = np.array([*(exit.layer for exit in policy.exits), rows.model.depth])
    spared = float(np.mean(rows.computed[held_out] * (1 - layers[exits] / rows.model.depth)))
    asked = zip(rows.prompts[held_out].tolist(), rows.tokens[held_out].tolist(), strict=True)
    discarded = np.array([guesser.wasted(prompts[prompt], code) for prompt, code in asked])
    wasted = float(np.mean(discarded * (exits == len(policy.exits))))
    if spared <= wasted:
        raise AdaInferError(
            f"early objects would spare {spared:.1f} rows of a prompt, and wrong guesses waste "
            f"{wasted:.1f}: drafts alone answer these requests faster (draft_structure). Raise "
            "--epsilon, or give more prompts"
        )


def calibration_of(request: CalibrationRequest, prompts: Prompts, rows: Rows) -> Calibration:
    """The data and options that the policy is made from."""
    split, output, options = prompts.split, prompts.output, request.options
    labels = output.labels
    token_ids = [label.token_id for label in labels]
    answers = torch.tensor(token_ids) if labels else None
    if options.max_tokens > 1:  # the commonest tokens, ascending
        found, counts = np.unique(rows.tokens[rows.of(split.fit)], return_counts=True)
        commonest = found[np.argsort(-counts, kind="stable")[:SHORTLIST]]
        answers = torch.from_numpy(np.sort(commonest))
    promise = options.promise.about([label.name for label in labels], output.link)
    is_pool = isinstance(output, LabelPool)
    subsets = subsets_of(prompts.examples, token_ids) if is_pool else None
    full_depth = None
    if promise.reads_probabilities and answers is not None:
        full_depth = (
            full_depth_objects(rows)
            if isinstance(output, Objects)
            else full_depth_labels(rows, answers, subsets, promise.link)
        )
    never = frozenset(label.token_id for label in labels if label.name in options.never_early)
    questions = [one.question for one in prompts.examples if one.question is not None]
    return Calibration(
        rows,
        Target(
            prompts.probe,
            answers,
            full_depth,
            subsets,
            FirstTokens.of(output),
            promise,
            never,
            output if isinstance(output, Objects) else None,
        ),
        split,
        options,
        output,
        prompts.right,
        pooled_from=prompts.pooled_from,
        questions=questions,
        ends=ends_of([prompts.examples[row] for row in split.fit]) if questions else {},
        shared=prompts.shared,
        guesser=prompts.guesser,
    )
