"""The page of an evaluation, and that of an artifact alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.reports import figures
from vllm_adainfer.offline.reports.page import Changed, Page
from vllm_adainfer.offline.reports.shares import spelled


def evaluation_page(
    report: Mapping[str, Any],
    config: ArtifactConfig,
    details: Mapping[str, Any],
    changed: Sequence[Changed] | None,
    notes: Sequence[str] = (),
) -> Page:
    """What `evaluate` has measured.

    Args:
        report: of `evaluate`.
        config: of the artifact.
        details: its ``calibration.json``.
        changed: prompts whose answers differ; None leaves them out.
        notes: sentences below them.

    """
    levels, index = report["levels"], _index(config)
    panels = [
        figures.trade_off(report, index),
        figures.exits([level["exit_histogram"] for level in levels], report["layers_total"], index),
        figures.risk_curve(config, details, index),
        figures.agreement(config, details),
        figures.reliability(report, index),
    ]
    full = report["stock"]["accuracy"]
    return Page(
        title=f"{report['model']} on {report['data']}",
        subtitle=(
            f"{report['n']} prompts of {report['prompt_tokens_mean']:.0f} tokens, artifact "
            f"{report['artifact']}: stock vLLM and vllm-adainfer, interleaved. Never exiting runs "
            f"at {report['never_exit']['speedup']:.2f}x of stock."
        ),
        levels=_names(config),
        opens_with=index,
        numbers=[
            {
                "speed-up": f"{level['speedup']:.2f}x",
                "layers saved": f"{level['layers_saved']:.0%}",
                "answers that differ (95 %)": _share(level, "disagreement"),
                **(
                    {}
                    if full is None
                    else {
                        "accuracy, stock / ours (95 %)": f"{_share(report['stock'], 'accuracy')} / "
                        f"{_share(level, 'accuracy')}"
                    }
                ),
                **({"what was measured is": level["verdict"]} if "verdict" in level else {}),
            }
            for level in levels
        ],
        panels=[panel for panel in panels if panel is not None],
        changed=changed,
        provenance=report["provenance"],
        notes=notes,
    )


def artifact_page(config: ArtifactConfig, details: Mapping[str, Any]) -> Page:
    """What an artifact promises, by what calibration has seen."""
    index = _index(config)
    leaving = {str(point["layer"]): point["leaving"] for point in details["exit_points"]}
    leaving[str(config.layers)] = max(0.0, 1 - sum(leaving.values()))
    where = figures.exits([leaving] * len(config.levels), config.layers, index)
    return Page(
        title=f"Policy for {config.base_model}",
        subtitle=(
            f"{config.architecture}, {config.layers} layers, {config.probe} probes after layers "
            f"{', '.join(map(str, config.exit_points))}; calibrated on {details['rows']} rows. "
            f"Where requests leave is at the bound of {_name(config.epsilon)}."
        ),
        levels=_names(config),
        opens_with=index,
        numbers=[
            {
                "layers saved, held out": f"{level.layers_saved:.0%}",
                "answers that differ, held out": f"{level.disagreement:.1%}",
                "upper bound": f"{level.bound:.2%}",
            }
            for level in config.levels
        ],
        panels=[
            where,
            figures.risk_curve(config, details, index),
            figures.agreement(config, details),
        ],
        changed=None,
        provenance=details["provenance"],
    )


def _share(row: Mapping[str, Any], name: str) -> str:
    return spelled(row[name], row[f"{name}_95"])


def _index(config: ArtifactConfig) -> int:
    """The level that is served by default."""
    return [level.epsilon for level in config.levels].index(config.epsilon)


def _names(config: ArtifactConfig) -> list[str]:
    return [_name(level.epsilon) for level in config.levels]


def _name(epsilon: float) -> str:
    return f"{100 * epsilon:g} %"
