"""The page of an evaluation, and that of an artifact alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.words import probes_in_words
from vllm_adainfer.offline.facts import artifact as about
from vllm_adainfer.offline.reports import figures
from vllm_adainfer.offline.reports.evaluation_facts import evaluation_facts, level_facts
from vllm_adainfer.offline.reports.page import Section, html_page
from vllm_adainfer.offline.reports.shares import share_in
from vllm_adainfer.offline.reports.speedup import Speedup


def evaluation_page(
    report: Mapping[str, Any],
    config: ArtifactConfig,
    details: Mapping[str, Any],
    changed: Sequence[Mapping[str, Any]] | None,
    notes: Sequence[str] = (),
) -> str:
    """The page of an evaluation, from its report and the artifact's ``calibration.json``."""
    index, stock = _default(config), report["stock"]
    levels = []
    for place, level in enumerate(report["levels"]):
        _, *facts = level_facts(level).items()
        numbers = dict(facts)
        if stock["accuracy"] is not None:
            both = f"{share_in(stock, 'accuracy')} / {share_in(level, 'accuracy')}"
            numbers["accuracy, stock / ours"] = both
        if "queries" in report:
            queries = report["queries"]["levels"][place]
            numbers["queries that lose a document"] = share_in(queries, "wrong")
        levels.append((_name(level["epsilon"]), numbers))
    histograms = [level["exit_histogram"] for level in report["levels"]]
    panels = [
        figures.trade_off(report, index),
        figures.exits(histograms, report["layers_total"], index),
        figures.risk_curve(config, details, index),
        figures.agreement(config, details),
        figures.reliability(report, index),
        *figures.gates(report, index),
    ]
    never = Speedup.read(report["never_exit"], "speedup")
    return html_page(
        title=f"{report['model']} on {report['data']}",
        subtitle=(
            f"{report['n']} prompts of {report['prompt_tokens_mean']:.0f} tokens, artifact "
            f"{report['artifact']}: stock vLLM and vllm-adainfer, interleaved. Without exits, "
            f"vllm-adainfer runs at {never.text} the speed of stock vLLM."
        ),
        sections=[
            ("What was measured", evaluation_facts(report), ()),
            _provenance(report["provenance"]),
        ],
        levels=levels,
        opens_with=index,
        panels=[panel for panel in panels if panel is not None],
        changed=changed,
        notes=notes,
    )


def artifact_page(config: ArtifactConfig, details: Mapping[str, Any]) -> str:
    """The page of an artifact: what it promises, and what calibration measured."""
    index = _default(config)
    exits = {str(point["layer"]): point["leaving"] for point in details["exit_points"]}
    exits[str(config.layers)] = max(0.0, 1 - sum(exits.values()))
    return html_page(
        title=f"Policy for {config.base_model}",
        subtitle=(
            f"{config.architecture}, {probes_in_words(config)}; calibrated on {details['rows']} "
            f"rows. The figure of exits is for the bound of {_name(config.epsilon)}."
        ),
        sections=[
            ("What it promises", about.artifact_facts(config, details), ()),
            _provenance(details["provenance"]),
        ],
        levels=[(facts["epsilon"], facts) for facts in about.level_facts(config)],
        opens_with=index,
        panels=[
            figures.exits([exits] * len(config.levels), config.layers, index),
            figures.risk_curve(config, details, index),
            figures.agreement(config, details),
        ],
    )


def _provenance(provenance: Mapping[str, Any]) -> Section:
    """The origin of results, see `offline.provenance`."""

    def spelled(value: Any) -> str:
        if isinstance(value, Mapping):
            return ", ".join(f"{name} {one}" for name, one in value.items())
        return " ".join(value) if isinstance(value, list | tuple) else str(value)

    return "Provenance", [{name: spelled(value) for name, value in provenance.items()}], ()


def _default(config: ArtifactConfig) -> int:
    """Index of the level that is served by default."""
    return [level.epsilon for level in config.levels].index(config.epsilon)


def _name(epsilon: float) -> str:
    return f"{100 * epsilon:g} %"
