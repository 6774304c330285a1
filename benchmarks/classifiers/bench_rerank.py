r"""A reranker over `/rerank`: a stock server beside servers with policies, query by query.

    .venv/bin/python benchmarks/classifiers/bench_rerank.py --model RERANKER --data DIR

RERANKER is what `train_reranker.py` wrote; DIR holds boolq and squad. Questions of the test parts,
which the model has not seen, are reranked: what TF-IDF finds among all passages of these parts. The
first `--calibrate` of them calibrate, without labels. The others are sent to all servers in turn,
one query at a time, by one client.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer
from sklearn.metrics import ndcg_score

from benchmarks.classifiers.passages import Query, find_candidates
from benchmarks.classifiers.train_reranker import TEMPLATE_FILE
from benchmarks.common.intervals import share_of
from benchmarks.common.report_files import write_report
from benchmarks.common.server import Server, serving
from benchmarks.serving.bench_choices import layer_rows
from benchmarks.serving.label_requests import post
from benchmarks.serving.serve_report import NEVER
from benchmarks.serving.side_by_side import ENVIRONMENT, SAVES_NOTHING
from vllm_adainfer.arrays import Floats
from vllm_adainfer.cli.app import errors_as_sentences
from vllm_adainfer.offline.calibration.calibrate import fit_and_certify, record_prompts
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.prompts import load_prompts
from vllm_adainfer.offline.facts.document import markdown_table
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.shares import clopper_pearson, spelled
from vllm_adainfer.offline.reports.speedup import Speedup
from vllm_adainfer.promise.first_documents import FirstDocuments, ranked
from vllm_adainfer.promise.tolerance import Tolerance

STOCK = "stock"
NDCG_AT = 10
DOCUMENTS = (20, 50)
WARM_UP = 3


@errors_as_sentences
def main(
    model: Annotated[Path, typer.Option()],
    data: Annotated[Path, typer.Option(help="Directory with boolq and squad.")],
    calibrate: Annotated[int, typer.Option(help="Queries that calibrate.")] = 500,
    test: Annotated[str, typer.Option(help="Queries with 20 and with 50 documents.")] = "200,100",
    epsilon: Annotated[float, typer.Option()] = 0.02,
    margin: Annotated[float, typer.Option()] = 0.05,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/rerank.json"),
) -> None:
    """Calibrate, measure, and write the JSON and the Markdown of `output`."""
    queries = find_candidates(data, "test", DOCUMENTS[-1])
    promise = FirstDocuments(k=5, margin=margin)
    reads = PolicyOptions(epsilon=epsilon)
    promises = {
        f"first 5, margin {margin:g}": replace(reads, promise=promise),
        f"each score within {margin:g}": replace(reads, promise=Tolerance(tolerance=margin)),
    }
    counts = dict(zip(DOCUMENTS, map(int, test.split(",")), strict=True))
    report: dict[str, Any] = {"epsilon": epsilon, "k": promise.k, "margin": margin, "sizes": []}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        report |= make_policies(model, queries[:calibrate], promises, Path(folder))
        servers = start(stack, model, [*promises], Path(folder))
        tests = queries[calibrate:]
        for documents, count in counts.items():
            chosen = [first(query, documents) for query in tests[:count]]
            report["sizes"].append(measure(servers, chosen, promise))
    report["provenance"] = provenance()
    write_report(output, report, table(report))


def make_policies(
    model: Path,
    queries: Sequence[Query],
    promises: Mapping[str, PolicyOptions],
    folder: Path,
) -> dict[str, Any]:
    """Record the pairs once, and write a policy for each promise to `folder`."""
    rows = [{"query": one.text, "documents": one.documents[: DOCUMENTS[0]]} for one in queries]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    request = CalibrationRequest(
        model=str(model),
        data=pairs,
        output=folder / "policy",
        chat_template=str(model / TEMPLATE_FILE),
        probe="pooled-label-head",  # branches would train for half an hour
        options=next(iter(promises.values())),
    )
    recording, certified = None, {}
    for number, (promise, options) in enumerate(promises.items()):
        own = replace(request, options=options, output=folder / f"policy-{number}")
        prompts = load_prompts(own)
        recording = record_prompts(own, prompts) if recording is None else recording
        config = fit_and_certify(own, prompts, recording)
        certified[promise] = {
            "exit_points": config.exit_points,
            "bound": config.bound,
            "saved_in_calibration": config.levels[config.level_of(None)].layers_saved,
        }
    return {"calibration_queries": len(queries), "policies": certified}


def start(
    stack: ExitStack, model: Path, promises: Sequence[str], folder: Path
) -> dict[str, Server]:
    """A stock server, one with the policy of each promise, and one of ours that saves nothing."""
    flags = ("--chat-template", str(model / TEMPLATE_FILE), "--max-model-len", "1024")
    switches: dict[str, dict[str, Any]] = {
        promise: {"artifact": str(folder / f"policy-{number}")}
        for number, promise in enumerate(promises)
    }
    switches[NEVER] = {**switches[promises[0]], **SAVES_NOTHING}
    found = {}
    for number, (name, switch) in enumerate(switches.items()):
        log = folder / f"{number}.log"
        found[name] = stack.enter_context(serving(str(model), switch, log, flags, ENVIRONMENT))
    without = {**ENVIRONMENT, "VLLM_PLUGINS": ""}
    log = folder / "stock.log"
    stock = stack.enter_context(serving(str(model), None, log, flags, without))
    return {STOCK: stock, **found}


def first(query: Query, documents: int) -> Query:
    """The query with its first candidates alone."""
    right = query.right if query.right is not None and query.right < documents else None
    return Query(query.text, query.documents[:documents], query.scores[:documents], right)


def measure(
    servers: Mapping[str, Server], queries: Sequence[Query], promise: FirstDocuments
) -> dict[str, Any]:
    """Send each query to each server, in turn; which one comes first goes round."""
    for query in queries[:WARM_UP]:
        for server in servers.values():
            rerank(server, query)
    seconds: dict[str, list[float]] = {name: [] for name in servers}
    scores: dict[str, list[Floats]] = {name: [] for name in servers}
    before = {name: layer_rows(server) for name, server in servers.items()}
    names = [*servers]
    with progress(total=len(queries) * len(servers), desc="measure", unit="query") as done:
        for number, query in enumerate(queries):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                reply, took = rerank(servers[name], query)
                scores[name].append(reply)
                seconds[name].append(took)
                done.update()
    rows = []
    for name, server in servers.items():
        run, skipped = layer_rows(server) - before[name]
        rows.append(
            {
                "server": name,
                "mean": statistics.mean(seconds[name]),
                **Speedup.of(seconds[STOCK], seconds[name]).entries("speedup"),
                "layers_saved": skipped / (run + skipped) if skipped else 0.0,
                **compared(queries, scores[name], scores[STOCK], promise),
            }
        )
    return {
        "documents": len(queries[0].documents),
        "queries": len(queries),
        "found_by_tf_idf": float(np.mean([query.right is not None for query in queries])),
        "ndcg_tf_idf": float(np.mean([ndcg(query, query.scores) for query in queries])),
        "servers": rows,
    }


def rerank(server: Server, query: Query) -> tuple[Floats, float]:
    """The scores of a query's documents, in their order, and the seconds it took."""
    body = {"model": "model", "query": query.text, "documents": query.documents}
    start = time.perf_counter()
    reply = post(server, "/rerank", body)
    seconds = time.perf_counter() - start
    scores = np.zeros(len(query.documents))
    for result in reply["results"]:
        scores[result["index"]] = result["relevance_score"]
    return scores, seconds


def compared(
    queries: Sequence[Query],
    early: Sequence[Floats],
    full: Sequence[Floats],
    promise: FirstDocuments,
) -> dict[str, Any]:
    """The differences from stock, and the quality of the orders."""
    count, pairs = len(queries), [*zip(early, full, strict=True)]
    moves = np.concatenate([np.abs(ours - theirs) for ours, theirs in pairs])
    within = slice(promise.k)
    changed = sum({*ranked(ours)[within]} != {*ranked(theirs)[within]} for ours, theirs in pairs)
    lost = sum(promise.breaks(ours, theirs) for ours, theirs in pairs)
    moved = int(np.count_nonzero(moves > promise.margin))
    return {
        "first_changed": changed / count,
        "first_changed_95": clopper_pearson(changed, count),
        "lost": lost / count,
        "lost_95": clopper_pearson(lost, count),
        "moved": moved / len(moves),
        "move_mean": float(moves.mean()),
        "ndcg": float(np.mean([ndcg(q, s) for q, s in zip(queries, early, strict=True)])),
    }


def ndcg(query: Query, scores: Floats) -> float:
    """NDCG@10; 0 where the right passage is not among the candidates."""
    if query.right is None:
        return 0.0
    gains = np.zeros(len(scores))
    gains[query.right] = 1
    return float(ndcg_score(gains[None], scores[None], k=NDCG_AT))


def table(report: Mapping[str, Any]) -> str:
    """Markdown: a table for each number of documents."""
    parts = []
    for size in report["sizes"]:
        rows = [
            {
                "server": one["server"],
                "mean": f"{1000 * one['mean']:.0f} ms",
                "speed-up of a query (95 %)": Speedup.read(one, "speedup").bold,
                "layers saved (95 %)": share_of(one["layers_saved"], size["queries"]),
                f"other first {report['k']} (95 %)": spelled(
                    one["first_changed"], tuple(one["first_changed_95"])
                ),
                f"lost one by more than {report['margin']:g} (95 %)": spelled(
                    one["lost"], tuple(one["lost_95"])
                ),
                f"scores moved by more than {report['margin']:g} (95 %)": share_of(
                    one["moved"], size["queries"]
                ),
                "NDCG@10": f"{one['ndcg']:.3f}",
            }
            for one in size["servers"]
        ]

        found = share_of(size["found_by_tf_idf"], size["queries"], 0)
        parts.append(
            f"{size['queries']} queries with {size['documents']} documents each, one at a time; "
            f"{report['calibration_queries']} others with {DOCUMENTS[0]} documents calibrated, "
            f"epsilon {report['epsilon']:.0%}. NDCG@10 of TF-IDF, which found them: "
            f"{size['ndcg_tf_idf']:.3f} (it finds the right passage of "
            f"{found}); {report['provenance']['cpu']}\n\n"
            f"{markdown_table(rows, text_columns=1)}\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    typer.run(main)
