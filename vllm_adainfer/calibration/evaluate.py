"""Evaluate: stock vLLM and vllm-adainfer side by side on the same prompts, interleaved."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vllm_adainfer.artifact import ArtifactConfig, Label, load_artifact
from vllm_adainfer.calibration.calibrate import load_config
from vllm_adainfer.calibration.collect import one_token
from vllm_adainfer.calibration.data import (
    Example,
    check_labels_known,
    find_labels,
    make_examples,
    read_rows,
    read_template,
)
from vllm_adainfer.calibration.engine import start_engine, stop_engine
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.provenance import provenance
from vllm_adainfer.runtime.admission import EPSILON_ARG
from vllm_adainfer.stats import stats

if TYPE_CHECKING:
    from vllm import LLM


NEVER_EXIT = 0.0
WARM_UP = 64


@dataclass(frozen=True)
class EvaluationRequest:
    """What the command line says; see `vllm-adainfer evaluate --help`."""

    model: str
    artifact: str
    data: Path
    template: str | None = None
    label_field: str = "label"
    labels: tuple[str, ...] = ()
    repeat: int = 3
    report: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class Run:
    """One pass over all prompts."""

    seconds: float
    tokens: list[int]
    layers_run: int = 0
    layers_possible: int = 0
    exit_histogram: Mapping[int, int] | None = None

    @property
    def layers_saved(self) -> float:
        """Share of rows x layers that were not executed."""
        return 1 - self.layers_run / self.layers_possible


def evaluate(request: EvaluationRequest) -> dict[str, Any]:
    """Measure both engines and write what was asked for.

    Returns:
        the report.

    Raises:
        AdaInferError: input, model and artifact do not fit together, or a file cannot be
            written.

    """
    for path in (request.report, request.plot):
        if path is not None:
            _check_file(path)
    config = load_artifact(request.artifact).config
    rows = read_rows(request.data)
    hf_config, tokenizer = load_config(request.model)
    config.check_served_by(hf_config)
    template = read_template(request.template)
    longest = hf_config.max_position_embeddings - 1
    examples = make_examples(rows, tokenizer, template, request.label_field, longest)
    if config.labels:
        _check_labels(config, request, examples, tokenizer)
    epsilons = [NEVER_EXIT, *(level.epsilon for level in config.levels)]
    # Ours first: an artifact for other weights is refused before stock vLLM compiles.
    ours = start_engine(request.model, examples, {"artifact": request.artifact})
    try:
        stock = start_engine(request.model, examples)
        try:
            rounds = _measure(stock, ours, examples, config.labels, epsilons, request.repeat)
        finally:
            stop_engine(stock)
    finally:
        stop_engine(ours)
    truth = _true_tokens(examples, config.labels, tokenizer)
    report = _report(request, config, examples, truth, rounds)
    if request.report is not None:
        write_whole(request.report, (json.dumps(report, indent=2) + "\n").encode())
    if request.plot is not None:
        from vllm_adainfer.calibration.plot import report_plot

        write_whole(request.plot, report_plot(report))
    return report


def summary_line(report: Mapping[str, Any]) -> str:
    """The report in one line, for a terminal."""
    return (
        f"speedup {report['speedup']:.2f}x, layers saved {report['layers_saved']:.0%}, "
        f"disagreement {report['disagreement']:.1%} (bound {report['epsilon']:.1%})"
    ).replace("%", " %")


def write_whole(path: Path, content: bytes) -> None:
    """Write under a temporary name, then rename.

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


def _check_file(path: Path) -> None:
    """Fail before the measurement, not after it."""
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if path.is_dir() or not parent.is_dir() or not os.access(parent, os.W_OK):
        raise AdaInferError(f"cannot write {path}: choose a file in a directory you may write to")


def _check_labels(
    config: ArtifactConfig, request: EvaluationRequest, examples: Sequence[Example], tokenizer: Any
) -> None:
    """The artifact's labels must decide these prompts as they decided the calibration's."""
    names = [label.name for label in config.labels]
    if request.labels and set(request.labels) != set(names):
        raise AdaInferError(
            f"--labels {','.join(request.labels)} are not those of the artifact: {','.join(names)}"
        )
    found = find_labels(names, examples[0], tokenizer)
    if found != config.labels:
        raise AdaInferError(
            "the labels begin with other tokens after this prompt than at calibration: use the "
            "template and model of the calibration"
        )
    check_labels_known(examples, config.labels)


def _measure(
    stock: LLM,
    ours: LLM,
    examples: Sequence[Example],
    labels: Sequence[Label],
    epsilons: Sequence[float],
    repeat: int,
) -> list[tuple[Run, dict[float, Run]]]:
    """`repeat` rounds: stock once, then vllm-adainfer at each epsilon; a short warm-up first."""
    _run(stock, examples[:WARM_UP], labels, None)
    _run(ours, examples[:WARM_UP], labels, epsilons[-1])
    rounds = []
    steps = repeat * (1 + len(epsilons))
    with tqdm(total=steps, desc="evaluate", unit="run", disable=None) as progress:
        for _ in range(repeat):
            baseline = _run(stock, examples, labels, None)
            progress.update()
            by_epsilon = {}
            for epsilon in epsilons:
                by_epsilon[epsilon] = _run(ours, examples, labels, epsilon)
                progress.update()
            rounds.append((baseline, by_epsilon))
    return rounds


def _run(
    engine: LLM, examples: Sequence[Example], labels: Sequence[Label], epsilon: float | None
) -> Run:
    """One pass; `epsilon` is None for stock vLLM. The prefix cache starts empty."""
    engine.reset_prefix_cache()
    before = None if epsilon is None else stats(engine)
    params = one_token(labels, None if epsilon is None else {EPSILON_ARG: epsilon})
    prompts = [{"prompt_token_ids": example.token_ids} for example in examples]
    start = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    tokens = [output.outputs[0].token_ids[0] for output in outputs]
    if before is None:
        return Run(seconds, tokens)
    after = stats(engine)
    return Run(
        seconds,
        tokens,
        layers_run=after["layers_run"] - before["layers_run"],
        layers_possible=after["layers_possible"] - before["layers_possible"],
        exit_histogram=Counter(after["exit_histogram"]) - Counter(before["exit_histogram"]),
    )


def _true_tokens(
    examples: Sequence[Example], labels: Sequence[Label], tokenizer: Any
) -> list[int] | None:
    """The token each row's label begins with; None where the data has no labels."""
    if any(example.label is None for example in examples):
        return None
    if labels:
        ids = {label.name: label.token_id for label in labels}
        return [ids[str(example.label)] for example in examples]
    truth = []
    for example in examples:
        separator = "" if example.text[-1:].isspace() else " "
        truth.append(tokenizer.encode(f"{separator}{example.label}", add_special_tokens=False)[0])
    return truth


def _report(
    request: EvaluationRequest,
    config: ArtifactConfig,
    examples: Sequence[Example],
    truth: Sequence[int] | None,
    rounds: Sequence[tuple[Run, dict[float, Run]]],
) -> dict[str, Any]:
    stock_runs = [baseline for baseline, _ in rounds]
    never = [by_epsilon[NEVER_EXIT] for _, by_epsilon in rounds]
    prompt_tokens = sum(len(example.token_ids) for example in examples) + len(examples)

    def engine(runs: Sequence[Run]) -> dict[str, Any]:
        seconds = statistics.median(run.seconds for run in runs)
        return {
            "requests_per_second": len(examples) / seconds,
            "tokens_per_second": prompt_tokens / seconds,
            "accuracy": None if truth is None else _share_equal(runs[0].tokens, truth),
            "runs": [{"seconds": run.seconds} for run in runs],
        }

    def speedup_of(runs: Sequence[Run]) -> float:
        return statistics.median(
            baseline.seconds / run.seconds for baseline, run in zip(stock_runs, runs, strict=True)
        )

    def disagreement_of(runs: Sequence[Run], references: Sequence[Run]) -> float:
        return statistics.median(
            1 - _share_equal(run.tokens, reference.tokens)
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
            # With the full-depth model in the same segments, which is what was certified, and
            # with stock vLLM, whose unsegmented code also rounds differently.
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

    levels = [level(row.epsilon) for row in config.levels]
    [asked] = [row for row in levels if row["epsilon"] == config.epsilon]
    return {
        "model": config.base_model,
        "artifact": Path(request.artifact).name,
        "data": request.data.name,
        "n": len(examples),
        "prompt_tokens_mean": prompt_tokens / len(examples) - 1,
        "delta": config.delta,
        "layers_total": config.layers,
        "stock": engine(stock_runs),
        **asked,
        # Full depth in segments: what the plugin costs, and how often rounding alone decides.
        "never_exit": {
            "speedup": speedup_of(never),
            "disagreement_with_stock": disagreement_of(never, stock_runs),
        },
        "levels": [
            {key: row[key] for key in row if key != "adainfer"}
            | {"accuracy": row["adainfer"]["accuracy"]}
            for row in levels
        ],
        "provenance": provenance(),
    }


def _share_equal(left: Sequence[int], right: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(left, right, strict=True)) / len(left)
