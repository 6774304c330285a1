"""The evaluation report: what was measured, as JSON and in one line."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data import Example
from vllm_adainfer.offline.evaluation.probability_rows import asked_row, probability_rows
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.evaluation.sequences import Tokens, compare
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.policy.artifact import ArtifactConfig


def build_report(
    artifact: str,
    data: Path,
    config: ArtifactConfig,
    examples: Sequence[Example],
    accuracy_of: Callable[[Sequence[Tokens]], float | None],
    rounds: Sequence[tuple[Run, dict[float, Run]]],
) -> dict[str, Any]:
    """The JSON report.

    Args:
        artifact: directory or hub id; the report names its last part.
        data: file of the prompts; the report names it without its directory.
        config: of the artifact.
        examples: the prompts.
        accuracy_of: the share of right answers, or None without labels.
        rounds: for each round, stock's run and ours by epsilon, which include `NEVER_EXIT`.

    """
    stock_runs = [baseline for baseline, _ in rounds]
    never = [by_epsilon[NEVER_EXIT] for _, by_epsilon in rounds]
    prompt_tokens = sum(len(example.token_ids) for example in examples)

    def engine(runs: Sequence[Run]) -> dict[str, Any]:
        seconds = statistics.median(run.seconds for run in runs)
        return {
            "requests_per_second": len(examples) / seconds,
            "tokens_per_second": (prompt_tokens + sum(map(len, runs[0].texts))) / seconds,
            "accuracy": accuracy_of(runs[0].texts),
            "runs": [{"seconds": run.seconds} for run in runs],
        }

    def speedup_of(runs: Sequence[Run]) -> float:
        return statistics.median(
            baseline.seconds / run.seconds for baseline, run in zip(stock_runs, runs, strict=True)
        )

    def disagreement_of(runs: Sequence[Run], references: Sequence[Run]) -> float:
        return statistics.median(
            compare(run.texts, reference.texts).disagreement
            for run, reference in zip(runs, references, strict=True)
        )

    def level(epsilon: float) -> dict[str, Any]:
        runs = [by_epsilon[epsilon] for _, by_epsilon in rounds]
        speedup = speedup_of(runs)
        saved = 1 - sum(run.layers_run for run in runs) / sum(run.layers_possible for run in runs)
        histogram: Counter[int] = sum((Counter(run.exit_histogram) for run in runs), Counter())
        return {
            "epsilon": epsilon,
            "speedup": speedup,
            "layers_saved": saved,
            # Compared with full depth in the same segments, which the bound is about, and with
            # stock vLLM, whose unsegmented code also rounds differently.
            "disagreement": disagreement_of(runs, never),
            "disagreement_with_stock": disagreement_of(runs, stock_runs),
            "efficiency": speedup * (1 - saved),
            "adainfer": {
                **engine(runs),
                "layers_run_mean": config.layers * (1 - saved),
                "exit_histogram": {
                    str(layer): count / histogram.total()
                    for layer, count in sorted(histogram.items())
                },
            },
        }

    promise: dict[str, Any] = {}
    if config.tolerance is not None:
        promise = {
            "risk": config.risk,
            "tolerance": config.tolerance,
            "label_mass": config.label_mass,
            "probabilities": probability_rows(config, config.tolerance, examples, rounds),
        }
    levels = [level(row.epsilon) for row in config.levels]
    [asked] = [row for row in levels if row["epsilon"] == config.epsilon]
    return {
        "model": config.base_model,
        "artifact": Path(artifact).name,
        "data": data.name,
        "n": len(examples),
        "prompt_tokens_mean": prompt_tokens / len(examples),
        "delta": config.delta,
        "layers_total": config.layers,
        "stock": engine(stock_runs),
        **asked,
        # Full depth in segments: the plugin's cost, and how often rounding changes an answer.
        "never_exit": {
            "speedup": speedup_of(never),
            "disagreement_with_stock": disagreement_of(never, stock_runs),
        },
        "levels": [
            {key: row[key] for key in row if key != "adainfer"}
            | {key: row["adainfer"][key] for key in ("accuracy", "exit_histogram")}
            for row in levels
        ],
        **promise,
        "provenance": provenance(),
    }


def summary_line(report: Mapping[str, Any]) -> str:
    """The report in one line, for a terminal."""
    beyond = ""
    if "probabilities" in report:
        row = asked_row(report)
        beyond = f", {row['wrong']:.1%} beyond the tolerance of {report['tolerance']:g}"
    return (
        f"speedup {report['speedup']:.2f}x, layers saved {report['layers_saved']:.0%}, "
        f"disagreement {report['disagreement']:.1%}{beyond} (bound {report['epsilon']:.1%})"
    ).replace("%", " %")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it.

    Raises:
        AdaInferError: the file cannot be written.

    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(draft, 0o644)
            os.replace(draft, path)
        except BaseException:
            os.unlink(draft)
            raise
    except OSError as error:
        raise AdaInferError(f"cannot write {path}: {error}") from None
