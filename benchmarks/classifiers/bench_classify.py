r"""A classifier over `/classify`: a stock server beside one with a policy.

    .venv/bin/python benchmarks/classifiers/bench_classify.py --model MODEL --title SST-2 \
        --data rows.jsonl --template $'Review: {text}\nSentiment:' --labels negative,positive

The classifier is made of MODEL, a causal one: the rows of its LM head for the labels become its
head. The last `--test` rows calibrate nothing. They are sent to both servers in turn: all at once,
and some of them one after the other.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer

from benchmarks.classifiers.label_classifier import label_classifier
from benchmarks.common.intervals import control, share_of, shares_of
from benchmarks.common.report_files import add_report
from benchmarks.serving.bench_choices import layer_rows
from benchmarks.serving.sending import Sent, send
from benchmarks.serving.serve_report import NEVER, OURS, STOCK
from benchmarks.serving.side_by_side import side_by_side
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.cli.arguments import names_of
from vllm_adainfer.offline.calibration.calibrate import calibrate
from vllm_adainfer.offline.calibration.data.examples import read_rows, read_template
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.evaluation.rounds import ROUNDS, in_rounds
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.shares import clopper_pearson, spelled
from vllm_adainfer.offline.reports.speedup import Speedup

PATH = "/classify"
ALONE = 100  # requests that are sent one after the other


@errors_as_sentences
def main(
    model: Annotated[str, typer.Option()],
    data: Annotated[Path, typer.Option(help="Rows, with right labels.")],
    title: Annotated[str, typer.Option(help="Name of the task.")],
    labels: Annotated[str, typer.Option()],
    template: Annotated[str, typer.Option()],
    test: Annotated[int, typer.Option(help="Rows that calibrate nothing.")] = 600,
    epsilon: Annotated[float, typer.Option()] = 0.02,
    repeat: Annotated[int, typer.Option(help="Rounds of both servers.")] = ROUNDS,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/classify.json"),
) -> None:
    """Calibrate, measure, and add the task to the JSON and the Markdown of `output`."""
    rows = [row.fields for row in read_rows(data)]
    render = read_template(template)
    assert render is not None
    with tempfile.TemporaryDirectory() as folder:
        names = names_of(labels)
        made = label_classifier(Path(model), Path(folder, "classifier"), names, template)
        fitting = Path(folder, "rows.jsonl")
        fitting.write_text("".join(json.dumps(row) + "\n" for row in rows[:-test]))
        request = CalibrationRequest(
            model=str(made),
            data=fitting,
            output=Path(folder, "policy"),
            template=template,
            options=PolicyOptions(epsilon=epsilon),
        )
        config = calibrate(request)
        bodies = [{"model": "model", "input": render.format(**row)} for row in rows[-test:]]
        switch = {"artifact": str(request.output)}
        flags = ("--max-model-len", "1024", "--no-enable-prefix-caching")
        with side_by_side(str(made), switch, flags, control=True) as servers:
            measured = measure(servers, bodies, [row["label"] for row in rows[-test:]], repeat)
    report = {
        "task": title,
        "model": Path(model).name,
        "epsilon": epsilon,
        "prompts": len(rows) - test,
        "test": test,
        "exit_points": config.exit_points,
        **measured,
        "provenance": provenance(),
    }
    add_report(output, report, table)


def measure(
    servers: Mapping[str, Any],
    bodies: Sequence[Mapping[str, Any]],
    right: Sequence[str],
    repeat: int,
) -> dict[str, Any]:
    """Send all requests to each server in turn, at once and then some of them alone."""
    for server in servers.values():
        send(server, PATH, bodies[:ALONE])
    before = layer_rows(servers[OURS])
    names = [*servers]
    at_once = in_rounds(names, repeat, lambda name: send(servers[name], PATH, bodies))
    alone = in_rounds(
        names, repeat, lambda name: send(servers[name], PATH, bodies[:ALONE], at_once=1), "alone"
    )
    run, skipped = layer_rows(servers[OURS]) - before
    answers = {name: labels_of(sent[0]) for name, sent in at_once.items()}
    count = len(bodies)
    changed = sum(a != b for a, b in zip(answers[OURS], answers[STOCK], strict=True))
    seconds = {name: [one.seconds for one in sent] for name, sent in at_once.items()}
    return {
        "layers_saved": float(skipped / (run + skipped)),
        **Speedup.of(seconds[STOCK], seconds[OURS]).entries("speedup"),
        **Speedup.of(seconds[STOCK], seconds[NEVER]).entries("never_exit"),
        "requests_per_second": {
            name: count / statistics.median(each) for name, each in seconds.items()
        },
        "seconds_alone": {
            name: float(np.mean([one.latencies for one in sent])) for name, sent in alone.items()
        },
        "changed": changed / count,
        "changed_95": clopper_pearson(changed, count),
        "accuracy": {
            name: sum(a == b for a, b in zip(found, right, strict=True)) / count
            for name, found in answers.items()
        },
    }


def labels_of(sent: Sent) -> list[str]:
    """The label that each reply names."""
    return [reply["data"][0]["label"] for reply in sent.answers]


def table(reports: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row per task."""
    rows = []
    for one in reports:
        stock, ours = (1000 * one["seconds_alone"][name] for name in (STOCK, OURS))
        rows.append(
            {
                "task": one["task"],
                "prompts that calibrate": str(one["prompts"]),
                "layers saved (95 %)": share_of(one["layers_saved"], one["test"]),
                "speed-up, all at once (95 %)": Speedup.read(one, "speedup").bold,
                "never exiting (95 %)": control(Speedup.read(one, "never_exit")),
                "alone, mean, stock / ours": f"{stock:.0f} / {ours:.0f} ms",
                "other label (95 %)": spelled(one["changed"], tuple(one["changed_95"])),
                "accuracy, stock / ours (95 %)": shares_of(
                    one["accuracy"][STOCK], one["accuracy"][OURS], one["test"]
                ),
            }
        )

    first = reports[0]
    return (
        f"{first['test']} prompts test; epsilon {first['epsilon']:.0%}; "
        f"{first['provenance']['cpu']}\n\n"
        f"{markdown_table(rows, text_columns=1)}\n"
    )


if __name__ == "__main__":
    typer.run(main)
