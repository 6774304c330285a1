"""Tables of `docs/results.md` that are made from reports, by task, promise and model family."""

from __future__ import annotations

from benchmarks.common.intervals import share_of, shares_of
from benchmarks.front_page import RESULTS, load, of_bound
from benchmarks.results_summary import middle, ratio_of
from vllm_adainfer.offline.facts.document import markdown_grid, markdown_table

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


def workloads() -> list[str]:
    """A row per report of `evaluate`."""
    rows = []
    for name, title in REPORTS.items():
        report = load(name)
        stock, ours = report["stock"], report["adainfer"]
        rows.append(
            {
                "workload": title,
                "prompts": f"{report['n']} x {report['prompt_tokens_mean']:.0f} tokens",
                "stock, requests/s": f"{stock['requests_per_second']:.1f}",
                "ours, requests/s": f"{ours['requests_per_second']:.1f}",
                "speed-up": f"**{report['speedup']:.2f}x**",
                "layers saved (95 %)": share_of(report["layers_saved"], report["n"], 0),
                "disagreement (95 %)": of_bound(
                    report["disagreement"], report["n"], report["epsilon"]
                ),
                "differs from stock (95 %)": share_of(
                    report["disagreement_with_stock"], report["n"]
                ),
                "accuracy, stock / ours (95 %)": shares_of(
                    stock["accuracy"], ours["accuracy"], report["n"]
                ),
                "efficiency": f"{report['efficiency']:.2f}",
            }
        )

    return [markdown_table(rows)]


def suite_table(name: str) -> list[str]:
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
        f"{SUITES[name]}, epsilon {report['epsilon']:g} at delta {report['delta']:g}, "
        f"{report['provenance']['cpu']}:",
        "",
        markdown_grid(columns, rows),
    ]


def families_table() -> list[str]:
    """OPT and Llama, as small models that the benchmark trains."""
    report = next(iter(load("families").values()))
    table = (RESULTS / "families.md").read_text().splitlines()
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
        *(RESULTS / "long_prompts.md").read_text().splitlines(),
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
        *(RESULTS / "recurrent.md").read_text().splitlines(),
    ]


def probabilities_table() -> list[str]:
    """Policies for label probabilities."""
    report, *_ = load("probabilities")
    return [
        "Label probabilities, fine-tuned SmolLM2-135M, epsilon "
        f"{report['epsilon']:g} at delta {report['delta']:g}. The bound covers answers that change "
        "and probabilities that move by more than the tolerance. Stock's own probabilities also "
        "move, by rounding:",
        "",
        *(RESULTS / "probabilities.md").read_text().splitlines(),
    ]


def choices_table() -> list[str]:
    """Choices over HTTP, with one policy each."""
    report = load("choices_exits")
    rows = []
    for case in report["cases"]:
        compared = case["compared"]
        cells = [
            f"{middle(case, 'stock', key):.1f} / {middle(case, 'adainfer', key):.1f} "
            f"(**{ratio_of(case, key):.2f}x**)"
            for key in ("requests_per_second", "p50_ms", "p99_ms")
        ]
        differ = share_of(case["differ"] / compared, compared)
        rows.append([case["title"], *cells, share_of(case["layers_saved"], compared), differ])
    columns = [
        "choices",
        "requests/s, all at once",
        "p50 latency alone, ms",
        "p99, ms",
        "layers saved (95 %)",
        "texts that differ from stock (95 %)",
    ]
    return [
        "Requests with [`structured_outputs.choice`](choices.md) over HTTP, stock / ours, three "
        "policies in one server ([more](../benchmarks/README.md#requests-with-a-choice)):",
        "",
        markdown_grid(columns, rows),
    ]
