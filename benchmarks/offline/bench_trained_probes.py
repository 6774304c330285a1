r"""A student before the first layer, and branches: what each adds to exits, under one bound.

    .venv/bin/python benchmarks/offline/bench_trained_probes.py --model MODEL --title CR \
        --data rows.jsonl --template $'Review: {text}\nSentiment:' --labels negative,positive

The prompts are recorded once. The last `--test` of them, in random order, calibrate nothing. They
are run once for the answers, then a third of them in each of many rounds, in which stock vLLM runs
twice and everything else once, in turn.

What `calibrate` chooses has an engine of its own, as its users have it: quote that row. All other
policies share an engine, which is cut at the exit points of all of them and costs each a little.
Their exit points are chosen as if the student took no time, so that it is in its policies also
where it costs more than it saves. `--only-chosen` leaves them out. `--slow 2` puts an idle layer
after each layer of the model: the answers stay, a layer takes as long as before, and there are
twice as many.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer

from benchmarks.common.intervals import share_of, shares_of
from benchmarks.common.minilm import fetch_minilm
from benchmarks.common.report_files import add_report
from benchmarks.offline.in_turn import hold_back, measured, noise, run_in_turn, speed_cells
from benchmarks.offline.resamples import resampled
from benchmarks.offline.slow_model import with_idle_layers
from vllm_adainfer.artifact.requested import Form
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.cli.arguments import names_of
from vllm_adainfer.offline.calibration import fit_policy
from vllm_adainfer.offline.calibration.calibrate import calibration_of, record_prompts
from vllm_adainfer.offline.calibration.fit import cost
from vllm_adainfer.offline.calibration.fit.branches import branches_of, layers_to_branch
from vllm_adainfer.offline.calibration.fit.calibration import Calibration, TrainedProbe
from vllm_adainfer.offline.calibration.fit.students import layers_of, train_students
from vllm_adainfer.offline.calibration.fit.training import Lesson
from vllm_adainfer.offline.calibration.fit_policy import (
    FittedPolicy,
    best_heads,
    make_policy,
)
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.prompts import (
    Prompts,
    load_prompts,
    right_tokens,
)
from vllm_adainfer.offline.calibration.record.rows import OwnStates
from vllm_adainfer.offline.evaluation.rounds import ROUNDS
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.progress import say
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.shares import spelled

CACHE = Path(__file__).parents[2] / ".cache"
ROWS_IN_A_STEP = 64
CHOSEN, EXITS, STUDENT, BOTH, BRANCHES, ALL = (
    "chosen",
    "exits",
    "student",
    "both",
    "branches",
    "all",
)
TITLES = {
    CHOSEN: "what `calibrate` chooses, in an engine of its own",
    EXITS: "exits",
    STUDENT: "student alone",
    BOTH: "student and exits",
    BRANCHES: "exits, some with branches",
    ALL: "student and exits, some with branches",
}


@errors_as_sentences
def main(
    model: Annotated[str, typer.Option()],
    data: Annotated[Path, typer.Option(help="Rows or requests, with right labels.")],
    title: Annotated[str, typer.Option(help="Name of the task.")],
    student: Annotated[
        str, typer.Option(help="Directory or hub id of an encoder; by default MiniLM, fetched.")
    ] = "",
    template: Annotated[str | None, typer.Option()] = None,
    labels: Annotated[str, typer.Option()] = "",
    label_pool: Annotated[str, typer.Option()] = "",
    test: Annotated[int, typer.Option(help="Prompts that calibrate nothing.")] = 600,
    slow: Annotated[int, typer.Option(min=1, help="Layers for each of the model's.")] = 1,
    epsilon: Annotated[float, typer.Option()] = 0.02,
    rounds: Annotated[int, typer.Option(help="Of stock and all policies, in turn.")] = ROUNDS,
    only_chosen: Annotated[
        bool, typer.Option("--only-chosen", help="Only what `calibrate` chooses.")
    ] = False,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/trained_probes.json"),
) -> None:
    """Calibrate, measure, and add the task to the JSON and the Markdown of `output`."""
    with tempfile.TemporaryDirectory() as folder:
        if slow > 1:
            model = str(with_idle_layers(Path(model), Path(folder, "slow"), slow))
        request = CalibrationRequest(
            model=model,
            data=data,
            output=Path(folder, "policy"),
            template=template,
            labels=names_of(labels),
            label_pool=names_of(label_pool),
            student=student or str(fetch_minilm(CACHE / "all-MiniLM-L6-v2")),
            options=PolicyOptions(epsilon=epsilon),
        )
        made = made_policies(request, test, only_chosen)
        measured = measure_all(request, made, Path(folder), rounds)
    report = {
        "task": title,
        "model": Path(model).name,
        "slow": slow,
        "epsilon": epsilon,
        "prompts": len(made.prompts.examples) - len(made.tests),
        "test": len(made.tests),
        "policies": measured,
        "provenance": provenance(),
    }
    keys = "task", "slow", "prompts"
    add_report(output, report, lambda reports: "\n".join(map(table, reports)), keys)


@dataclass(frozen=True)
class Made:
    """The policies of one task, by name.

    The prompts have the split of those that calibrate; `tests` [tests] are the others. The
    student's time is that of a prompt.
    """

    prompts: Prompts
    tests: Any
    policies: Mapping[str, FittedPolicy]
    student_seconds: float


def made_policies(request: CalibrationRequest, test: int, only_chosen: bool) -> Made:
    """Record all prompts, and make the policies from all but the last ones."""
    prompts, tests = hold_back(load_prompts(request), request, test)
    assert prompts.student is not None
    recording = record_prompts(request, prompts)
    plain = calibration_of(request, prompts, recording)
    trained: dict[tuple[int, ...], tuple[TrainedProbe, ...]] = {}

    @cache
    def states_after(layers: tuple[int, ...]) -> OwnStates | None:
        return record_prompts(request, prompts, layers).own_states

    def branches_once(
        calibration: Calibration, states: OwnStates, layers: Sequence[int] | None = None
    ) -> tuple[TrainedProbe, ...]:
        wanted = tuple(states.rows if layers is None else layers)
        if wanted not in trained:
            trained[wanted] = branches_of(calibration, states, wanted)
        return trained[wanted]

    with patch.object(fit_policy, "branches_of", branches_once):
        chosen = fit_policy.fit_policy(
            plain, request.probe, prompts.student, lambda layers: states_after(tuple(layers))
        )
    time_of, all_rows = cost.trained_seconds, np.arange(ROWS_IN_A_STEP)
    policies = {CHOSEN: chosen}
    if only_chosen:
        seconds = 0.0 if chosen.student is None else chosen.costs.probe[0]
        return Made(prompts, tests, policies, seconds)
    student = chosen.student
    if student is None:
        [student] = train_students(prompts.student, Lesson.of(plain), [layers_of(prompts.student)])
    seconds = time_of(student, recording, all_rows)
    exits, branches = best_heads(plain, "pooled-label-head"), tuple[TrainedProbe, ...]()
    if layers := layers_to_branch(exits.exits):
        states = states_after(tuple(layers))
        assert states is not None
        branches = branches_once(plain, states)
    both = replace(plain, trained=(student,))

    def seconds_of(trained: TrainedProbe, *rest: Any) -> float:
        return 0.0 if trained is student else time_of(trained, *rest)

    with patch.object(cost, "trained_seconds", seconds_of):
        policies |= {
            EXITS: exits,
            STUDENT: make_policy(alone(both), []),
            BOTH: make_policy(both, exits.candidates),
            BRANCHES: make_policy(replace(plain, trained=branches), exits.candidates),
            ALL: make_policy(replace(plain, trained=(student, *branches)), exits.candidates),
        }
    return Made(prompts, tests, policies, seconds)


def alone(calibration: Calibration) -> Calibration:
    """`calibration` for a student without exits behind it."""
    target = replace(calibration.target, kind="label-head")
    options = replace(calibration.options, exit_points=(0,))
    return replace(calibration, target=target, options=options, pooled_from=None)


def measure_all(
    request: CalibrationRequest, made: Made, folder: Path, rounds: int
) -> list[dict[str, Any]]:
    """Run stock and each policy, in turn, on the prompts that calibrated nothing."""
    epsilon = request.options.epsilon
    certified = {name: one for name, one in made.policies.items() if epsilon in one.points}
    for name in made.policies.keys() - certified.keys():
        say(f"{name}: nothing is certified")
    examples = [made.prompts.examples[place] for place in made.tests.tolist()]
    _, tokenizer = load_config_and_tokenizer(request.model)
    rights = right_tokens(examples, made.prompts.output.labels, tokenizer)
    alone = CHOSEN if CHOSEN in certified else None
    found = run_in_turn(request, certified, examples, folder, rounds, alone)
    return [
        {
            "name": name,
            "exit_points": [exit.layer for exit in policy.exits],
            "branches": list(policy.branches),
            "trained_ms": {
                exit.layer: 1e3
                * (policy.costs.probe_of(exit) if exit.layer else made.student_seconds)
                for exit in policy.exits
                if exit.probe.encoder is not None
            },
            "expected_ms": {part: 1e3 * s for part, s in policy.expected.items()},
            **measured(found, name, Form.TOKEN, rights),
            **resampled(policy, made.tests),
        }
        for name, policy in certified.items()
    ]


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a row per policy."""
    policies = report["policies"]
    rows = [
        {
            "policy": TITLES[one["name"]],
            "exit points (b: branch)": ", ".join(
                f"{layer}{'b' * (layer in one['branches'])}" for layer in one["exit_points"]
            ),
            "settled at 0 (95 %)": share_of(one["settled_at_0"], report["test"], 0),
            "layers saved (95 %)": share_of(one["layers_saved"], report["test"]),
            **speed_cells(one),
            "answers that differ (95 %)": spelled(
                one["changed"] / report["test"], tuple(one["changed_95"])
            ),
            "accuracy, stock / ours (95 %)": shares_of(
                one["stock_accuracy"], one["accuracy"], report["test"]
            ),
            "trained probes, ms a prompt": ", ".join(
                f"{ms:.1f}" for ms in one["trained_ms"].values()
            )
            or "-",
            "resamples over the bound": f"{one['resamples_over']} of {one['resamples']}",
        }
        for one in policies
    ]
    slow = f", {report['slow']} times as many layers" if report["slow"] > 1 else ""
    head = (
        f"{report['task']}{slow}: {report['prompts']} prompts calibrate, {report['test']} test; "
        f"epsilon {report['epsilon']:.0%}; {report['provenance']['cpu']}"
    )
    if not policies:
        return f"{head}. Nothing is certified.\n"
    told = (
        f"{head}; stock {policies[0]['stock_prompts_per_second']:.0f} prompts/s; full depth "
        f"{policies[0]['expected_ms']['full_depth']:.1f} ms a prompt. {noise(policies)}"
    )
    return f"{told.strip()}\n\n{markdown_table(rows, text_columns=2)}\n"


if __name__ == "__main__":
    typer.run(main)
