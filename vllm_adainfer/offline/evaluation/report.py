"""The evaluation report: what was measured, as JSON and in one line."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.bound import FloatArray
from vllm_adainfer.offline.calibration.data import Example
from vllm_adainfer.offline.calibration.prompts import groups_of
from vllm_adainfer.offline.evaluation.probability_rows import asked_row, probability_rows
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Run
from vllm_adainfer.offline.evaluation.sequences import Tokens, differing
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.shares import (
    Share,
    clopper_pearson,
    of_rounds,
    spelled,
    verdict,
)

# By what the bound is about, the share of the report that it bounds.
BOUNDED = {"disagreement": "disagreement", "probability": "wrong", "accuracy": "accuracy_lost"}


def build_report(
    artifact: str,
    data: Path,
    config: ArtifactConfig,
    examples: Sequence[Example],
    right_in: Callable[[Sequence[Tokens]], Sequence[bool] | None],
    rounds: Sequence[tuple[Run, dict[float, Run]]],
) -> dict[str, Any]:
    """The JSON report. A share has its 95 % interval under the same name with ``_95``.

    Args:
        artifact: directory or hub id; the report names its last part.
        data: file of the prompts; the report names it without its directory.
        config: of the artifact.
        examples: the prompts.
        right_in: which answers are right, or None without labels.
        rounds: for each round, stock's run and ours by epsilon, which include `NEVER_EXIT`.

    """
    stock_runs = [baseline for baseline, _ in rounds]
    never = [by_epsilon[NEVER_EXIT] for _, by_epsilon in rounds]
    prompt_tokens = sum(len(example.token_ids) for example in examples)
    groups, each = groups_of(examples), np.ones(len(examples))
    draws = int(groups.max()) + 1

    def right(run: Run) -> FloatArray | None:
        found = right_in(run.texts)
        return None if found is None else np.array(found, np.float64)

    def engine(runs: Sequence[Run]) -> dict[str, Any]:
        seconds = statistics.median(run.seconds for run in runs)
        answers = right(runs[0])
        accuracy = None if answers is None else Share(answers, each, groups)
        return {
            "requests_per_second": len(examples) / seconds,
            "tokens_per_second": (prompt_tokens + sum(map(len, runs[0].texts))) / seconds,
            "accuracy": accuracy and accuracy.value,
            "accuracy_95": accuracy and accuracy.interval,
            "runs": [{"seconds": run.seconds} for run in runs],
        }

    def speedup_of(runs: Sequence[Run]) -> float:
        return statistics.median(
            baseline.seconds / run.seconds for baseline, run in zip(stock_runs, runs, strict=True)
        )

    def disagreement_of(
        name: str, runs: Sequence[Run], references: Sequence[Run]
    ) -> dict[str, Any]:
        value, interval = of_rounds(
            [
                differing(run.texts, reference.texts, groups)
                for run, reference in zip(runs, references, strict=True)
            ]
        )
        return {name: value, f"{name}_95": interval}

    def accuracy_lost(run: Run) -> dict[str, Any]:
        early, full = right(run), right(never[0])
        if config.risk != "accuracy" or early is None or full is None:
            return {}
        lost = Share(full - early, each, groups)
        return {"accuracy_lost": lost.value, "accuracy_lost_95": lost.signed_interval}

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
            **disagreement_of("disagreement", runs, never),
            **disagreement_of("disagreement_with_stock", runs, stock_runs),
            **accuracy_lost(runs[0]),
            "efficiency": speedup * (1 - saved),
            "adainfer": {
                **engine(runs),
                "layers_run_mean": config.layers * (1 - saved),
                "exit_histogram": {
                    str(layer): count / histogram.total()
                    for layer, count in sorted(histogram.items())
                },
                # Of as many rows as there are groups: which rows left where is not known.
                "exit_histogram_95": {
                    str(layer): clopper_pearson(count / histogram.total() * draws, draws)
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
            "probabilities": probability_rows(config, config.tolerance, examples, groups, rounds),
        }
    levels = [level(row.epsilon) for row in config.levels]
    wrong = promise["probabilities"]["levels"] if promise else levels
    for row, bounded in zip(levels, wrong, strict=True):
        name = BOUNDED[config.risk]
        if name in bounded:
            row["verdict"] = verdict(bounded[name], bounded[f"{name}_95"], row["epsilon"])
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
            **disagreement_of("disagreement_with_stock", never, stock_runs),
        },
        "levels": [
            {key: row[key] for key in row if key != "adainfer"}
            | {
                key: row["adainfer"][key]
                for key in ("accuracy", "accuracy_95", "exit_histogram", "exit_histogram_95")
            }
            for row in levels
        ],
        **promise,
        "provenance": provenance(),
    }


def summary_line(report: Mapping[str, Any]) -> str:
    """The report in one line, for a terminal."""
    shares = [f"disagreement {_told(report, 'disagreement')}"]
    if "probabilities" in report:
        wrong = _told(asked_row(report), "wrong")
        shares.append(f"{wrong} beyond the tolerance of {report['tolerance']:g}")
    if "accuracy_lost" in report:
        shares.append(f"accuracy lost {_told(report, 'accuracy_lost')}")
    said = report.get("verdict", f"bound {report['epsilon']:.1%} on the accuracy lost")
    return (
        f"speedup {report['speedup']:.2f}x, layers saved {report['layers_saved']:.0%}, "
        f"{', '.join(shares)}, {said}"
    ).replace("%", " %")


def _told(row: Mapping[str, Any], name: str) -> str:
    """A share and its interval, such as ``2.3% (95%: 0.9 to 4.9%)``."""
    return spelled(row[name], row[f"{name}_95"]).replace("(", "(95%: ")


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
