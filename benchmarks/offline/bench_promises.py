r"""The cost of each promise: the best label, a tolerance, gates, one label's recall, never early.

    .venv/bin/python benchmarks/offline/bench_promises.py --model MODEL --title SST-2 \
        --data rows.jsonl --template $'Review: {text}\nSentiment:' --labels negative,positive

The prompts are recorded once. The last `--test` of them, in random order, calibrate nothing; on
them a policy of each promise runs in one engine, in turn with stock vLLM. Requests ask for what a
policy promises: a label, or its probabilities. That engine is cut at the exit points of all
policies, which costs each of them a little.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer

from benchmarks.common.intervals import share_of, shares_of
from benchmarks.common.report_files import add_report
from benchmarks.offline.in_turn import (
    NEVER,
    STOCK,
    InTurn,
    hold_back,
    measured,
    noise,
    run_in_turn,
    speed_cells,
)
from benchmarks.offline.resamples import resampled
from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.artifact.requested import Output
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.cli.arguments import names_of
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.calibrate import calibration_of, record_prompts
from vllm_adainfer.offline.calibration.certify.certify import Terms
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.enough_rows import split_of
from vllm_adainfer.offline.calibration.fit import exits
from vllm_adainfer.offline.calibration.fit.probes import Target, fit_probes
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, best_heads
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.prompts import Prompts, load_prompts, right_tokens
from vllm_adainfer.offline.calibration.record.rows import Rows
from vllm_adainfer.offline.calibration.write.policy_artifact import policy_config
from vllm_adainfer.offline.evaluation.by_label import label_rows
from vllm_adainfer.offline.evaluation.promised import bounded_rows, promised_rows
from vllm_adainfer.offline.evaluation.rounds import ROUNDS
from vllm_adainfer.offline.evaluation.run import NEVER_EXIT
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.progress import say
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.shares import clopper_pearson, spelled
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.promise.gates import Gate, Gates
from vllm_adainfer.promise.tolerance import Tolerance

GATES = (0.8, 0.9, 0.95)
TOLERANCES = (0.1, 0.05)
RECALL = 0.01


@errors_as_sentences
def main(
    model: Annotated[str, typer.Option()],
    data: Annotated[Path, typer.Option(help="Rows, with right labels.")],
    title: Annotated[str, typer.Option(help="Name of the task.")],
    labels: Annotated[str, typer.Option()],
    template: Annotated[str | None, typer.Option()] = None,
    test: Annotated[int, typer.Option(help="Prompts that calibrate nothing.")] = 600,
    epsilon: Annotated[float, typer.Option()] = 0.02,
    rounds: Annotated[int, typer.Option(help="Of stock and all policies, in turn.")] = ROUNDS,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/promises.json"),
) -> None:
    """Calibrate, measure, and add the task to the JSON and the Markdown of `output`."""
    with tempfile.TemporaryDirectory() as folder:
        request = CalibrationRequest(
            model=model,
            data=data,
            output=Path(folder),
            template=template,
            labels=names_of(labels),
            probe="pooled-label-head",
            options=PolicyOptions(epsilon=epsilon),
        )
        prompts, tests = hold_back(load_prompts(request), request, test)
        recording = record_prompts(request, prompts)
        with patch.object(exits, "fit_probes", fit_probes_once()):
            policies = made_policies(request, prompts, recording)
            drawn = {promise: resampled(one, tests) for promise, one in policies.items()}
        rows = measure_all(request, prompts, tests, policies, Path(folder), rounds)
        rows = [row | drawn[row["promise"]] for row in rows]
    report = {
        "task": title,
        "model": Path(model).name,
        "epsilon": epsilon,
        "prompts": len(prompts.examples) - len(tests),
        "test": len(tests),
        "policies": rows,
        "provenance": provenance(),
    }
    add_report(output, report, lambda reports: "\n".join(map(table, reports)))


def promises(options: PolicyOptions, labels: Sequence[str]) -> dict[str, PolicyOptions]:
    """The options of each policy, by what it promises."""
    last = labels[-1]
    found = {"the best label": options}
    for tolerance in TOLERANCES:
        found[f"each probability within {tolerance:g}"] = replace(
            options, promise=Tolerance(tolerance=tolerance)
        )
    for name, label in ((f"P({last})", last), ("the best label's P", None)):
        for number in GATES:
            gate = Gate(label=label, probability=number)
            found[f"{name} on its side of {number:g}"] = replace(
                options, promise=Gates(gates=(gate,))
            )
    for label in labels:
        recall = LabelBound(kind="recall", label=label, epsilon=RECALL)
        found[f"recall of {label}, {RECALL:.0%}"] = replace(options, label_bounds=(recall,))
    for label in labels:
        found[f"{label} never early"] = replace(options, never_early=(label,))
    return found


def fit_probes_once() -> Callable[..., tuple[Probe, Sequence[Probe]]]:
    """`fit_probes` that fits each probe of one recording once, however many promises it serves.

    A probe does not depend on the promise, only on what it predicts: labels or probabilities.
    """
    found: dict[Hashable, tuple[Probe, Sequence[Probe]]] = {}

    def fit(
        recording: Rows, target: Target, where: Ints, layer: int, folds: Ints
    ) -> tuple[Probe, Sequence[Probe]]:
        key = target.kind, target.full_depth is None, where.tobytes(), layer
        if key not in found:
            found[key] = fit_probes(recording, target, where, layer, folds)
        return found[key]

    return fit


def made_policies(
    request: CalibrationRequest, prompts: Prompts, recording: Rows
) -> dict[str, FittedPolicy]:
    """The policy of each promise that can be certified and pays."""
    policies = {}
    names = [label.name for label in prompts.output.labels]
    groups = prompts.split.groups
    calibrating = groups[: len(prompts.split.fit) + len(prompts.split.certify)]
    for promise, options in promises(request.options, names).items():
        split = replace(split_of(calibrating, options), groups=groups)
        own = replace(prompts, split=split)
        calibration = calibration_of(replace(request, options=options), own, recording)
        try:
            for test in Terms(calibration).tests:
                test.check(recording.tokens[calibration.held_out])
        except AdaInferError as error:
            say(f"{promise}: {error}")
            continue
        policy = best_heads(calibration, request.probe)
        if options.epsilon not in policy.points:
            say(f"{promise}: nothing is certified")
        elif (
            isinstance(options.promise, Tolerance)
            and not policy.calibration.target.promise.covers_mass
        ):
            say(f"{promise}: without the label mass, which this engine's requests read")
        else:
            policies[promise] = policy
    return policies


def measure_all(
    request: CalibrationRequest,
    prompts: Prompts,
    tests: Ints,
    policies: Mapping[str, FittedPolicy],
    folder: Path,
    rounds: int,
) -> list[dict[str, Any]]:
    """Run stock and each policy, in turn, on the prompts that calibrated nothing."""
    hf_config, tokenizer = load_config_and_tokenizer(request.model)
    examples = [prompts.examples[place] for place in tests.tolist()]
    rights = right_tokens(examples, prompts.output.labels, tokenizer)
    by_name = {f"policy-{number}": one for number, one in enumerate(policies.values())}
    found = run_in_turn(request, by_name, examples, folder, rounds)
    rows = []
    for promise, (name, policy) in zip(policies, by_name.items(), strict=True):
        config = policy_config(policy, "", hf_config)
        rows.append(
            {
                "promise": promise,
                "exit_points": [exit.layer for exit in policy.exits],
                **measured(found, name, Output.of_config(config).form, rights),
                **wrong(found, name, config, examples),
            }
        )
    return rows


def wrong(
    run: InTurn, name: str, config: ArtifactConfig, examples: Sequence[Example]
) -> dict[str, Any]:
    """How often a policy's answers break its promise."""
    kind, groups = Output.of_config(config).form, np.arange(len(examples))
    ours, never = run.whole[name, kind], run.whole[NEVER, kind]
    if not config.promise.reads_probabilities:
        changed = sum(a != b for a, b in zip(ours.texts, never.texts, strict=True))
        found: dict[str, Any] = {
            "wrong": changed / len(examples),
            "wrong_95": clopper_pearson(changed, len(examples)),
        }
        if config.label_bounds:
            [promise] = config.label_bounds
            labels = label_rows(config, examples, groups, ours.texts, never.texts)
            found["label"] = next(row for row in labels if row["label"] == promise.label)
        return found
    by_epsilon = {level.epsilon: ours for level in config.levels} | {NEVER_EXIT: never}
    pairs = [(run.whole[STOCK, kind], by_epsilon)]
    levels = bounded_rows(promised_rows(config, examples, groups, pairs))
    assert levels is not None
    return {key: levels[0][key] for key in ("wrong", "wrong_95")}


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row per promise."""
    rows = []
    for one in report["policies"]:
        broken = spelled(one["wrong"], tuple(one["wrong_95"]))
        if "label" in one:
            recall, (low, high) = one["label"]["recall"], one["label"]["recall_95"]
            broken += f"; of {one['label']['label']} {spelled(1 - recall, (1 - high, 1 - low))}"
        rows.append(
            {
                "promise": one["promise"],
                "exit points": ", ".join(map(str, one["exit_points"])),
                "layers saved (95 %)": share_of(one["layers_saved"], report["test"]),
                **speed_cells(one),
                "broken (95 %)": broken,
                "accuracy, stock / ours (95 %)": shares_of(
                    one["stock_accuracy"], one["accuracy"], report["test"]
                ),
                "resamples that break it": f"{one['resamples_over']} of {one['resamples']}",
            }
        )
    head = (
        f"{report['task']}: {report['prompts']} prompts calibrate, {report['test']} test; epsilon "
        f"{report['epsilon']:.0%}; {report['provenance']['cpu']}. "
    )
    told = f"{head}{noise(report['policies'])}".strip() if report["policies"] else head
    return f"{told}\n\n{markdown_table(rows, text_columns=2)}\n"


if __name__ == "__main__":
    typer.run(main)
