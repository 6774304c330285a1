"""Artifacts and reports as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_adainfer.artifact import ArtifactConfig


def describe(config: ArtifactConfig) -> str:
    """What an artifact is for and what it promises."""
    labels = ", ".join(f"{label.name} ({label.token_id})" for label in config.labels)
    lines = [
        f"model        {config.base_model} ({config.architecture}, {config.layers} layers, "
        f"weights {config.weights_fingerprint})",
        f"exit points  {', '.join(map(str, config.exit_points))}",
        f"probe        {config.probe} on {labels or 'the whole vocabulary'}",
        f"classifier   {config.classifier} on {', '.join(config.features)}",
        f"bound        epsilon {config.epsilon:g} at delta {config.delta:g}",
        "",
        "epsilon  disagreement  upper bound  layers saved   (held-out rows)",
    ]
    lines += [
        f"{level.epsilon:7.3f}  {level.disagreement:12.2%}  {level.bound:11.2%}  "
        f"{level.layers_saved:12.1%}"
        for level in config.levels
    ]
    if not any(level.layers_saved for level in config.levels):
        lines.append("nothing is saved within these bounds: serving will run at full depth")
    return "\n".join(lines)


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
