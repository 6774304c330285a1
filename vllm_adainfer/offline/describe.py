"""Artifacts and reports as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_adainfer.policy.artifact import ArtifactConfig


def describe(config: ArtifactConfig, details: Mapping[str, Any]) -> str:
    """What an artifact is for, what it promises, and what another bound would change.

    `details` is its ``calibration.json``.
    """
    generated = config.max_tokens > 1
    scored = ", ".join(f"{label.name} ({label.token_id})" for label in config.labels)
    if config.candidates != "labels":
        scored = {"full": "the whole vocabulary", "shortlist": "the commonest tokens"}[
            config.candidates
        ]
    rows = "{} tokens of {} prompts" if generated else "{} prompts"
    accuracy = config.risk == "accuracy"
    lines = [
        f"model        {config.base_model} ({config.architecture}, {config.layers} layers, "
        f"weights {config.weights_fingerprint})",
        f"probe        {config.probe} on {scored}",
        f"classifier   {config.classifier} on {', '.join(config.features)}",
        f"calibrated   on {rows.format(details['rows'], details.get('prompts'))}, "
        f"{details['rows_held_out']} of them held out for the bound; seed {details['seed']}",
        f"majority     the commonest answer alone agrees with {details['majority_share']:.1%}",
        f"bound        epsilon {config.epsilon:g} at delta {config.delta:g} on "
        f"{'the accuracy lost' if accuracy else 'disagreement'} "
        f"{'per token ' if generated else ''}({config.bound})",
        "",
        "exit point  leaving  probe agrees  probe size  probe cost (layers of one token)",
    ]
    lines += [
        f"{point['layer']:10}  {point['leaving']:7.1%}  {point['agreement']:12.1%}  "
        f"{_size(point['probe_bytes']):>10}  {point['probe_cost']:10.2f}"
        for point in details["exit_points"]
    ]
    header = "epsilon  disagreement  upper bound  layers saved   (held-out rows)"
    lines += [
        "",
        header.replace("upper bound", "accuracy lost  upper bound") if accuracy else header,
    ]
    for level in config.levels:
        lost = f"{level.risk:13.2%}  " if accuracy else ""
        lines.append(
            f"{level.epsilon:7.3f}  {level.disagreement:12.2%}  {lost}{level.bound:11.2%}  "
            f"{level.layers_saved:12.1%}"
        )
    return "\n".join([*lines, "", in_words(config)])


def in_words(config: ArtifactConfig) -> str:
    """How many layers will be saved, at what bound, and what a looser one would change."""
    level = config.levels[config.level_of(None)]
    if not level.layers_saved:
        return "Nothing is saved within this bound: serving will run at full depth."
    what = (
        "lose at most {} points of accuracy"
        if config.risk == "accuracy"
        else "change at most {} % of the "
        + ("tokens, each after the same text" if config.max_tokens > 1 else "answers")
    )
    run = config.layers * (1 - level.layers_saved)
    text = (
        f"{'Tokens' if config.max_tokens > 1 else 'Requests'} will run {run:.1f} of "
        f"{config.layers} layers on average, "
        f"{level.layers_saved:.0%} fewer, and {what.format(f'{100 * level.epsilon:g}')} "
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


def table(report: Mapping[str, Any]) -> str:
    """Both engines of an evaluation report, and every certified bound."""

    def percent(share: float | None) -> str:
        return "-" if share is None else f"{share:.1%}"

    stock, ours = report["stock"], report["adainfer"]
    rows = [
        f"{report['n']} prompts of {report['prompt_tokens_mean']:.0f} tokens on average, "
        f"{report['model']} ({report['layers_total']} layers)",
        "",
        "                requests/s  tokens/s  accuracy  layers run",
        f"stock vLLM      {stock['requests_per_second']:10.1f}  {stock['tokens_per_second']:8.0f}  "
        f"{percent(stock['accuracy']):>8}  {report['layers_total']:10.1f}",
        f"vllm-adainfer   {ours['requests_per_second']:10.1f}  {ours['tokens_per_second']:8.0f}  "
        f"{percent(ours['accuracy']):>8}  {ours['layers_run_mean']:10.1f}",
        "",
        "bound   speedup  layers saved  disagreement  differs from stock  efficiency",
    ]
    rows += [
        f"{level['epsilon']:5.1%}  {level['speedup']:7.2f}x  {level['layers_saved']:12.1%}  "
        f"{level['disagreement']:12.1%}  {level['disagreement_with_stock']:18.1%}  "
        f"{level['efficiency']:10.2f}"
        for level in report["levels"]
    ]
    never = report["never_exit"]
    rows.append(
        f"never  {never['speedup']:7.2f}x  {0:12.1%}  {0:12.1%}  "
        f"{never['disagreement_with_stock']:18.1%}      (cost and rounding of the segments)"
    )
    left = ", ".join(f"{layer}: {share:.0%}" for layer, share in ours["exit_histogram"].items())
    return "\n".join([*rows, "", f"requests by layers run: {left}", ""])
