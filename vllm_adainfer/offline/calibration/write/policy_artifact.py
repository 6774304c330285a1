"""Write: the artifact of a fitted policy, with its config, its tensors and its provenance."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vllm_adainfer.artifact.artifact import Encoder
from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig
from vllm_adainfer.artifact.fields import Adapter, LastToken, Level, Question
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.artifact.kinds import LABEL_HEADS
from vllm_adainfer.offline.calibration.certify.path import PathPoint, held_out_path, threshold_grid
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.training import SERVED_DTYPE
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy
from vllm_adainfer.offline.calibration.write.card import model_card
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.policy.text_encoders import TextEncoder


def write_artifact(
    policy: FittedPolicy,
    model: str,
    hf_config: Any,
    template: str | None,
    directory: Path,
    adapter: Adapter | None = None,
    schema: str | None = None,
) -> ArtifactConfig:
    """Write a policy that certified its own epsilon to `directory`.

    `model` is a directory or hub id, `hf_config` its config; `template` is as it was given, and
    `schema`, that of objects, as requests send it.

    An AdaInferError if `directory` cannot be written.
    """
    is_local = Path(model).is_dir()
    name = Path(model).name if is_local else model
    config = policy_config(policy, name, hf_config, adapter)
    labels = [label.name for label in policy.calibration.labels]
    place = str(Path(model).absolute()) if is_local else model
    said = {"model": place, "template": template, "labels": labels}
    details = {**said, **policy_details(policy)}
    if schema is not None:
        details["schema"] = schema
    encoder, tokenizer = None, ""
    if policy.student is not None and policy.student.base is not None:
        tokenizer = policy.student.base.tokenizer
        assert isinstance(policy.student.probe.encoder, TextEncoder)
        own = policy.student.probe.encoder
        encoder = Encoder(
            own.settings,
            {n: t.to(SERVED_DTYPE).contiguous() for n, t in own.tensors().items()},
        )
    card = model_card(config, details)
    tensors, guesser = policy_tensors(policy), policy.calibration.guesser
    if guesser is not None:
        tensors |= guesser.tensors
    save_artifact(directory, config, tensors, details, card, encoder, tokenizer)
    return config


def policy_config(
    policy: FittedPolicy, name: str, hf_config: Any, adapter: Adapter | None = None
) -> ArtifactConfig:
    """``config.json``; `name` is the name of the model, `hf_config` its config."""
    calibration = policy.calibration
    model, options = calibration.rows.model, calibration.options
    head_size = model.logit_lens.head.hidden_size
    base = None if policy.student is None else policy.student.base
    last_token = None
    if (last := policy.last_token) is not None:
        last_token = LastToken(
            exit_points=tuple(exit.layer for exit in last.exits),
            levels=_levels(last),
            certified={name: tuple(points) for name, points in last.questions.items()},
            one_bound=True,
        )
    return ArtifactConfig(
        base_model=name,
        architecture=hf_config.architectures[0],
        layers=model.depth,
        hidden_size=hf_config.hidden_size,
        vocab_size=hf_config.vocab_size,
        head_size=None if head_size == hf_config.hidden_size else head_size,
        weights_fingerprint=model.fingerprint,
        engine_options=model.engine_options,
        adapter=adapter,
        exit_points=tuple(exit.layer for exit in policy.exits),
        probe=calibration.target.kind,
        student=None if base is None else base.described,
        branches=policy.branches,
        shared=calibration.shared,
        pooled_from=calibration.pooled_from if calibration.target.is_pooled else None,
        last_token=last_token,
        output=calibration.output,
        features=calibration.target.promise.feature_names,
        classifier=options.classifier,
        epsilon=options.epsilon,
        delta=options.delta,
        promise=calibration.target.promise,
        label_bounds=options.label_bounds,
        never_early=options.never_early,
        bound=policy.terms.bound.kind,
        any_exit_point=calibration.any_exit_point,
        largest_group=calibration.split.most_together(calibration.split.groups),
        max_tokens=options.max_tokens,
        questions=_questions(policy),
        by_question=options.by_question,
        levels=_levels(policy),
    )


def _levels(policy: FittedPolicy) -> tuple[Level, ...]:
    """What is certified at each epsilon; where each question has its own bound, the largest."""
    terms, found = policy.terms, []
    for epsilon, point in policy.points.items():
        bounds = _question_bounds(policy, epsilon).values()
        level = Level(
            epsilon=epsilon,
            disagreement=point.disagreement,
            risk=point.risk,
            bound=max(bounds) if bounds else terms.bound.within(epsilon, point.losses),
            layers_saved=point.layers_saved,
            label_risks=tuple(test.risk(point.answers, point.full) for test in terms.tests),
        )
        found.append(level)
    return tuple(found)


def _question_bounds(policy: FittedPolicy, epsilon: float) -> dict[str, float]:
    """Upper confidence bound of the risk of each question that is certified on its own."""
    bound, rows = policy.terms.bound, policy.terms.rows_by_question()
    return {
        name: bound.of_rows(rows[name]).within(epsilon, own[epsilon].losses)
        for name, own in policy.questions.items()
        if epsilon in own
    }


def _questions(policy: FittedPolicy) -> tuple[Question, ...]:
    """Those that serving can recognise; where each has its own bound, those that have one."""
    calibration = policy.calibration
    if not calibration.options.by_question:
        return tuple(Question(name=name, ends=ends) for name, ends in calibration.ends.items())
    return tuple(
        Question(name=name, ends=calibration.ends[name], certified=tuple(points))
        for name, points in policy.questions.items()
    )


def policy_tensors(policy: FittedPolicy) -> dict[str, Tensor]:
    """The tensors of ``policy.safetensors``."""
    target, labels = policy.calibration.target, policy.calibration.labels
    label_heads = target.kind in LABEL_HEADS
    rows_of_model_head = not label_heads and target.label_ids is not None
    thresholds = torch.tensor(_thresholds(policy))
    tensors = {"thresholds": thresholds.unsqueeze(1).repeat(1, len(policy.exits))}
    if target.label_ids is not None and not labels:
        tensors["shortlist"] = target.label_ids
    for exit in policy.exits:
        name, probe = f"exit.{exit.layer}", exit.probe
        tensors[f"{name}.classifier"] = exit.classifier
        tensors |= {f"{name}.{part}": tensor for part, tensor in probe.fitted_tensors.items()}
        if rows_of_model_head:
            tensors["head_rows"] = probe.head.weight
    if policy.last_token is not None:
        own = policy_tensors(policy.last_token)
        # Copies: both parts have the same student, and a file has no shared tensors.
        tensors |= {f"{LAST_TOKEN}.{name}": tensor.clone() for name, tensor in own.items()}
    return tensors


def _thresholds(policy: FittedPolicy) -> list[float]:
    """The rows of thresholds, see `ArtifactConfig.threshold_row`; uncertified ones are unused."""
    if not policy.calibration.options.by_question:
        return [point.threshold for point in policy.points.values()]
    return [
        own[epsilon].threshold if epsilon in own else float("inf")
        for own in policy.questions.values()
        for epsilon in policy.points
    ]


def policy_details(policy: FittedPolicy) -> dict[str, Any]:
    """``calibration.json``: the provenance of the policy, and the share and cost of each exit."""
    calibration = policy.calibration
    rows, split, costs = calibration.rows, calibration.split, policy.costs
    held_out, bound, queries = calibration.held_out, policy.terms.bound, policy.terms.queries
    _, counts = np.unique(rows.tokens[held_out], return_counts=True)
    point = policy.points[calibration.options.epsilon]
    leaving = np.bincount(point.exits, minlength=len(policy.exits) + 1) / len(held_out)
    agreement: dict[bool, dict[str, float]] = {False: {}, True: {}}  # of heads, and of branches
    for exit in policy.candidates:
        agreement[exit.is_branch][str(exit.layer)] = float(exit.held_out.agrees.mean())
    return {
        "prompts": len(split.fit) + len(split.certify),
        "prompts_repeated": 0 if split.repeats is None else int(split.repeats.sum()),
        "rows": len(rows.tokens),
        "rows_fitted": len(calibration.fitted),
        "rows_held_out": len(held_out),
        "queries_held_out": None if queries is None else [len(own) for own in queries.rows],
        "seed": calibration.options.seed,
        "majority_share": float(counts.max() / counts.sum()),
        "exit_points": [
            {
                "layer": exit.layer,
                "leaving": float(share),
                "agreement": float(exit.held_out.agrees.mean()),
                "probe_bytes": exit.probe.bytes,
                # In units of the time of one layer for one token.
                "probe_cost": costs.probe_of(exit) / costs.layer,
            }
            for exit, share in zip(policy.exits, leaving[:-1], strict=True)
        ],
        "agreement": agreement[False],
        "branch_agreement": agreement[True],
        "learning_curve": policy.learning_curve(),
        "oracle_layers_run": oracle_layers_run(policy),
        "questions": question_rows(policy, point),
        "never_named": never_named(calibration),
        "students": [asdict(student) for student in policy.students],
        "seconds": {
            "layer": costs.layer,
            "cut": costs.cut,
            "expected": policy.expected,
            "calibration": policy.seconds,
        },
        "risk_curve": [
            {
                "threshold": point.threshold if np.isfinite(point.threshold) else None,
                "risk": point.risk,
                "disagreement": point.disagreement,
                "bound": bound.of(point.losses),
                "layers_saved": point.layers_saved,
            }
            for point in held_out_path(
                policy.exits,
                costs.depth,
                threshold_grid(policy.exits),
                queries=queries,
                any_exit_point=calibration.any_exit_point,
            )
        ],
        "provenance": provenance(),
    }


def question_rows(policy: FittedPolicy, point: PathPoint) -> list[dict[str, Any]]:
    """The risk and savings of each question of a mixture, held out; the commonest comes first."""
    calibration, questions = policy.calibration, policy.terms.rows_by_question()
    if len(questions) < 2:
        return []
    depth = calibration.rows.model.depth
    saved = 1 - np.array([*(exit.layer for exit in policy.exits), depth])[point.exits] / depth
    bounds = _question_bounds(policy, calibration.options.epsilon)
    return [
        {
            "question": name,
            "prompts": int(own.sum()),
            "risk": float(point.losses[own].mean()),
            "layers_saved": float(saved[own].mean()),
            "known": name in calibration.ends,
            "bound": bounds.get(name),
        }
        for name, own in questions.items()
    ]


def never_named(calibration: Calibration) -> list[str]:
    """The labels of a pool that no prompt is about; the risk with them is unknown."""
    subsets = calibration.target.subsets
    if subsets is None:
        return []
    pairs = zip(calibration.labels, subsets.any(dim=0).tolist(), strict=True)
    return [label.name for label, named in pairs if not named]


def oracle_layers_run(policy: FittedPolicy) -> float:
    """Mean depth on the held-out rows if each row left where it first agrees with the full model.

    Over all candidates: what a perfect classifier would reach.
    """
    agrees = np.stack([exit.held_out.agrees for exit in policy.candidates])
    depth = policy.calibration.rows.model.depth
    layers = np.array([*(exit.layer for exit in policy.candidates), depth])
    first = np.where(agrees.any(axis=0), agrees.argmax(axis=0), len(agrees))
    return float(layers[first].mean())
