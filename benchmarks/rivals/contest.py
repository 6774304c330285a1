"""The methods of the comparison: each learns from the same prompts, and is judged by others."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from benchmarks.common.minilm import fetch_minilm
from benchmarks.offline.bench_trained_probes import alone
from benchmarks.rivals.classifiers import Fit, embeddings, shad0w_table, words
from benchmarks.rivals.cut_model import CutModel
from benchmarks.rivals.judged import certified_threshold, of_policy, static_truncation
from benchmarks.rivals.report import TITLES
from benchmarks.rivals.task import Task
from benchmarks.suite import methods
from vllm_adainfer.arrays import Bools
from vllm_adainfer.offline.calibration.calibrate import calibration_of
from vllm_adainfer.offline.calibration.certify.certify import Terms
from vllm_adainfer.offline.calibration.data.student_base import load_student_base
from vllm_adainfer.offline.calibration.enough_rows import split_of
from vllm_adainfer.offline.calibration.fit import cost
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.students import layers_of, train_students
from vllm_adainfer.offline.calibration.fit.training import Lesson
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, best_heads, make_policy
from vllm_adainfer.offline.calibration.prompts import Prompts
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.progress import say

CACHE = Path(__file__).parents[2] / ".cache"


@dataclass(frozen=True)
class Contest:
    """The methods that learn from so many prompts of a task, the first ones.

    Attributes:
        rows: the outcome of each method, for the report.
        policies: ours, by name.
        spares: name -> asks a classifier about texts, and says which of them it answers.
        cut: the cut model, and which of the tests it may answer.

    """

    task: Task
    budget: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    policies: dict[str, FittedPolicy] = field(default_factory=dict)
    spares: dict[str, Callable[[Sequence[str]], Bools]] = field(default_factory=dict)
    cut: list[tuple[CutModel, Bools]] = field(default_factory=list)

    def judge(self) -> None:
        """Let each method learn, and judge it by the tests."""
        task, request = self.task, self.task.request
        groups = task.prompts.split.groups
        split = replace(split_of(groups[: self.budget], request.options), groups=groups)
        assert request.student is not None
        _, tokenizer = load_config_and_tokenizer(request.model)
        shared, examples = task.prompts.shared, task.prompts.examples
        base = load_student_base(request.student, examples, tokenizer, shared)
        prompts = replace(task.prompts, split=split, student=base)
        calibration = calibration_of(request, prompts, task.recording)
        encoder = fetch_minilm(CACHE / "all-MiniLM-L6-v2")
        self._classifier("words", words(), calibration)
        self._classifier("embeddings", embeddings(encoder), calibration)
        self._classifier("table", shad0w_table(CACHE / "shad0w"), calibration)
        self._cut_model(calibration)
        self._published(calibration)
        self._ours(calibration, prompts)

    @contextmanager
    def _row(self, name: str) -> Iterator[dict[str, Any]]:
        """A row of the report, and how long it takes."""
        say(f"{TITLES[name]}, {self.budget} prompts")
        row: dict[str, Any] = {"name": name}
        start = time.perf_counter()
        yield row
        self.rows.append({"seconds": time.perf_counter() - start} | row)

    def _classifier(self, name: str, fit: Fit, calibration: Calibration) -> None:
        task, split = self.task, calibration.split
        with self._row(name) as row:
            start = time.perf_counter()
            answer = fit(task.texts_of(split.fit), task.recording.tokens[split.fit])
            answers, sure = answer(task.texts_of(split.certify))
            differs = answers != task.recording.tokens[split.certify]
            epsilon = calibration.options.epsilon
            least = certified_threshold(differs, sure, Terms(calibration).bound, epsilon)
            row["seconds"] = time.perf_counter() - start
            answers, sure = answer(task.texts_of(task.tests.rows))
            served = sure >= least
            chosen = np.where(served, answers, task.tests.teacher)
            row |= task.tests.result(chosen, served.astype(np.float64), by_request=True)
        self.spares[name] = lambda texts: answer(texts)[1] >= least

    def _cut_model(self, calibration: Calibration) -> None:
        task, split = self.task, calibration.split
        tokens = task.recording.tokens
        with self._row("cut") as row:
            start = time.perf_counter()
            cut = CutModel(task.request.model, task.cut_layers)
            cut.fit(task.examples(split.fit), tokens[split.fit])
            answers, sure = cut.answer(task.examples(split.certify), task.labels(split.certify))
            differs = answers != tokens[split.certify]
            least = certified_threshold(
                differs, sure, Terms(calibration).bound, calibration.options.epsilon
            )
            row["seconds"] = time.perf_counter() - start
            rows = task.tests.rows
            answers, sure = cut.answer(task.examples(rows), task.labels(rows))
            served = sure >= least
            share = task.cut_layers / task.recording.model.depth  # which all run
            chosen = np.where(served, answers, task.tests.teacher)
            row |= task.tests.result(chosen, served - share, by_request=False)
            row["served"] = float(served.mean())
            row["alone"] = task.tests.result(answers, np.full(len(rows), 1 - share), False)
        self.cut.append((cut, served))

    def _published(self, calibration: Calibration) -> None:
        """Static truncation, AdaInfer and CALM, with the model's own head."""
        task, options = self.task, calibration.options
        last_token = replace(calibration.target, kind="label-head")
        with self._row("static") as row:
            row |= static_truncation(
                task.recording,
                last_token,
                calibration.split,
                Terms(calibration).bound,
                options.epsilon,
                task.tests,
            )
        right: list[set[int]] = [set()] * task.tests.rows[0]
        part = methods.TestPart(task.recording, task.tests.rows, [*right, *task.tests.rights])
        model = task.recording.model
        costs = cost.Costs(model.depth, model.layer_seconds, model.cut_seconds, {}, model.depth)
        start = time.perf_counter()
        labels = calibration.target.label_ids
        found = methods.adainfer(calibration.split, options, costs, part, labels)
        seconds = time.perf_counter() - start
        for name in ("adainfer", "adainfer_labels", "calm"):
            with self._row(name) as row:
                row |= {"seconds": seconds, **task.tests.outcome(found[name])}  # fitted at once

    def _ours(self, calibration: Calibration, prompts: Prompts) -> None:
        epsilon, tests = calibration.options.epsilon, self.task.tests
        start = time.perf_counter()
        exits = best_heads(calibration, "pooled-label-head")
        exits_seconds = time.perf_counter() - start
        assert prompts.student is not None
        start = time.perf_counter()
        [student] = train_students(
            prompts.student, Lesson.of(calibration), [layers_of(prompts.student)]
        )
        student_seconds = time.perf_counter() - start
        both = replace(calibration, trained=(student,))
        with patch.object(cost, "trained_seconds", return_value=0.0):
            made = {
                "student": make_policy(alone(both), []),
                "exits": exits,
                "both": make_policy(both, exits.candidates),
            }
            seconds = {
                "student": student_seconds,
                "exits": exits_seconds,
                "both": student_seconds + exits_seconds,
            }
            for name, policy in made.items():
                with self._row(name) as row:
                    row["seconds"] = seconds[name]
                    if epsilon not in policy.points:
                        row |= tests.outcome(None)
                        continue
                    row |= of_policy(policy, epsilon, tests)
                    row["exit_points"] = [exit.layer for exit in policy.exits]
                    self.policies[name] = policy
