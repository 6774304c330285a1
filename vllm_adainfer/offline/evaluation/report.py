"""The evaluation report: what was measured, as JSON and in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import eq
from pathlib import Path
from typing import Any

import numpy as np

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.files import PUBLIC, replace_file
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.split import groups_of
from vllm_adainfer.offline.evaluation.by_field import probability_rows
from vllm_adainfer.offline.evaluation.by_label import field_rows, label_rows
from vllm_adainfer.offline.evaluation.promised import bounded_rows, default_level, promised_rows
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Rounds, Run, Times
from vllm_adainfer.offline.evaluation.same_pass import Counts, SamePass
from vllm_adainfer.offline.evaluation.sequences import Tokens, differing
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.shares import (
    Share,
    clopper_pearson,
    of_rounds,
    share_in,
    verdict,
)
from vllm_adainfer.offline.reports.speedup import Speedup
from vllm_adainfer.promise.kinds import PROMISES

NOT_COMPARED: Mapping[float, SamePass] = {}
RightIn = Callable[[Sequence[Tokens]], Sequence[bool] | None]


def build_report(
    artifact: str,
    data: Path,
    config: ArtifactConfig,
    examples: Sequence[Example],
    right_in: RightIn,
    rounds: Rounds,
    times: Times | None = None,
    same_pass: Mapping[float, SamePass] = NOT_COMPARED,
    again: Sequence[Tokens] = (),
) -> dict[str, Any]:
    """The JSON report. What has a 95 % interval has it under the same name with ``_95``.

    It has the last parts of the paths `artifact` and `data`. `right_in` says which answers are
    right, and returns None without labels. Without `times`, those of the passes count.

    The share that a bound is about (``disagreement``, or ``wrong`` of a promise that has a section)
    is that of `same_pass`, by epsilon; the share that differs between two passes has its name with
    ``_between_passes``. Without `same_pass`, two passes are compared, and rounding counts. `again`
    are stock vLLM's answers in other batches: ``rounding`` is the share of them that differ.
    """
    measured = _Measured(
        config, examples, right_in, rounds, times or Times.of(rounds), same_pass, again
    )
    never = measured.at(NEVER_EXIT)
    levels = [measured.level(level.epsilon) for level in config.levels]
    promised = promised_rows(config, examples, measured.groups, rounds)
    name = config.promise.measured
    for row, risk in zip(levels, bounded_rows(promised) or levels, strict=True):
        measured.compare_in_same_pass(risk, row["epsilon"])
        if name in risk:
            row["verdict"] = verdict(risk[name], risk[f"{name}_95"], row["epsilon"])
    [default] = [row for row in levels if row["epsilon"] == config.epsilon]
    return {
        "model": config.base_model,
        "artifact": Path(artifact).name,
        "data": data.name,
        "n": len(examples),
        "prompt_tokens_mean": measured.prompt_tokens / len(examples),
        "delta": config.delta,
        "layers_total": config.layers,
        "stock": measured.engine(measured.stock, None),
        **measured.rounding(),
        **default,
        # Full depth in segments: what the plugin costs, and how often rounding changes an answer.
        "never_exit": {
            **measured.times.speedup(NEVER_EXIT).entries("speedup"),
            **measured.disagreement("disagreement_with_stock", never, measured.stock),
        },
        "levels": [
            {key: row[key] for key in row if key != "adainfer"}
            | {
                key: row["adainfer"][key]
                for key in ("accuracy", "accuracy_95", "exit_histogram", "exit_histogram_95")
            }
            for row in levels
        ],
        **promised,
        "provenance": provenance(),
    }


@dataclass(frozen=True)
class _Measured:
    """The parts of the report; see `build_report` for the attributes."""

    config: ArtifactConfig
    examples: Sequence[Example]
    right_in: RightIn
    rounds: Rounds
    times: Times
    same_pass: Mapping[float, SamePass]
    again: Sequence[Tokens]

    @property
    def stock(self) -> list[Run]:
        return [baseline for baseline, _ in self.rounds]

    @cached_property
    def groups(self) -> Ints:
        return groups_of(self.examples)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(example.token_ids) for example in self.examples)

    def at(self, epsilon: float) -> list[Run]:
        """Our runs at one epsilon."""
        return [by_epsilon[epsilon] for _, by_epsilon in self.rounds]

    def engine(self, runs: Sequence[Run], side: float | None) -> dict[str, Any]:
        """Speed and accuracy of one engine, given its passes; see `Times` for the side."""
        right, rate = self._right(runs[0]), self.times.per_second(side)
        accuracy = None if right is None else Share.of(right, self.groups)
        return {
            "requests_per_second": rate,
            "tokens_per_second": rate * (self.prompt_tokens + runs[0].tokens) / len(self.examples),
            "accuracy": accuracy and accuracy.value,
            "accuracy_95": accuracy and accuracy.interval,
            "runs": self.times.runs(side),
        }

    def disagreement(self, name: str, runs: Sequence[Run], full: Sequence[Run]) -> dict[str, Any]:
        """The share of tokens of `runs` that differ from `full`, and its interval."""
        value, interval = of_rounds(
            [
                differing(run.texts, other.texts, self.groups)
                for run, other in zip(runs, full, strict=True)
            ]
        )
        return {name: value, f"{name}_95": interval}

    def rounding(self) -> dict[str, Any]:
        """The share of stock vLLM's answers that differ in other batches."""
        if not self.again:
            return {}
        share = differing(self.again, self.stock[0].texts, self.groups)
        return {"rounding": share.value, "rounding_95": share.interval}

    def compare_in_same_pass(self, row: dict[str, Any], epsilon: float) -> None:
        """Put the share that differs in the same pass before that between two passes.

        ``compared`` is of how many answers; of none, the share between two passes stays.
        """
        found = self.same_pass.get(epsilon)
        if found is None or not found.compared:
            return
        name = "wrong" if self.config.promise.section else "disagreement"
        row[f"{name}_between_passes"] = row[name]
        row[f"{name}_between_passes_95"] = row[f"{name}_95"]
        # Groups are as alike as their answers in two passes are.
        passes = self.at(epsilon)[0].texts, self.at(NEVER_EXIT)[0].texts
        between = differing(*passes, self.groups)
        rows = between.effective_rows * min(1, found.compared / float(between.rows.sum()))
        row[name] = found.share
        row[f"{name}_95"] = clopper_pearson(row[name] * rows, rows)
        row["compared"] = found.compared

    def level(self, epsilon: float) -> dict[str, Any]:
        """The measurements at one epsilon."""
        runs = self.at(epsilon)
        speedup = self.times.speedup(epsilon)
        saved = 1 - sum(run.layers_run for run in runs) / sum(run.layers_possible for run in runs)
        histogram: Counter[int] = sum((Counter(run.exit_histogram) for run in runs), Counter())
        if self.config.objects is not None:  # one that is early is decided at once, others by token
            early = histogram.total() - histogram.pop(self.config.layers, 0)
            histogram[self.config.layers] = len(runs) * len(self.examples) - early
        exits = {layer: count / histogram.total() for layer, count in sorted(histogram.items())}
        # As many rows as groups: which rows left where is not recorded.
        rows = int(self.groups.max()) + 1
        return {
            "epsilon": epsilon,
            **speedup.entries("speedup"),
            "layers_saved": saved,
            # The bound is about full depth in the same segments; stock vLLM's unsegmented code also
            # rounds differently.
            **self.disagreement("disagreement", runs, self.at(NEVER_EXIT)),
            **self.disagreement("disagreement_with_stock", runs, self.stock),
            **self._accuracy_lost(runs[0]),
            **self._by_field(runs),
            **self._by_label(runs[0], self.same_pass[epsilon].labels if self.same_pass else {}),
            "efficiency": speedup.value * (1 - saved),
            "adainfer": {
                **self.engine(runs, epsilon),
                "layers_run_mean": self.config.layers * (1 - saved),
                "exit_histogram": {str(layer): share for layer, share in exits.items()},
                "exit_histogram_95": {
                    str(layer): clopper_pearson(share * rows, rows)
                    for layer, share in exits.items()
                },
            },
        }

    def _accuracy_lost(self, run: Run) -> dict[str, Any]:
        early, full = self._right(run), self._right(self.at(NEVER_EXIT)[0])
        if not self.config.promise.reads_right or early is None or full is None:
            return {}
        lost = Share.of(full - early, self.groups)
        return {"accuracy_lost": lost.value, "accuracy_lost_95": lost.signed_interval}

    def _by_field(self, runs: Sequence[Run]) -> dict[str, Any]:
        """Of objects, the share whose text differs, and that of each field, of one round."""
        if self.config.objects is None:
            return {}
        full = self.at(NEVER_EXIT)
        value, interval = of_rounds(
            [
                Share.of(~np.array([*map(eq, run.written, other.written)]), self.groups)
                for run, other in zip(runs, full, strict=True)
            ]
        )
        objects = self.config.objects
        rows = field_rows(objects, self.groups, runs[0].texts, full[0].texts)
        of_values = probability_rows(objects, self.examples, runs[0], full[0])
        rows = [{**row, **more} for row, more in zip(rows, of_values, strict=True)]
        return {"text_differs": value, "text_differs_95": interval, "by_field": rows}

    def _by_label(self, run: Run, counted: Mapping[str, Counts]) -> dict[str, Any]:
        """The rows about single labels, of one round; nothing for a policy without labels."""
        if not self.config.labels or self.config.score_head == "sigmoids":
            return {}
        full = self.at(NEVER_EXIT)[0]
        rows = label_rows(self.config, self.examples, self.groups, run.texts, full.texts, counted)
        return {"by_label": rows}

    def _right(self, run: Run) -> Floats | None:
        found = self.right_in(run.texts)
        return None if found is None else np.array(found, np.float64)


def summary_line(report: Mapping[str, Any]) -> str:
    """The report in one line, for a terminal."""
    shares = [f"disagreement {share_in(report, 'disagreement')}"]
    for promise in PROMISES:
        if promise.section in report:
            beyond = promise.beyond.format(**report)
            shares.append(f"{share_in(default_level(report), 'wrong')} {beyond}")
    if "accuracy_lost" in report:
        shares.append(f"accuracy lost {share_in(report, 'accuracy_lost')}")
    result = report.get("verdict", f"bound {report['epsilon']:.1%} on the accuracy lost")
    if "rounding" in report:
        shares.append(f"stock against itself {share_in(report, 'rounding')}")
    line = (
        f"speedup {Speedup.read(report, 'speedup').text}, layers saved "
        f"{report['layers_saved']:.0%}, "
        f"{', '.join(shares)}, {result}"
    )
    return line.replace("(", "(95%: ").replace("%", " %")


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole, and its folder if it is missing; an AdaInferError if that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, content, PUBLIC)
    except OSError as error:
        raise AdaInferError(f"cannot write {path}: {error}") from None
