"""The facts about an artifact: what it is for, what it promises, and what it saves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig
from vllm_adainfer.artifact.outputs import Objects
from vllm_adainfer.artifact.scope import (
    after_which_text,
    each_for_itself,
    not_seen_whole,
    served_prompts,
    student_in_words,
)
from vllm_adainfer.artifact.words import (
    at_most,
    outputs_in_words,
    probabilities_in_words,
    probes_in_words,
    promise_in_words,
)
from vllm_adainfer.offline.facts.document import Block, Facts, Table

SHOWN_VALUES = 8  # of a field
FEWEST_FOR_A_LINE = 3  # points of a learning curve
WORTH_MORE_PROMPTS = 1.0  # percentage points that the second half of the prompts has brought


def artifact_facts(config: ArtifactConfig, details: Mapping[str, Any]) -> list[Block]:
    """The purpose and the promise of an artifact, and the savings at the next looser bound.

    `details` is its ``calibration.json``.
    """
    return [
        _summary(config, details),
        _exit_points(config, details),
        _bound(config),
        Table(level_facts(config)),
        *_last_token(config),
        *_questions(config, details),
        *_not_covered(config, details),
        *_learning_curve(config, details),
        *after_which_text(config),
        expected_savings(config),
    ]


def _summary(config: ArtifactConfig, details: Mapping[str, Any]) -> Facts:
    per_token = config.max_tokens > 1
    rows = f"tokens of {details.get('prompts')} prompts" if per_token else "prompts"
    queries = details.get("queries_held_out") or ()
    labels = ", ".join(f"{label.name} ({label.token_id})" for label in config.labels)
    if config.choices:
        labels = "the first tokens of the choices"
    objects, whole = config.objects, f"{config.candidates} of the vocabulary"
    adapter, student, lost = config.adapter, config.student, config.promise.lost
    facts = {
        "model": f"{config.base_model} ({config.architecture}, {config.layers} layers, weights "
        f"{config.weights_fingerprint})",
        "served with": config.engine_options.in_words,
        "adapter": adapter and f"{adapter.name} (LoRA, fingerprint {adapter.fingerprint})",
        "probes": probes_in_words(config),
        **(_fields(objects) if objects else {"candidates": labels or whole}),
        "scores": config.score_head and f"of a classifier ({config.score_head})",
        "student": student and student_in_words(student),
        "classifier": f"{config.classifier} on {', '.join(config.features)}",
        "serves": f"requests for {outputs_in_words(config)}",
        "prompts": config.shared and f"{served_prompts(config.shared)}; others run all layers",
        "probabilities": probabilities_in_words(config),
        "calibrated": f"on {details['rows']} {rows}, {details['rows_held_out']} of them held out "
        f"for the bound; seed {details['seed']}",
        "queries held out": queries
        and f"{len(queries)}, with {sum(queries) / len(queries):.0f} documents on average",
        "majority baseline": f"{details['majority_share']:.1%} agreement",
        "promise": promise_in_words(config, config.epsilon),
        "bound": f"epsilon {config.epsilon:g} at delta {config.delta:g} on {lost} "
        f"{'per token ' if per_token else ''}({config.bound})",
    }
    return {name: text for name, text in facts.items() if text}


def _fields(objects: Objects) -> Facts:
    """What each field may be, and the object that stands behind a prompt while it is decided."""
    found = {}
    for field in objects.fields:
        shown, count = [one.text for one in field.values[:SHOWN_VALUES]], len(field.values)
        more = f", ... ({count})" if count > SHOWN_VALUES else ""
        found[f"field {field.path}"] = f"{', '.join(shown)}{more}"
    commonest = objects.in_words(objects.commonest)
    guess = f"{commonest} ({len(objects.written(objects.commonest))} tokens)"
    return {**found, "guess": f"by the text, such as {guess}" if objects.guesser else guess}


def _bound(config: ArtifactConfig) -> str:
    return (
        f"Each bound, {at_most(config)}, is one on the mean loss ({config.bound}), over the draw "
        "of the held-out prompts, for prompts from the same distribution. "
        f"{each_for_itself(config)}"
    )


def level_facts(config: ArtifactConfig) -> list[Facts]:
    """The epsilon table, on the held-out rows."""
    lost = config.promise.lost
    return [
        {
            "epsilon": f"{100 * level.epsilon:g} %",
            "disagreement, held out": f"{level.disagreement:.2%}",
            **({} if lost == "disagreement" else {lost: f"{level.risk:.2%}"}),
            "upper bound": f"{level.bound:.2%}",
            **{
                f"{promise.kind} of {promise.label}: changed (bound)": f"{found.risk:.2%} of "
                f"{found.rows} ({found.bound:.2%})"
                for promise, found in zip(config.label_bounds, level.label_risks, strict=False)
            },
            "layers saved": f"{level.layers_saved:.1%}",
        }
        for level in config.levels
    ]


def _exit_points(config: ArtifactConfig, details: Mapping[str, Any]) -> Table:
    marks = dict.fromkeys(config.branches, " (branch)")
    return Table(
        [
            {
                "exit point": f"{point['layer']}{marks.get(point['layer'], '')}",
                "exits": f"{point['leaving']:.1%}",
                "probe agrees": f"{point['agreement']:.1%}",
                "probe size": _size(point["probe_bytes"]),
                "probe cost, layers of one token": f"{point['probe_cost']:.2f}",
            }
            for point in details["exit_points"]
        ]
    )


def _size(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"


def _last_token(config: ArtifactConfig) -> list[Block]:
    """The heads of a pooled policy for requests that it cannot see as a whole."""
    if config.last_token is None:
        return [not_seen_whole(config)]
    return [not_seen_whole(config), Table(level_facts(config.parts("")[f":{LAST_TOKEN}"]))]


def _questions(config: ArtifactConfig, details: Mapping[str, Any]) -> list[Block]:
    """The questions of a mixture; nothing if there is only one."""
    rows = details.get("questions") or []
    if not rows:
        return []
    table = []
    for row in rows:
        bound = "-" if row["bound"] is None else f"{row['bound']:.2%}"
        table.append(
            {
                "question": row["question"].splitlines()[0][:60]
                + " *" * (not row.get("known", True)),
                "held out": str(row["prompts"]),
                "risk": f"{row['risk']:.2%}{' !' * (row['risk'] > config.epsilon)}",
                **({"upper bound": bound} if config.by_question else {}),
                "layers saved": f"{row['layers_saved']:.1%}",
            }
        )
    text = (
        "The bound holds for this mixture of questions. !: a risk above "
        f"{config.epsilon:g} for this question alone."
    )
    if config.by_question:
        text = (
            "The bound holds for each question separately. Questions without one have too few rows "
            "or too high a risk, and run all layers, like questions that are not listed."
        )
    if not all(row.get("known", True) for row in rows):
        text += " *: cannot be recognised by the end of its prompts."
    return [Table(table, text_columns=1), text]


def _not_covered(config: ArtifactConfig, details: Mapping[str, Any]) -> list[str]:
    """Labels that the bound does not cover, and choices that never exit."""
    said = []
    if unnamed := details.get("never_named"):
        said.append(
            f"No request of the calibration named {', '.join(unnamed)}. The policy serves requests "
            "that do, but the bound does not cover them: remove these labels from --label-pool, or "
            "serve with a shadow_rate."
        )
    undecided = [
        repr(choice.text)
        for choice in config.choices
        if choice.token_ids[0] not in choice.first_tokens
    ]
    if undecided:
        said.append(
            f"The first token rarely decides {', '.join(undecided)}: it also begins another choice "
            "or ends inside a character. Requests with these answers run all layers."
        )
    return said


def _learning_curve(config: ArtifactConfig, details: Mapping[str, Any]) -> list[str]:
    """The learning curve, in words."""
    curve: Sequence[Mapping[str, Any]] = details.get("learning_curve") or ()
    if not curve:
        return []
    prompts = ", ".join(str(point["prompts"]) for point in curve)
    saved = ", ".join(f"{point['layers_saved']:.0%}" for point in curve)
    gain = 100 * (curve[-1]["layers_saved"] - curve[-2]["layers_saved"])
    advice = "more prompts may save more, and need no labels"
    if gain < WORTH_MORE_PROMPTS:
        advice = "more prompts will hardly save more"
    by_heads = " by their heads alone" if config.student or config.branches else ""
    return [
        f"Fitted on {prompts} prompts, the exit points save{by_heads} {saved} of the layers of "
        f"prompts that they were not fitted on: {advice}.{_next_doubling(curve, details)}"
    ]


def _next_doubling(curve: Sequence[Mapping[str, Any]], details: Mapping[str, Any]) -> str:
    """What twice as many prompts bring and take, by the line through the curve."""
    if len(curve) < FEWEST_FOR_A_LINE:
        return ""
    doublings = [math.log2(point["prompts"]) for point in curve]
    saved = [100 * point["layers_saved"] for point in curve]
    slope = statistics.linear_regression(doublings, saved).slope
    seconds = details.get("seconds", {}).get("calibration")
    more = f", at most {math.ceil(seconds / 60)} min more to calibrate" if seconds else ""
    return (
        f" {2 * details['prompts']} prompts instead of {details['prompts']}: about "
        f"{slope:+.1f} points{more}."
    )


def expected_savings(config: ArtifactConfig) -> str:
    """The layers that the policy should save within its bound, and within the next looser one."""
    level = config.levels[config.level_of(None)]
    if not level.layers_saved:
        return "Nothing is saved within this bound: all requests will run at full depth."
    text = (
        f"{'Requests' if config.max_tokens == 1 else 'Tokens'} will run "
        f"{config.layers * (1 - level.layers_saved):.1f} of {config.layers} layers on average, "
        f"{level.layers_saved:.0%} fewer, with {at_most(config, level.epsilon)} (confidence "
        f"{1 - config.delta:.0%})."
    )
    looser = [other for other in config.levels if other.epsilon > level.epsilon]
    if looser:
        text += (
            f" At epsilon {looser[0].epsilon:g} they would run {looser[0].layers_saved:.0%} fewer."
        )
    return text
