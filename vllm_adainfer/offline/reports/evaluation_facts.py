"""The facts about an evaluation: both engines, and every certified bound."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vllm_adainfer.offline.facts.document import Block, Facts, Table
from vllm_adainfer.offline.reports.shares import share_in, spelled
from vllm_adainfer.offline.reports.speedup import Speedup, doubt

Row = Mapping[str, Any]
SCORES = {
    "ece": "ECE",
    "brier": "Brier",
    "label_mass": "label mass",
    "move_mean": "mean move",
    "move_p95": "95th percentile",
    "move_max": "largest",
}


def evaluation_facts(report: Mapping[str, Any]) -> list[Block]:
    """The measurements of an evaluation."""
    ours, stock = report["adainfer"], report["stock"]
    layers = report["layers_total"]
    exits = ", ".join(
        f"{layer}: {spelled(share, ours['exit_histogram_95'][layer], 0)}"
        for layer, share in ours["exit_histogram"].items()
    )
    costs = "drafts alone, in segments" if "by_field" in report else "the cost of the segments"
    about: dict[str, Callable[[Any], Iterable[Block]]] = {
        "by_field": lambda found: facts_of_fields(found, report),
        "by_label": facts_of_labels,
        "gates": facts_of_gates,
        "queries": _queries,
        "probabilities": lambda found: _probabilities(found, report["tolerance"]),
    }
    return [
        f"{report['n']} prompts of {report['prompt_tokens_mean']:.0f} tokens on average, "
        f"{report['model']} ({layers} layers)",
        Table(
            [
                _engine("stock vLLM", stock, layers),
                _engine("vllm-adainfer", ours, ours["layers_run_mean"]),
            ],
            text_columns=1,
        ),
        Table([*map(level_facts, report["levels"]), _never_exit(report["never_exit"])]),
        f"Never exit: {costs}, and how often their rounding changes an answer.",
        *_rounding(report),
        *told_of_noise(report),
        f"Requests by layers run: {exits}",
        "In brackets: 95 % intervals, for prompts like these. Measured: the share is within the "
        "bound, compatible with it (the interval includes the bound) or above it.",
        *(one for name, facts in about.items() if report.get(name) for one in facts(report[name])),
    ]


def _rounding(report: Row) -> list[str]:
    """What shares compare, and how often rounding alone changes an answer."""
    if "rounding" not in report:
        return []
    told = f"Two passes of stock vLLM differ in {share_in(report, 'rounding')} of the answers."
    if "queries" in report:
        return [f"Shares compare two passes, and rounding counts. {told}"]
    return [
        "The share that a bound is about compares early answers with full depth in the same pass. "
        f"All others compare two passes, and rounding counts. {told}"
    ]


def told_of_noise(report: Row) -> list[str]:
    """Why the speed-ups tell too little, if they do."""
    found = doubt(*(Speedup.read(one, "speedup") for one in (report, report["never_exit"])))
    return [] if found is None else [found]


def _engine(name: str, engine: Row, layers_run: float) -> Facts:
    return {
        "engine": name,
        "requests/s": f"{engine['requests_per_second']:.1f}",
        "tokens/s": f"{engine['tokens_per_second']:.0f}",
        "accuracy": _share_or_dash(engine, "accuracy"),
        "layers run": f"{layers_run:.1f}",
    }


def level_facts(level: Row) -> Facts:
    """The measurements at one bound."""
    return {
        "bound": f"{level['epsilon']:.1%}",
        "speedup": Speedup.read(level, "speedup").text,
        "layers saved": f"{level['layers_saved']:.1%}",
        "disagreement": share_in(level, "disagreement"),
        "differs from stock": share_in(level, "disagreement_with_stock"),
        "efficiency": f"{level['efficiency']:.2f}",
        "measured": level.get("verdict", "-").split()[0],
    }


def _never_exit(never: Row) -> Facts:
    zero = {"disagreement": 0.0, "disagreement_95": (0.0, 0.0), "epsilon": 0, "layers_saved": 0}
    return {
        **level_facts({**zero, "efficiency": 0, **never}),
        "bound": "never exit",
        "disagreement": "0.0%",
        "efficiency": "-",
    }


def _share_or_dash(row: Row, name: str) -> str:
    return "-" if row[name] is None else share_in(row, name)


def facts_of_fields(rows: Sequence[Row], report: Row) -> tuple[Table, str]:
    """How often each field of an object differs, and its text."""
    table = [
        {
            "field": row["field"],
            "differs from full depth": share_in(row, "differs"),
            **{
                SCORES[name]: "-" if row[name] is None else f"{row[name]:.3f}"
                for name in ("move_mean", "move_max", "ece")
                if name in row
            },
        }
        for row in rows
    ]
    text = (
        "The bound is on objects of which any field differs. Their texts, with white space, differ "
        f"in {share_in(report, 'text_differs')} of the answers."
    )
    if "ece" in rows[0]:
        text += (
            " A move is the largest change of a probability in a field, compared with never "
            "exiting; ECE compares with the objects in the labels of the data."
        )
    return Table(table, text_columns=1), text


def facts_of_labels(rows: Sequence[Row]) -> tuple[Table, str]:
    """Recall and precision of each label."""
    shares = ["recall", "precision"]
    text = (
        "Recall and precision compare with full depth: how many of its answers with a label we "
        "give, too, and how many of ours it gives."
    )
    if any("true_recall" in row for row in rows):
        shares += ["true_recall", "true_precision"]
        text += " The true ones compare with the labels of the data."
    table = [
        {
            "label": row["label"],
            "full depth": str(row["full_depth"]),
            "answered": str(row["answered"]),
            **{name.replace("_", " "): _share_or_dash(row, name) for name in shares},
            "promised": ", ".join(
                f"{kind} {verdict.split()[0]}" for kind, verdict in row["verdicts"].items()
            )
            or "-",
        }
        for row in rows
    ]
    return Table(table, text_columns=1), text


def _compared(found: Row, heading: str, facts: Callable[[Row], Facts]) -> Table:
    """A row for stock vLLM, for never exiting where that is not the measure, and for each bound."""
    rows = {"stock vLLM": found["stock"]}
    if "never_exit" in found:
        rows["never exit"] = found["never_exit"]
    rows |= {f"bound {level['epsilon']:.1%}": level for level in found["levels"]}
    return Table([{heading: name, **facts(row)} for name, row in rows.items()], text_columns=1)


def facts_of_gates(found: Row) -> tuple[Table, str]:
    """How often answers are on the other side of a gate."""
    names = [f"{gate['label']} at {gate['probability']:g}" for gate in found["gates"]]

    def facts(row: Row) -> Facts:
        each = [share_in(gate, "differs") for gate in row["gates"]]
        return {"any gate": share_in(row, "wrong"), **dict(zip(names, each, strict=True))}

    text = (
        "Compared with never exiting; stock vLLM differs by rounding. The bound is on the share "
        "for any gate."
    )
    return _compared(found, "on the other side of", facts), text


def _queries(found: Row) -> list[Block]:
    """How often the order of a query's documents changes, and how good the orders are."""
    return [
        _compared(
            found,
            f"{found['queries']} queries, {found['documents']} documents",
            lambda row: {
                "lose a document": share_in(row, "wrong"),
                f"other first {found['k']}": share_in(row, "changed"),
                "NDCG@10 of full depth": f"{1 - row['ndcg_lost']:.4f}",
                "of labels": f"{row['ndcg']:.4f}" if "ndcg" in row else "-",
            },
        ),
        "Compared with never exiting; stock vLLM differs by rounding. A query loses a document if "
        f"one of its first {found['k']} at full depth is not among them, and scored more than "
        f"{found['margin']:g} above the next: the share that the bound is about. NDCG@10 has full "
        "depth's scores as gains, then the labels of the data.",
    ]


def _probabilities(found: Row, tolerance: float) -> list[Block]:
    """How good the probabilities are, and how far exits and rounding move them."""

    def facts(row: Row) -> Facts:
        scores = {
            heading: "-" if row[name] is None else f"{row[name]:.3f}"
            for name, heading in SCORES.items()
        }
        differs, wrong = share_in(row, "label_differs"), share_in(row, "wrong")
        return {**scores, "best label differs": differs, f"beyond {tolerance:g}": wrong}

    return [
        _compared(found, "probabilities", facts),
        "A move is the largest change of a prompt's probabilities, compared with never exiting; "
        f"stock vLLM's moves are rounding. Beyond {tolerance:g}: answers that change or move by "
        "more, the share that the bound is about.",
    ]
