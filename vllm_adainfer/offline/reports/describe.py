"""Artifacts and evaluation reports as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.promise import after_which_text, each_for_itself, wrong_in_words
from vllm_adainfer.offline.reports.shares import spelled
from vllm_adainfer.offline.tables import aligned, text_table


def describe(config: ArtifactConfig, details: Mapping[str, Any]) -> str:
    """What an artifact is for, what it promises, and what the next looser bound would save.

    `details` is its ``calibration.json``.
    """
    parts = [
        _facts(config, details),
        _exit_points(details),
        f"{_levels(config)}\n\n{each_for_itself(config)}",
        *_questions(config, details),
        *_never_named(details),
        *_choices(config),
        *after_which_text(config),
        in_words(config),
    ]
    return "\n\n".join(parts)


def _facts(config: ArtifactConfig, details: Mapping[str, Any]) -> str:
    generated = config.max_tokens > 1
    if config.label_pool:
        names = ", ".join(label.name for label in config.labels)
        scored = f"the labels that a request names, two or more of {names}"
    elif config.choices:
        scored = f"choices: {', '.join(repr(choice.text) for choice in config.choices)}"
    elif config.candidates == "labels":
        scored = ", ".join(f"{label.name} ({label.token_id})" for label in config.labels)
    else:
        scored = "the commonest tokens"
        if config.candidates == "full":
            scored = "the whole vocabulary"
    rows = "{} tokens of {} prompts" if generated else "{} prompts"
    risk = {
        "disagreement": "disagreement",
        "accuracy": "the accuracy lost",
        "probability": "wrong answers",
    }[config.risk]
    wrong = []
    if config.risk == "probability":
        wrong = [("wrong", wrong_in_words(config)), ("label mass", _label_mass(config))]
    return aligned(
        [
            (
                "model",
                f"{config.base_model} ({config.architecture}, {config.layers} layers, weights "
                f"{config.weights_fingerprint})",
            ),
            *_adapter(config),
            ("probe", f"{config.probe} on {scored}"),
            ("classifier", f"{config.classifier} on {', '.join(config.features)}"),
            (
                "calibrated",
                f"on {rows.format(details['rows'], details.get('prompts'))}, "
                f"{details['rows_held_out']} of them held out for the bound; seed "
                f"{details['seed']}",
            ),
            (
                "majority",
                f"always giving the commonest answer agrees with {details['majority_share']:.1%}",
            ),
            (
                "bound",
                f"epsilon {config.epsilon:g} at delta {config.delta:g} on {risk} "
                f"{'per token ' if generated else ''}({config.bound})",
            ),
            *wrong,
        ]
    )


def _adapter(config: ArtifactConfig) -> list[tuple[str, str]]:
    if config.adapter is None:
        return []
    return [("adapter", f"{config.adapter.name} (LoRA, fingerprint {config.adapter.fingerprint})")]


def _label_mass(config: ArtifactConfig) -> str:
    if config.label_mass:
        return "certified: requests that read probabilities in the whole vocabulary may exit, too"
    return "not certified: requests that read probabilities in the whole vocabulary run all layers"


def _exit_points(details: Mapping[str, Any]) -> str:
    return text_table(
        ["exit point", "leaving", "probe agrees", "probe size", "probe cost, layers of one token"],
        [
            [
                str(point["layer"]),
                f"{point['leaving']:.1%}",
                f"{point['agreement']:.1%}",
                _size(point["probe_bytes"]),
                f"{point['probe_cost']:.2f}",
            ]
            for point in details["exit_points"]
        ],
    )


def _levels(config: ArtifactConfig) -> str:
    """The epsilon table, on the held-out rows."""
    lost = {"disagreement": [], "accuracy": ["accuracy lost"], "probability": ["wrong"]}[
        config.risk
    ]
    return text_table(
        ["epsilon", "disagreement, held out", *lost, "upper bound", "layers saved"],
        [
            [
                f"{level.epsilon:.3f}",
                f"{level.disagreement:.2%}",
                *(f"{level.risk:.2%}" for _ in lost),
                f"{level.bound:.2%}",
                f"{level.layers_saved:.1%}",
            ]
            for level in config.levels
        ],
    )


def _questions(config: ArtifactConfig, details: Mapping[str, Any]) -> list[str]:
    """The questions of a mixture; nothing if there is one alone."""
    rows = details.get("questions") or []
    if not rows:
        return []
    table = text_table(
        ["question", "held out", "risk", *["upper bound"] * config.by_question, "layers saved"],
        [
            [
                row["question"].splitlines()[0][:60] + " *" * (not row.get("known", True)),
                str(row["prompts"]),
                f"{row['risk']:.2%}{' !' if row['risk'] > config.epsilon else ''}",
                *[_own_bound(row)] * config.by_question,
                f"{row['layers_saved']:.1%}",
            ]
            for row in rows
        ],
        1,
    )
    if config.by_question:
        text = (
            "Each question has the bound on its own. Those without one have too few rows, or risk "
            "too much, and run all layers, as questions do that are not here."
        )
    else:
        text = (
            f"The bound is about this mixture of questions. !: a risk above {config.epsilon:g}, "
            "more than its share."
        )
    if not all(row.get("known", True) for row in rows):
        text += " *: cannot be recognised by the end of its prompts."
    return [f"{table}\n\n{text}"]


def _own_bound(row: Mapping[str, Any]) -> str:
    return "-" if row["bound"] is None else f"{row['bound']:.2%}"


def _never_named(details: Mapping[str, Any]) -> list[str]:
    """A warning of labels in the pool that calibration knows nothing about."""
    names = details.get("never_named") or []
    if not names:
        return []
    return [
        f"No request of the calibration named {', '.join(names)}. Requests that do are served, but "
        "the bound is not about them: leave these labels out of --label-pool, or serve with a "
        "shadow_rate."
    ]


def _choices(config: ArtifactConfig) -> list[str]:
    """Which choices the first token decides, if not all."""
    undecided = [
        repr(choice.text)
        for choice in config.choices
        if choice.token_ids[0] not in choice.first_tokens
    ]
    if not undecided:
        return []
    return [
        f"The first token mostly does not decide {', '.join(undecided)}: it begins another choice, "
        "too, or with a part of a letter. Requests that answer so run all layers."
    ]


def in_words(config: ArtifactConfig) -> str:
    """How many layers will be saved within which bound, and how many within a looser one."""
    level = config.levels[config.level_of(None)]
    if not level.layers_saved:
        return "Nothing is saved within this bound: serving will run at full depth."
    most = f"{100 * level.epsilon:g}"
    if config.risk == "accuracy":
        what = f"lose at most {most} points of accuracy"
    elif config.risk == "probability":
        what = f"give at most {most} % wrong answers: {wrong_in_words(config)}"
    else:
        unit = "tokens, each after the same text" if config.max_tokens > 1 else "answers"
        what = f"change at most {most} % of the {unit}"
    run = config.layers * (1 - level.layers_saved)
    text = (
        f"{'Tokens' if config.max_tokens > 1 else 'Requests'} will run {run:.1f} of "
        f"{config.layers} layers on average, "
        f"{level.layers_saved:.0%} fewer, and {what} "
        f"(confidence {1 - config.delta:.0%})."
    )
    looser = [other for other in config.levels if other.epsilon > level.epsilon]
    if looser:
        text += (
            f" At epsilon {looser[0].epsilon:g} they would run {looser[0].layers_saved:.0%} fewer."
        )
    return text


def _size(count: int) -> str:
    return f"{count / 1024:.1f} KiB" if count < 1 << 20 else f"{count / (1 << 20):.1f} MiB"


def describe_report(report: Mapping[str, Any]) -> str:
    """Both engines of an evaluation report, and every certified bound."""
    ours, never = report["adainfer"], report["never_exit"]
    engines = [
        [
            name,
            f"{engine['requests_per_second']:.1f}",
            f"{engine['tokens_per_second']:.0f}",
            "-" if engine["accuracy"] is None else _share(engine, "accuracy"),
            f"{layers_run:.1f}",
        ]
        for name, engine, layers_run in (
            ("stock vLLM", report["stock"], report["layers_total"]),
            ("vllm-adainfer", ours, ours["layers_run_mean"]),
        )
    ]
    levels = [
        [
            f"{level['epsilon']:.1%}",
            f"{level['speedup']:.2f}x",
            f"{level['layers_saved']:.1%}",
            _share(level, "disagreement"),
            _share(level, "disagreement_with_stock"),
            f"{level['efficiency']:.2f}",
            level.get("verdict", "-").split()[0],
        ]
        for level in report["levels"]
    ]
    differs = _share(never, "disagreement_with_stock")
    levels.append(["never exit", f"{never['speedup']:.2f}x", "0.0%", "0.0%", differs, "-", "-"])
    left = ", ".join(
        f"{layer}: {spelled(share, ours['exit_histogram_95'][layer], 0)}"
        for layer, share in ours["exit_histogram"].items()
    )
    parts = [
        f"{report['n']} prompts of {report['prompt_tokens_mean']:.0f} tokens on average, "
        f"{report['model']} ({report['layers_total']} layers)",
        text_table(["engine", "requests/s", "tokens/s", "accuracy", "layers run"], engines, 1),
        text_table(
            [
                "bound",
                "speedup",
                "layers saved",
                "disagreement",
                "differs from stock",
                "efficiency",
                "measured",
            ],
            levels,
        ),
        "Never exit: what the segments cost, and how often their rounding changes an answer.",
        f"Requests by layers run: {left}",
        "In brackets: 95 % intervals of the shares, for prompts like these. What was measured is "
        "within the bound, compatible with it (the interval reaches below) or above it.",
    ]
    if "probabilities" in report:
        parts.append(_probabilities(report))
    return "\n\n".join(parts) + "\n"


def _share(row: Mapping[str, Any], name: str) -> str:
    return spelled(row[name], row[f"{name}_95"])


def _probabilities(report: Mapping[str, Any]) -> str:
    """How good the probabilities are, and how far exits and rounding move them."""
    found, tolerance = report["probabilities"], f"{report['tolerance']:g}"
    named = [
        ("stock vLLM", found["stock"]),
        ("never exit", found["never_exit"]),
        *((f"bound {level['epsilon']:.1%}", level) for level in found["levels"]),
    ]
    measures = "ece", "brier", "label_mass", "move_mean", "move_p95", "move_max"
    table = text_table(
        [
            "probabilities",
            "ECE",
            "Brier",
            "label mass",
            "mean move",
            "95th percentile",
            "largest",
            "best label differs",
            f"beyond {tolerance}",
        ],
        [
            [
                name,
                *("-" if row[measure] is None else f"{row[measure]:.3f}" for measure in measures),
                _share(row, "label_differs"),
                _share(row, "wrong"),
            ]
            for name, row in named
        ],
        1,
    )
    return (
        f"{table}\n\n"
        "Moves are from never exit, of each prompt's probability that moves most. Those of stock "
        f"vLLM are rounding. Beyond {tolerance}: answers that change or move by more, the share "
        "that the bound is about."
    )
