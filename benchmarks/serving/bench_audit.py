r"""What the audit costs a served request: two servers with the plugin, one of them with the audit.

    .venv/bin/python benchmarks/serving/bench_audit.py --model MODEL --artifact POLICY \
        --data test.jsonl --template $'Review: {text}\nSentiment:'

Both run side by side with the same flags and the same policy, but only one at a time gets requests.
In a round each gets the same prompts at the same times, twice: all at once, which gives the
throughput, and at a rate, which gives the latencies. The order of the servers alternates between
rounds. Each run starts from an empty prefix cache. A round gives one ratio of each figure, with
audit / without; their mean has Student's 95 % interval.

The benchmark fails if a request fails, or if the audit has not exactly one line for each.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import typer
from tqdm import tqdm

from benchmarks.common.intervals import mean_interval
from benchmarks.common.report_files import write_report
from benchmarks.common.server import Server, serving
from benchmarks.serving.label_requests import post
from benchmarks.serving.sending import send
from benchmarks.serving.side_by_side import ENVIRONMENT
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import (
    make_examples,
    read_rows,
    read_template,
)
from vllm_adainfer.offline.calibration.record.engine import BLOCK
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.audit import read_audit
from vllm_adainfer.offline.tables import markdown_table

WITHOUT, WITH = "without audit", "with audit"
FIGURES = {
    "requests_per_second": "requests/s, all at once",
    "p50_ms": "p50 latency, ms",
    "p99_ms": "p99 latency, ms",
}
LINES_SECONDS = 30  # how long lines may lag behind the last answer


def main(
    model: Annotated[str, typer.Option()],
    artifact: Annotated[str, typer.Option(help="Calibrated with labels.")],
    data: Annotated[Path, typer.Option(help="JSON lines.")],
    template: Annotated[str, typer.Option(help="As for `vllm-adainfer evaluate`.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/audit.json"),
    rate: Annotated[float, typer.Option(help="Requests per second, for the latencies.")] = 10,
    requests: Annotated[int, typer.Option(min=1, help="Requests per run.")] = 200,
    rounds: Annotated[int, typer.Option(min=2)] = 15,
) -> None:
    """Measure, and write JSON and a Markdown table next to each other."""
    config = load_artifact_config(artifact)
    hf_config, tokenizer = load_config_and_tokenizer(model)
    config.check_served_by(hf_config)
    longest = hf_config.max_position_embeddings - 1
    rows = read_rows(data)
    examples = make_examples(rows, tokenizer, read_template(template), "label", longest)
    if not config.labels:
        raise AdaInferError(f"{artifact} has no labels: calibrate with --labels")
    if len(examples) < requests:
        raise AdaInferError(
            f"--data {data} has {len(examples)} rows: ask for at most that many --requests"
        )
    random.Random(0).shuffle(examples)  # a file may be sorted by label
    examples = examples[:requests]
    body = {"model": "model", "max_tokens": 1, "temperature": 0}
    body["allowed_token_ids"] = config.label_ids
    bodies = [{**body, "prompt": example.text} for example in examples]
    tokens = 1 + max(len(example.token_ids) for example in examples)
    flags = ["--max-model-len", str(-(-tokens // BLOCK) * BLOCK)]
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "lines")
        audited = {"artifact": artifact, "audit": {"directory": str(lines)}}
        with (
            serving(
                model, {"artifact": artifact}, Path(folder, "a.log"), flags, ENVIRONMENT
            ) as one,
            serving(model, audited, Path(folder, "b.log"), flags, ENVIRONMENT) as other,
        ):
            measured = measure({WITHOUT: one, WITH: other}, bodies, rate, rounds)
            check(lines, 2 * requests * (rounds + 1))
    report = {
        "model": config.base_model,
        "artifact": Path(artifact).name,
        "data": data.name,
        "requests": requests,
        "prompt_tokens_mean": sum(len(example.token_ids) for example in examples) / requests,
        "rate": rate,
        "rounds": rounds,
        "runs": measured,
        "ratios": ratios(measured),
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def measure(
    servers: Mapping[str, Server], bodies: Sequence[Mapping[str, Any]], rate: float, rounds: int
) -> dict[str, list[dict[str, float]]]:
    """The figures of each round, by server; a round before them lets both warm up."""
    measured: dict[str, list[dict[str, float]]] = {WITHOUT: [], WITH: []}
    for number in tqdm(range(rounds + 1), desc="rounds", unit="round"):
        gaps = np.random.default_rng(number).exponential(1 / rate, len(bodies)).tolist()
        for name in (WITHOUT, WITH) if number % 2 else (WITH, WITHOUT):
            figures = one_run(servers[name], bodies, gaps)
            if number:
                measured[name].append(figures)
    return measured


def one_run(
    server: Server, bodies: Sequence[Mapping[str, Any]], gaps: Sequence[float]
) -> dict[str, float]:
    """The figures of one server in one round."""
    post(server, "/reset_prefix_cache")
    together = send(server, "/v1/completions", bodies, [0.0] * len(bodies))
    post(server, "/reset_prefix_cache")
    apart = send(server, "/v1/completions", bodies, gaps)
    return {
        "requests_per_second": len(bodies) / together.seconds,
        "p50_ms": apart.latency(0.5),
        "p99_ms": apart.latency(0.99),
    }


def check(directory: Path, requests: int) -> None:
    """Check that the audit has a line for each request.

    Raises:
        RuntimeError: it has not.

    """
    end = time.monotonic() + LINES_SECONDS
    while True:
        lines = [*read_audit([directory])]
        if len(lines) == requests and not any(line.lost for line in lines):
            return
        if time.monotonic() > end:
            raise RuntimeError(f"the audit has {len(lines)} lines of {requests} requests")
        time.sleep(0.5)


def ratios(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, Any]:
    """The mean ratio with audit / without over rounds, and its interval, of each figure."""
    found = {}
    for figure in FIGURES:
        each = np.array(
            [
                ours[figure] / plain[figure]
                for ours, plain in zip(measured[WITH], measured[WITHOUT], strict=True)
            ]
        )
        found[figure] = {"mean": float(each.mean()), "interval": mean_interval(each)}
    return found


def table(report: Mapping[str, Any]) -> str:
    """Markdown: the setup, and a row for each figure."""
    rows = []
    for figure, title in FIGURES.items():
        without, audited = (
            np.median([run[figure] for run in report["runs"][name]]) for name in (WITHOUT, WITH)
        )
        ratio = report["ratios"][figure]
        low, high = ratio["interval"]
        rows.append(
            [
                title,
                f"{without:.1f}",
                f"{audited:.1f}",
                f"**{ratio['mean']:.3f}** ({low:.3f} to {high:.3f})",
            ]
        )
    lines = [
        f"{report['model']}, {report['data']}: {report['requests']} prompts of "
        f"{report['prompt_tokens_mean']:.0f} tokens, one label out, over `/v1/completions` of two "
        f"servers with the same policy, on {report['provenance']['cpu']}. Medians of "
        f"{report['rounds']} interleaved rounds; latencies at {report['rate']:g} requests/s. The "
        "ratio is with / without audit, in brackets the 95 % interval of its mean over rounds.",
        "",
        markdown_table(["", WITHOUT, WITH, "ratio"], rows),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
