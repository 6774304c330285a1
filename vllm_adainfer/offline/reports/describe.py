"""Artifacts as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig
from vllm_adainfer.artifact.promise import (
    about_labels,
    after_which_text,
    each_for_itself,
    not_seen_whole,
    right_about,
    student_in_words,
    wrong_in_words,
)
from vllm_adainfer.artifact.served_prompts import served_prompts
from vllm_adainfer.offline.tables import aligned, text_table

WORTH_MORE_PROMPTS = 1.0  # percentage points that the second half of the prompts has brought
RISKS = {
    "disagreement": "disagreement",
    "accuracy": "accuracy lost",
    "probability": "wrong answers",
}


def describe(config: ArtifactConfig, details: Mapping[str, Any]) -> str:
    """What an artifact is for, what it promises, and what the next looser bound would save.

    `details` is its ``calibration.json``.
    """
    parts = [
        _facts(config, details),
        _exit_points(config, details),
        _levels(config),
        *_last_token(config),
        each_for_itself(config),
        *_questions(config, details),
    ]
    if unnamed := details.get("never_named"):
        parts.append(
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
        parts.append(
            f"The first token rarely decides {', '.join(undecided)}: it also begins another choice "
            "or ends inside a character. Requests with these answers run all layers."
        )
    if curve := details.get("learning_curve"):
        parts.append(_learning_curve(curve))
    return "\n\n".join([*parts, *after_which_text(config), expected_savings(config)])


def _facts(config: ArtifactConfig, details: Mapping[str, Any]) -> str:
    generated = config.max_tokens > 1
    if config.label_pool:
        names = ", ".join(label.name for label in config.labels)
        scored = f"the labels that a request names, two or more of {names}"
    elif config.choices:
        scored = f"choices: {', '.join(repr(choice.text) for choice in config.choices)}"
    elif config.score_head is not None:
        names = ", ".join(label.name for label in config.labels)
        scored = f"the {config.score_head} scores of a classifier: {names}"
    elif config.candidates == "labels":
        scored = ", ".join(f"{label.name} ({label.token_id})" for label in config.labels)
    else:
        whole = config.candidates == "full"
        scored = "the whole vocabulary" if whole else "the most frequent tokens"
    rows, held_out = f"{details['rows']} prompts", f"{details['rows_held_out']} of them"
    if queries := details.get("queries_held_out"):
        held_out += f" (of {len(queries)} queries)"
    if generated:
        rows = f"{details['rows']} tokens of {details.get('prompts')} prompts"
    facts = {
        "model": f"{config.base_model} ({config.architecture}, {config.layers} layers, weights "
        f"{config.weights_fingerprint})",
    }
    if options := config.engine_options.in_words:
        facts["served with"] = options
    if config.adapter is not None:
        adapter = config.adapter
        facts["adapter"] = f"{adapter.name} (LoRA, fingerprint {adapter.fingerprint})"
    facts["probe"] = f"{config.probe} on {scored}"
    if config.student is not None:
        facts["student"] = student_in_words(config.student)
    facts |= {
        "classifier": f"{config.classifier} on {', '.join(config.features)}",
        "calibrated": f"on {rows}, {held_out} held out for the bound; seed {details['seed']}",
        "majority baseline": f"{100 * details['majority_share']:.1f} % agreement",
        "bound": f"epsilon {config.epsilon:g} at delta {config.delta:g} on {RISKS[config.risk]} "
        f"{'per token ' if generated else ''}({config.bound})",
    }
    if config.shared:
        facts["prompts"] = f"{served_prompts(config.shared)}; others run all layers"
    if config.risk == "probability":
        facts["wrong"] = wrong_in_words(config)
    if text := right_about(config):
        facts["served"] = text
    elif config.risk == "probability" and config.score_head is None:
        requests = "requests for probabilities in the whole vocabulary"
        facts["label mass"] = (
            f"certified: {requests} may exit, too"
            if config.label_mass
            else f"not certified: {requests} run all layers"
        )
    if phrases := about_labels(config):
        facts["labels"] = "; ".join(phrases)
    return aligned(list(facts.items()))


def _exit_points(config: ArtifactConfig, details: Mapping[str, Any]) -> str:
    return text_table(
        ["exit point", "exits", "probe agrees", "probe size", "probe cost, layers of one token"],
        [
            [
                f"{point['layer']}{' (branch)' * (point['layer'] in config.branches)}",
                f"{point['leaving']:.1%}",
                f"{point['agreement']:.1%}",
                _size(point["probe_bytes"]),
                f"{point['probe_cost']:.2f}",
            ]
            for point in details["exit_points"]
        ],
    )


def _size(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"


def _levels(config: ArtifactConfig) -> str:
    """The epsilon table, on the held-out rows."""
    risk = [] if config.risk == "disagreement" else [RISKS[config.risk]]
    labels = [f"{one.kind} of {one.label}: changed (bound)" for one in config.label_bounds]
    return text_table(
        ["epsilon", "disagreement, held out", *risk, "upper bound", *labels, "layers saved"],
        [
            [
                f"{level.epsilon:.3f}",
                f"{level.disagreement:.2%}",
                *(f"{level.risk:.2%}" for _ in risk),
                f"{level.bound:.2%}",
                *(f"{one.risk:.2%} of {one.rows} ({one.bound:.2%})" for one in level.label_risks),
                f"{level.layers_saved:.1%}",
            ]
            for level in config.levels
        ],
    )


def _last_token(config: ArtifactConfig) -> list[str]:
    """The heads of a pooled policy for requests that it cannot see as a whole."""
    said = not_seen_whole(config)
    if config.last_token is None:
        return [said] if said else []
    return [said, _levels(config.parts("")[f":{LAST_TOKEN}"])]


def _learning_curve(curve: Sequence[Mapping[str, Any]]) -> str:
    """What more prompts would bring."""
    prompts = ", ".join(str(point["prompts"]) for point in curve)
    saved = ", ".join(f"{point['layers_saved']:.0%}" for point in curve)
    gain = 100 * (curve[-1]["layers_saved"] - curve[-2]["layers_saved"])
    advice = "more prompts may save more, and need no labels"
    if gain < WORTH_MORE_PROMPTS:
        advice = "more prompts will hardly save more"
    return (
        f"Fitted on {prompts} prompts, the exit points save {saved} of the layers of prompts that "
        f"they were not fitted on: {advice}."
    )


def _questions(config: ArtifactConfig, details: Mapping[str, Any]) -> list[str]:
    """The questions of a mixture; nothing if there is only one."""
    rows = details.get("questions") or []
    if not rows:
        return []
    cells = []
    for row in rows:
        bound = "-" if row["bound"] is None else f"{row['bound']:.2%}"
        cells.append(
            [
                row["question"].splitlines()[0][:60] + " *" * (not row.get("known", True)),
                str(row["prompts"]),
                f"{row['risk']:.2%}{' !' if row['risk'] > config.epsilon else ''}",
                *[bound] * config.by_question,
                f"{row['layers_saved']:.1%}",
            ]
        )
    own_bound = ["upper bound"] * config.by_question
    table = text_table(["question", "held out", "risk", *own_bound, "layers saved"], cells, 1)
    if config.by_question:
        text = (
            "The bound holds for each question separately. Questions without one have too few rows "
            "or too high a risk, and run all layers, like questions that are not listed."
        )
    else:
        text = (
            "The bound holds for this mixture of questions. !: a risk above "
            f"{config.epsilon:g} for this question alone."
        )
    if not all(row.get("known", True) for row in rows):
        text += " *: cannot be recognised by the end of its prompts."
    return [table, text]


def expected_savings(config: ArtifactConfig) -> str:
    """How many layers the policy should save within its bound, and within the next looser one."""
    level = config.levels[config.level_of(None)]
    if not level.layers_saved:
        return "Nothing is saved within this bound: all requests will run at full depth."
    epsilon = f"{100 * level.epsilon:g}"
    one, many = ("Tokens", "tokens, each after the same text")
    if config.max_tokens == 1:
        one, many = ("Requests", "answers")
    promise = {
        "disagreement": f"change at most {epsilon} % of the {many}",
        "accuracy": f"lose at most {epsilon} points of accuracy",
        "probability": f"give at most {epsilon} % wrong answers",
    }[config.risk]
    if config.top_k is not None:
        promise = f"make at most {epsilon} % of the queries wrong"
    if config.risk == "probability":
        promise += f": {wrong_in_words(config)}"
    text = (
        f"{one} will run {config.layers * (1 - level.layers_saved):.1f} of {config.layers} layers "
        f"on average, {level.layers_saved:.0%} fewer, and {promise} "
        f"(confidence {1 - config.delta:.0%})."
    )
    looser = [other for other in config.levels if other.epsilon > level.epsilon]
    if looser:
        text += (
            f" At epsilon {looser[0].epsilon:g} they would run {looser[0].layers_saved:.0%} fewer."
        )
    return text
