"""The paper's tasks: calibrate each, compare other methods on it, and measure against stock vLLM.

    .venv/bin/python benchmarks/suite/run_suite.py --model MODEL --data-dir DIR

The prompts of each task are recorded once. From that recording a policy is calibrated and every
method is judged by its decisions; the policy then runs in vLLM, interleaved with stock.
`adainfer.json` defines the tasks.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import torch
import typer

from benchmarks.common.report_files import write_report
from benchmarks.suite import methods
from benchmarks.suite.report import markdown, suite_report
from benchmarks.suite.tasks import TaskData, load_suite, load_task
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.artifact.outputs import Labels
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.cli.arguments import names_of
from vllm_adainfer.offline.calibration.data.shared import pooled_from, shared_tokens
from vllm_adainfer.offline.calibration.data.split import random_order
from vllm_adainfer.offline.calibration.enough_rows import check_rows, split_of
from vllm_adainfer.offline.calibration.fit.calibration import ANY_TOKEN, Calibration
from vllm_adainfer.offline.calibration.fit.choose import candidate_layers
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, fit_policy
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.record.collect import Plan, recorded
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.calibration.write.policy_artifact import write_artifact
from vllm_adainfer.offline.evaluation.evaluate import check_file
from vllm_adainfer.offline.evaluation.measure import measure
from vllm_adainfer.offline.evaluation.rounds import ROUNDS
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT, Measured, Run
from vllm_adainfer.offline.evaluation.same_pass import SamePass, compare_in_same_pass
from vllm_adainfer.offline.evaluation.sequences import compare
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.promise.accuracy import is_right

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
@errors_as_sentences
def main(
    model: Annotated[str, typer.Option(help="Directory or hub id of the model.")],
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Directory of TASK/train.jsonl and TASK/test.jsonl; by default from the hub."
        ),
    ] = None,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/suite.json"),
    tasks: Annotated[str, typer.Option(help="Comma-separated tasks; by default all.")] = "",
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Answered rows before each prompt; by default the task's own."),
    ] = None,
    max_train: Annotated[int, typer.Option(min=1, help="Most prompts to calibrate on.")] = 3000,
    max_test: Annotated[int, typer.Option(min=1, help="Most prompts to measure on.")] = 300,
    repeat: Annotated[int, typer.Option(min=1, help="Rounds to time, of stock and ours.")] = ROUNDS,
) -> None:
    """Calibrate and measure each task; write JSON and a Markdown table side by side."""
    run_suite(model, output, data_dir, names_of(tasks), shots, max_train, max_test, repeat)


def run_suite(
    model: str,
    output: Path,
    data_dir: Path | None = None,
    tasks: Sequence[str] = (),
    shots: int | None = None,
    max_train: int = 3000,
    max_test: int = 300,
    repeat: int = ROUNDS,
    epsilon: float = 0.02,
) -> dict[str, Any]:
    """Evaluate a model on the suite's tasks; write the report and its tables.

    The arguments are those of the command line; `epsilon` bounds the disagreement.

    Returns:
        the report, see `suite_report`.

    Raises:
        AdaInferError: model, data and arguments do not fit together, or a file cannot be written.

    """
    check_file(output)
    hf_config, tokenizer = load_config_and_tokenizer(model)
    most = hf_config.max_position_embeddings - 1
    options = PolicyOptions(epsilon=epsilon)
    loaded = []
    for task in load_suite().select(tasks):
        data = load_task(task, data_dir, tokenizer, shots, max_train, max_test, most)
        split = split_of(np.arange(len(data.train)), options)
        check_rows(split, options, f"the training part of {task.name}")
        loaded.append(data)
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            _judged(data, model, hf_config, tokenizer, options, Path(folder))
            for data in progress(loaded, desc="record and fit", unit="task")
        ]
        _measure(model, epsilon, repeat, loaded, rows, Path(folder))
    report = suite_report(model, options, hf_config.num_hidden_layers, rows)
    write_report(output, report, markdown(report))
    return report


def _judged(
    data: TaskData,
    model: str,
    hf_config: Any,
    tokenizer: Any,
    options: PolicyOptions,
    directory: Path,
) -> dict[str, Any]:
    """The row of one task; writes its artifact to `directory` if a policy was certified."""
    shortest = min(len(one.token_ids) for one in (*data.train, *data.test))
    plan = Plan(
        list(range(hf_config.num_hidden_layers)),
        [label.token_id for label in data.labels],
        lens_prompts=0 if data.labels else len(data.train) // 2,
        pooled_from=pooled_from(data.train, shortest) if data.labels else None,
    )
    split = split_of(np.arange(len(data.train)), options)
    order = random_order(split.groups, options.seed)
    examples = [*(data.train[index] for index in order), *data.test]
    right = [*(data.train_answers[index] for index in order), *data.answers]
    recording = recorded(model, hf_config, examples, plan)
    tests = np.arange(len(order), len(examples))
    kind = "pooled-label-head" if data.labels else "lens"
    candidates = candidate_layers(recording.model.depth, kind=kind)
    thinned = replace(recording, states={layer: recording.states[layer] for layer in candidates})
    ids = torch.tensor([label.token_id for label in data.labels]) if data.labels else None
    policy = fit_policy(
        Calibration(
            thinned,
            Target(kind, ids),
            split,
            options,
            Labels(labels=data.labels) if data.labels else ANY_TOKEN,
            pooled_from=plan.pooled_from,
            shared=shared_tokens([examples[row] for row in split.fit], tokenizer),
        ),
        "auto",
    )
    test = methods.TestPart(recording, tests, right)
    full = is_right(recording.tokens[tests], [right[row] for row in tests])
    chance = data.chance
    row: dict[str, Any] = {
        "task": data.task.name,
        "title": data.task.title,
        "shots": data.shots,
        "labels": len(data.labels),
        "train": len(data.train),
        "test": len(data.test),
        "skipped": data.skipped,
        "prompt_tokens_mean": float(np.mean([len(e.token_ids) for e in data.test])),
        "chance": chance,
        "full_depth": {"accuracy": float(full.mean())},
        # Not better than the majority answer, by a one-sided test at 95 %.
        "at_chance": bool(
            full.mean() < chance + 1.645 * np.sqrt(chance * (1 - chance) / len(full))
        ),
        "exit_points": [exit.layer for exit in policy.exits],
        "methods": _outcomes(policy, test),
        "measured": None,
    }
    if options.epsilon in policy.points:
        write_artifact(
            policy,
            model,
            hf_config,
            data.task.template,
            directory / data.task.name,
        )
    return row


def _outcomes(policy: FittedPolicy, test: methods.TestPart) -> dict[str, Any]:
    calibration, costs = policy.calibration, policy.costs
    ours = methods.ours(policy, calibration.options.epsilon, test)
    layers_run = costs.depth if ours is None else ours.layers_run
    outcomes = {
        "static_truncation": methods.static_truncation(layers_run, calibration.target, test, costs),
        **methods.adainfer(
            calibration.split, calibration.options, costs, test, calibration.target.label_ids
        ),
        "ours": ours,
    }
    return {name: outcome and asdict(outcome) for name, outcome in outcomes.items()}


def _measure(
    model: str,
    epsilon: float,
    repeat: int,
    loaded: Sequence[TaskData],
    rows: Sequence[dict[str, Any]],
    directory: Path,
) -> None:
    """Fill in ``measured``, except for tasks at chance or without a policy."""
    worth = [
        (data, row)
        for data, row in zip(loaded, rows, strict=True)
        if not row["at_chance"] and (directory / data.task.name).is_dir()
    ]
    if not worth:
        return
    stock = start_engine(model, [example for data, _ in worth for example in data.test])
    try:
        for data, row in progress(worth, desc="measure", unit="task"):
            artifact = str(directory / data.task.name)
            config = load_artifact_config(artifact)
            ours = start_engine(model, data.test, {"artifact": artifact, "compare": True})
            try:
                epsilons = [NEVER_EXIT, epsilon]
                same_pass = compare_in_same_pass(ours, data.test, config, [epsilon])
                found = measure(stock, ours, data.test, config, epsilons, repeat)
            finally:
                stop_engine(ours)
            row["measured"] = _measured(found, data, epsilon, same_pass[epsilon])
    finally:
        stop_engine(stock)


def _measured(
    found: Measured, data: TaskData, epsilon: float, same_pass: SamePass
) -> dict[str, Any]:
    """What the passes have answered, and how fast stock vLLM and ours were in turn.

    ``disagreement`` is of the ``compared`` answers; of none, it is that between two passes.
    """
    [(stock, by_epsilon)], times, again = found
    never, ours, n = by_epsilon[NEVER_EXIT], by_epsilon[epsilon], len(data.test)

    def differing(texts: Sequence[list[int]], other: Sequence[list[int]]) -> float:
        return float(compare(texts, other)["disagreement"])

    def accuracy(run: Run) -> float:
        hits = (text[0] in right for text, right in zip(run.texts, data.answers, strict=True))
        return sum(hits) / n

    between = differing(ours.texts, never.texts)
    return {
        **times.speedup(epsilon).entries("speedup"),
        **times.speedup(NEVER_EXIT).entries("never_exit"),
        "layers_saved": ours.layers_saved,
        "disagreement": same_pass.share if same_pass.compared else between,
        "compared": same_pass.compared or n,
        "disagreement_between_passes": between,
        "disagreement_with_stock": differing(ours.texts, stock.texts),
        "rounding": differing(again, stock.texts),
        "accuracy": accuracy(ours),
        "stock_accuracy": accuracy(stock),
        "stock_requests_per_second": times.per_second(None),
        "requests_per_second": times.per_second(epsilon),
    }


if __name__ == "__main__":
    app()
