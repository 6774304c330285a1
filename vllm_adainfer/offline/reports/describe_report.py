"""Evaluation reports as text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_adainfer.offline.reports.shares import share_in, spelled
from vllm_adainfer.offline.tables import text_table


def describe_report(report: Mapping[str, Any]) -> str:
    """Both engines of an evaluation report, and every certified bound."""
    ours, never = report["adainfer"], report["never_exit"]
    engines = [
        [
            name,
            f"{engine['requests_per_second']:.1f}",
            f"{engine['tokens_per_second']:.0f}",
            "-" if engine["accuracy"] is None else share_in(engine, "accuracy"),
            f"{layers_run:.1f}",
        ]
        for name, engine, layers_run in (
            ("stock vLLM", report["stock"], report["layers_total"]),
            ("vllm-adainfer", ours, ours["layers_run_mean"]),
        )
    ]
    levels = [
        [
            f"{level['epsilon']:.1%}",
            f"{level['speedup']:.2f}x",
            f"{level['layers_saved']:.1%}",
            share_in(level, "disagreement"),
            share_in(level, "disagreement_with_stock"),
            f"{level['efficiency']:.2f}",
            level.get("verdict", "-").split()[0],
        ]
        for level in report["levels"]
    ]
    differs = share_in(never, "disagreement_with_stock")
    levels.append(["never exit", f"{never['speedup']:.2f}x", "0.0%", "0.0%", differs, "-", "-"])
    columns = [
        *("bound", "speedup", "layers saved", "disagreement"),
        *("differs from stock", "efficiency", "measured"),
    ]
    exits = ", ".join(
        f"{layer}: {spelled(share, ours['exit_histogram_95'][layer], 0)}"
        for layer, share in ours["exit_histogram"].items()
    )
    parts = [
        f"{report['n']} prompts of {report['prompt_tokens_mean']:.0f} tokens on average, "
        f"{report['model']} ({report['layers_total']} layers)",
        text_table(["engine", "requests/s", "tokens/s", "accuracy", "layers run"], engines, 1),
        text_table(columns, levels),
        "Never exit: the cost of the segments, and how often their rounding changes an answer.",
        f"Requests by layers run: {exits}",
        "In brackets: 95 % intervals, for prompts like these. Measured: the share is within the "
        "bound, compatible with it (the interval includes the bound) or above it.",
    ]
    if "by_label" in report:
        parts += _labels(report["by_label"])
    if "gates" in report:
        parts += _gates(report["gates"])
    if "queries" in report:
        parts += _queries(report["queries"])
    if "probabilities" in report:
        parts += _probabilities(report)
    return "\n\n".join(parts) + "\n"


def _labels(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Recall and precision of each label."""
    shares = ["recall", "precision"]
    if any("true_recall" in row for row in rows):
        shares += ["true_recall", "true_precision"]
    cells = [
        [
            row["label"],
            str(row["full_depth"]),
            str(row["answered"]),
            *("-" if row[name] is None else share_in(row, name) for name in shares),
            ", ".join(f"{kind} {said.split()[0]}" for kind, said in row["verdicts"].items()) or "-",
        ]
        for row in rows
    ]
    columns = [name.replace("true_", "true ") for name in shares]
    text = (
        "Recall and precision compare with full depth: how many of its answers with a label we "
        "give, too, and how many of ours it gives."
    )
    if len(shares) > 2:
        text += " The true ones compare with the labels of the data."
    return [
        text_table(
            ["label", "full depth", "answered", *columns, "promised"], cells, text_columns=1
        ),
        text,
    ]


def _gates(found: Mapping[str, Any]) -> list[str]:
    """How often answers are on the other side of a gate."""
    rows = {
        "stock vLLM": found["stock"],
        **{f"bound {level['epsilon']:.1%}": level for level in found["levels"]},
    }
    cells = [
        [name, share_in(row, "wrong"), *(share_in(one, "differs") for one in row["gates"])]
        for name, row in rows.items()
    ]
    names = [f"{gate['label']} at {gate['probability']:g}" for gate in found["gates"]]
    return [
        text_table(["on the other side of", "any gate", *names], cells, text_columns=1),
        "Compared with never exiting; stock vLLM differs by rounding. The bound is on the share "
        "for any gate.",
    ]


def _queries(found: Mapping[str, Any]) -> list[str]:
    """How often the order of a query's documents changes, and how good the orders are."""
    rows = {
        "stock vLLM": found["stock"],
        "never exit": found["never_exit"],
        **{f"bound {level['epsilon']:.1%}": level for level in found["levels"]},
    }
    cells = [
        [
            name,
            share_in(row, "wrong"),
            share_in(row, "changed"),
            f"{1 - row['ndcg_lost']:.4f}",
            f"{row['ndcg']:.4f}" if "ndcg" in row else "-",
        ]
        for name, row in rows.items()
    ]
    columns = ["lose a document", f"other first {found['k']}", "NDCG@10 of full depth", "of labels"]
    return [
        text_table(
            [f"{found['queries']} queries, {found['documents']} documents", *columns],
            cells,
            text_columns=1,
        ),
        "Compared with never exiting; stock vLLM differs by rounding. A query loses a document if "
        f"one of its first {found['k']} at full depth is not among them, and scored more than "
        f"{found['margin']:g} above the next: the share that the bound is about. NDCG@10 has full "
        "depth's scores as gains, then the labels of the data.",
    ]


def _probabilities(report: Mapping[str, Any]) -> list[str]:
    """How good the probabilities are, and how far exits and rounding move them."""
    found, beyond = report["probabilities"], f"beyond {report['tolerance']:g}"
    rows = {
        "stock vLLM": found["stock"],
        "never exit": found["never_exit"],
        **{f"bound {level['epsilon']:.1%}": level for level in found["levels"]},
    }
    scores = {
        "ece": "ECE",
        "brier": "Brier",
        "label_mass": "label mass",
        "move_mean": "mean move",
        "move_p95": "95th percentile",
        "move_max": "largest",
    }
    cells = [
        [
            name,
            *("-" if row[score] is None else f"{row[score]:.3f}" for score in scores),
            share_in(row, "label_differs"),
            share_in(row, "wrong"),
        ]
        for name, row in rows.items()
    ]
    return [
        text_table(
            ["probabilities", *scores.values(), "best label differs", beyond], cells, text_columns=1
        ),
        "A move is the largest change of a prompt's probabilities, compared with never exiting; "
        f"stock vLLM's moves are rounding. {beyond.capitalize()}: answers that change or move by "
        "more, the share that the bound is about.",
    ]
