r"""What else answers cheaply, under one promise: small classifiers, a cut model, other exits, ours.

    .venv/bin/python benchmarks/rivals/bench_rivals.py --model MODEL --title CR \
        --data rows.jsonl --template $'Review: {text}\nSentiment:' --labels negative,positive

All methods learn from the same prompts and the whole model's answers to them, without labels. At
most 2 % of all requests may be answered otherwise than by the whole model (exact bound, confidence
90 %): a method keeps the promise by the prompts that it holds out, by a threshold on how sure it
is, and leaves other requests to the whole model. AdaInfer as published has no such promise. Shares
are of prompts that nothing was fitted to, by the whole model's recorded states and answers; speed
is that of one run beside stock vLLM, after calibration with `--timed` prompts. Exit points are
chosen as if the student took no time, so that it is in its policies also where it costs more.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is imported

import numpy as np
import typer

from benchmarks.common.minilm import fetch_minilm
from benchmarks.common.report_files import write_report
from benchmarks.offline.bench_trained_probes import alone
from benchmarks.rivals.classifiers import Classifier, Embeddings, Shad0wTable, Words
from benchmarks.rivals.cut_model import CutModel
from benchmarks.rivals.judged import Unseen, certified_threshold, of_policy, static_truncation
from benchmarks.rivals.report import TITLES, markdown
from benchmarks.suite import methods
from vllm_adainfer.arrays import Bools, Ints
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.cli.arguments import names_of
from vllm_adainfer.offline.calibration.calibrate import best_heads, calibration_of
from vllm_adainfer.offline.calibration.calibration import Calibration
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.student_base import load_student_base
from vllm_adainfer.offline.calibration.fit import cost
from vllm_adainfer.offline.calibration.fitted_policy import FittedPolicy, make_policy
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.prompts import Prompts, load_prompts, right_tokens, split_of
from vllm_adainfer.offline.calibration.record.asking import greedy
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.calibration.record.recording import Recording
from vllm_adainfer.offline.calibration.recordings import record_prompts
from vllm_adainfer.offline.calibration.trained_probes import student_of
from vllm_adainfer.offline.calibration.write.policy_artifact import write_artifact
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.progress import progress, say
from vllm_adainfer.offline.provenance import provenance

if TYPE_CHECKING:
    from vllm import LLM

CACHE = Path(__file__).parents[2] / ".cache"
ROUNDS = 3
AT_ONCE, ALONE = 300, 200  # prompts to time together, and one at a time
CUT_SHARE = 1 / 3  # of the model's layers
WARM_UP = 32


@errors_as_sentences
def main(
    model: Annotated[str, typer.Option()],
    data: Annotated[Path, typer.Option(help="Rows or requests, with right labels.")],
    title: Annotated[str, typer.Option(help="Name of the task.")],
    template: Annotated[str | None, typer.Option()] = None,
    labels: Annotated[str, typer.Option()] = "",
    label_pool: Annotated[str, typer.Option()] = "",
    budgets: Annotated[str, typer.Option(help="Prompts to learn from.")] = "300,1000,3000",
    timed: Annotated[int, typer.Option(help="The budget that is timed.")] = 1000,
    test: Annotated[int, typer.Option(help="Prompts that nothing is fitted to.")] = 600,
    epsilon: Annotated[float, typer.Option()] = 0.02,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/rivals.json"),
) -> None:
    """Compare, and add the task to the JSON and the Markdown of `output`."""
    sizes = [int(size) for size in names_of(budgets)]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        most = sample(data, rows, max(sizes) + test) - test
        request = CalibrationRequest(
            model=model,
            data=rows,
            output=Path(folder, "policy"),
            template=template,
            labels=names_of(labels),
            label_pool=names_of(label_pool),
            probe="pooled-label-head",
            student=str(fetch_minilm(CACHE / "all-MiniLM-L6-v2")),
            options=PolicyOptions(epsilon=epsilon),
        )
        start = time.perf_counter()
        task = read_task(request, most)
        recording_seconds = (time.perf_counter() - start) / (most + test)
        found, times = [], {}
        for budget in sorted({min(size, most) for size in sizes}):
            made = Contest(task, budget)
            made.judge()
            found += [one | {"prompts": budget} for one in made.rows]
            if budget == min(timed, most):
                times = timed_in_turn(task, made, Path(folder))
    report = {
        "task": title,
        "model": Path(model).name,
        "epsilon": epsilon,
        "test": test,
        "timed": min(timed, most),
        "at_once": AT_ONCE,
        "alone": ALONE,
        "recording_seconds": recording_seconds,
        "stock_accuracy": task.tests.stock_accuracy,
        "cut_layers": task.cut_layers,
        "depth": task.recording.depth,
        "rows": found,
        "times": times,
        "provenance": provenance(),
    }
    earlier = json.loads(output.read_text()) if output.is_file() else []
    reports = [*(one for one in earlier if one["task"] != title), report]
    write_report(output, reports, markdown(reports))


def sample(data: Path, output: Path, count: int) -> int:
    """Write so many random rows of `data`, or all; returns how many."""
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    chosen = np.random.default_rng(0).permutation(len(lines))[:count]
    output.write_text("".join(f"{lines[place]}\n" for place in chosen), encoding="utf-8")
    return len(chosen)


@dataclass(frozen=True)
class Task:
    """The prompts of a task, in random order, and what the whole model did with them.

    Attributes:
        request: how policies are calibrated.
        prompts: all prompts.
        texts: what classifiers read of them: all but what every prompt begins and ends with.
        recording: the whole model's states and answers.
        tests: the prompts that nothing is fitted to, the last ones.

    """

    request: CalibrationRequest
    prompts: Prompts
    texts: Sequence[str]
    recording: Recording
    tests: Unseen

    @property
    def cut_layers(self) -> int:
        """The layers of the cut model."""
        return round(CUT_SHARE * self.recording.depth)

    def labels(self, places: Ints) -> list[Sequence[int]]:
        """The label tokens that each prompt may be answered with."""
        common = [label.token_id for label in self.prompts.labels]
        return [self.prompts.examples[place].labels or common for place in places.tolist()]

    def examples(self, places: Ints) -> list[Example]:
        """Some of the prompts."""
        return [self.prompts.examples[place] for place in places.tolist()]

    def texts_of(self, places: Ints) -> list[str]:
        """Their texts."""
        return [self.texts[place] for place in places.tolist()]


def read_task(request: CalibrationRequest, most: int) -> Task:
    """Read the prompts, and run the whole model on them; the first `most` are for calibration."""
    prompts = load_prompts(request)
    recording = record_prompts(request, prompts)
    examples = prompts.examples
    start, end = ends_of([example.text for example in examples])
    texts = [example.text[start : len(example.text) - end] for example in examples]
    rows = np.arange(most, len(examples))
    _, tokenizer = load_config_and_tokenizer(request.model)
    rights = right_tokens([examples[row] for row in rows], prompts.labels, tokenizer)
    tests = Unseen(rows, recording.tokens[rows], rights)
    return Task(request, prompts, texts, recording, tests)


def ends_of(texts: Sequence[str]) -> tuple[int, int]:
    """How many characters all texts begin with, and end with."""
    start = _shared(texts)
    return start, _shared([text[start:][::-1] for text in texts])


def _shared(texts: Sequence[str]) -> int:
    """How many characters all texts begin with."""
    first, last = min(texts), max(texts)  # if these two do, those between them do
    pairs = enumerate(zip(first, last, strict=False))
    return next((place for place, (one, other) in pairs if one != other), len(first))


@dataclass(frozen=True)
class Contest:
    """The methods that learn from so many prompts of a task.

    Attributes:
        task: the task.
        budget: the prompts, the first ones.
        rows: what each method does, for the report.
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
        base = load_student_base(request.student, task.prompts.examples, tokenizer)
        prompts = replace(task.prompts, split=split, student=base)
        calibration = calibration_of(request, prompts, task.recording)
        encoder = fetch_minilm(CACHE / "all-MiniLM-L6-v2")
        self._classifier("words", Words(), calibration)
        self._classifier("embeddings", Embeddings(encoder), calibration)
        self._classifier("table", Shad0wTable(CACHE / "shad0w"), calibration)
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

    def _classifier(self, name: str, classifier: Classifier, calibration: Calibration) -> None:
        task, split = self.task, calibration.split
        with self._row(name) as row:
            start = time.perf_counter()
            classifier.fit(task.texts_of(split.fit), task.recording.tokens[split.fit])
            answers, sure = classifier.answer(task.texts_of(split.certify))
            differs = answers != task.recording.tokens[split.certify]
            epsilon = calibration.options.epsilon
            least = certified_threshold(differs, sure, calibration.bound, epsilon)
            row["seconds"] = time.perf_counter() - start
            answers, sure = classifier.answer(task.texts_of(task.tests.rows))
            served = sure >= least
            chosen = np.where(served, answers, task.tests.teacher)
            row |= task.tests.result(chosen, served.astype(np.float64), by_request=True)
        self.spares[name] = lambda texts: classifier.answer(texts)[1] >= least

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
                differs, sure, calibration.bound, calibration.options.epsilon
            )
            row["seconds"] = time.perf_counter() - start
            rows = task.tests.rows
            answers, sure = cut.answer(task.examples(rows), task.labels(rows))
            served = sure >= least
            share = task.cut_layers / task.recording.depth  # which all run
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
                calibration.bound,
                options.epsilon,
                task.tests,
            )
        right: list[set[int]] = [set()] * task.tests.rows[0]
        part = methods.TestPart(task.recording, task.tests.rows, [*right, *task.tests.rights])
        recording = task.recording
        costs = cost.Costs(
            recording.depth, recording.layer_seconds, recording.cut_seconds, {}, recording.depth
        )
        with self._row("adainfer") as row:
            found = methods.adainfer(calibration.split, options, costs, part)
            row |= task.tests.outcome(found["adainfer"])
        with self._row("calm") as row:
            row |= task.tests.outcome(found["calm"])
        self.rows[-1]["seconds"] = self.rows[-2]["seconds"]  # both were fitted at once

    def _ours(self, calibration: Calibration, prompts: Prompts) -> None:
        epsilon, tests = calibration.options.epsilon, self.task.tests
        start = time.perf_counter()
        exits = best_heads(calibration, "pooled-label-head")
        exits_seconds = time.perf_counter() - start
        assert prompts.student is not None
        start = time.perf_counter()
        student = student_of(calibration, prompts.student)
        student_seconds = time.perf_counter() - start
        both = replace(calibration, student=student)
        with patch.object(cost, "student_seconds", return_value=0.0):
            made = {
                "student": make_policy(alone(both), []),
                "exits": exits,
                "both": make_policy(both, exits.heads),
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


def timed_in_turn(task: Task, contest: Contest, folder: Path) -> dict[str, Any]:
    """The times of stock and of each method: all tests at once in turn, and one at a time."""
    request, places = task.request, task.tests.rows[:AT_ONCE]
    examples, texts, labels = task.examples(places), task.texts_of(places), task.labels(places)
    hf_config, _ = load_config_and_tokenizer(request.model)
    for name, policy in contest.policies.items():
        write_artifact(policy, request.model, hf_config, request.template, folder / name)
    [(cut, cut_serves)] = contest.cut
    cut.save(folder / "cut")
    artifacts = {name: str(folder / name) for name in contest.policies}
    engines = {
        "stock": start_engine(request.model, examples),
        "ours": start_engine(request.model, examples, {"artifact": artifacts}),
        "cut": start_engine(str(folder / "cut"), examples),
    }

    def ask(engine: str, some: Sequence[int], policy: str | None = None) -> None:
        if some:
            extra = None if policy is None else {"adainfer_policy": policy}
            engines[engine].generate(
                [{"prompt_token_ids": examples[place].token_ids} for place in some],
                [greedy(list(labels[place]), extra) for place in some],
                use_tqdm=False,
            )

    def behind(name: str) -> Callable[[Sequence[int]], None]:
        def answer(some: Sequence[int]) -> None:
            spared = contest.spares[name]([texts[place] for place in some])
            ask("stock", np.array(some)[~spared].tolist())

        return answer

    def cut_first(some: Sequence[int]) -> None:
        ask("cut", some)
        ask("stock", [place for place in some if not cut_serves[place]])

    ways: dict[str, Callable[[Sequence[int]], None]] = {"stock": lambda some: ask("stock", some)}
    ways |= {name: behind(name) for name in contest.spares}
    ways["cut"] = cut_first
    for name in contest.policies:
        ways[name] = lambda some, name=name: ask("ours", some, name)  # type: ignore[misc]
    try:
        return times_of(ways, list(engines.values()))
    finally:
        for engine in engines.values():
            stop_engine(engine)


def times_of(
    ways: Mapping[str, Callable[[Sequence[int]], None]], engines: Sequence[LLM]
) -> dict[str, Any]:
    """Seconds for all at once by round, and for each alone, of each way to answer."""

    def seconds(answer: Callable[[Sequence[int]], None], some: Sequence[int]) -> float:
        for engine in engines:
            engine.reset_prefix_cache()
        start = time.perf_counter()
        answer(some)
        return time.perf_counter() - start

    everyone = range(AT_ONCE)
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    single: dict[str, list[float]] = {name: [] for name in ways}
    for answer in ways.values():
        answer(everyone[:WARM_UP])
    with progress(total=ROUNDS * len(ways) + ALONE, desc="measure", unit="run") as done:
        for _ in range(ROUNDS):
            for name, answer in ways.items():
                rounds[name].append(seconds(answer, everyone))
                done.update()
        for place in everyone[:ALONE]:
            for name, answer in ways.items():
                single[name].append(seconds(answer, [place]))
            done.update()
    return {
        name: {
            "seconds": rounds[name],
            "p50_ms": float(1e3 * np.percentile(single[name], 50)),
            "p99_ms": float(1e3 * np.percentile(single[name], 99)),
        }
        for name in ways
    }


if __name__ == "__main__":
    typer.run(main)
