"""How the cost of a step grows with rows, layers, requests, exit points and vocabulary.

    .venv/bin/python benchmarks/offline/bench_step_cost.py --model .demo/SmolLM2-135M-Instruct

Engines run in this process, with random weights and scripted exits, and each part of the exit loop
is timed where it is called. A straight line in the expected terms is fitted to the time of each
part; the table gives its error.
"""

from __future__ import annotations

import os

# Set before libraries read them: one process and one thread, as in a server on two cores.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}

import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import torch
import typer
from adainfer_kernels import Head, Norm
from scipy.optimize import nnls

from benchmarks.common.report_files import write_report
from benchmarks.offline.scripted_requests import random_prompts, scripted_request
from vllm_adainfer.exits.loop.exit_loop import ExitLoop
from vllm_adainfer.exits.loop.forward_pass import ForwardPass
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.facts.document import markdown_grid, markdown_table
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.policy.probe import Probe
from vllm_adainfer.policy.script import ScriptedPolicy

# Part of a step -> the terms its time should be linear in; `work` computes them.
LINES = {
    "segments": ("layers run", "layers x rows"),
    "last layer": ("steps", "rows left", "requests left"),
    "decide": ("exit points asked", "requests asked"),
    "cut": ("cuts", "rows kept"),
}
PROBE_TERMS = ("probes", "vocabulary", "rows x vocabulary")
PROMPT = 16
REQUESTS = (1, 4, 16, 64, 128)
STEPS = 5
Times = dict[str, list[float]]


def main(
    model: Annotated[str, typer.Option(help="Only its config is used, not its weights.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/step_cost.json"),
) -> None:
    """Measure, fit, and write JSON and a Markdown table next to each other."""
    hf_config, _ = load_config_and_tokenizer(model)
    depth, vocabulary = hf_config.num_hidden_layers, hf_config.vocab_size
    measured = []
    for layers in (depth // 3, depth):
        points = [layers * part // 4 for part in (1, 2, 3)]
        engine = start_engine(
            model,
            [Example("", "", [0] * PROMPT, None)],
            {"exit_script": points, "min_rows_saved": 1},
            load_format="dummy",
            hf_overrides={"num_hidden_layers": layers},
        )
        for requests in REQUESTS:
            for cuts in (0, 1, 3):
                if requests > cuts:
                    times = step_times(engine, vocabulary, requests, points[:cuts])
                    measured.append({**work(layers, requests, points[:cuts]), **times})
        stop_engine(engine)
    probes = probe_times(hf_config.hidden_size, vocabulary)
    report = {
        "model": Path(model).name,
        "steps": measured,
        "probes": probes,
        "lines": [fit(part, measured, terms) for part, terms in LINES.items()]
        + [fit("probe", probes, PROBE_TERMS)],
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def work(layers: int, requests: int, leaving: list[int]) -> dict[str, int]:
    """The work in a step where a quarter of the requests exits after each layer of `leaving`."""
    quarter = max(1, requests // 4)
    cuts = len(leaving)
    left = [requests - quarter * cut for cut in range(cuts + 1)]  # between two exit points
    stretches = [b - a for a, b in itertools.pairwise([0, *leaving, layers - 1])]
    return {
        "layers": layers,
        "requests": requests,
        "steps": 1,
        "layers run": layers - 1,
        "layers x rows": sum(n * PROMPT * m for n, m in zip(left, stretches, strict=True)),
        "rows left": PROMPT * left[-1],
        "requests left": left[-1],
        "exit points asked": cuts,
        "requests asked": sum(quarter * (cuts - cut) for cut in range(cuts)),
        "cuts": cuts,
        "rows kept": PROMPT * sum(left[1:]),
    }


def step_times(engine: Any, vocabulary: int, requests: int, leaving: list[int]) -> dict[str, float]:
    """Median milliseconds of the whole ``step`` of `work`, and of each part in `LINES`."""
    prompts = random_prompts(requests, PROMPT, vocabulary)
    quarter = max(1, requests // 4)
    exits: list[int | None] = [layer for layer in leaving for _ in range(quarter)]
    exits += [None] * (requests - len(exits))
    params = [scripted_request(layer) for layer in exits]
    steps = []
    for number in range(STEPS + 2):
        engine.reset_prefix_cache()
        with timed() as times:
            engine.generate(prompts, params, use_tqdm=False)
        # After two warm-up runs, and only if all prompts ran in one step.
        if number > 1 and len(times["step"]) == 1:
            parts = {
                part: 1000 * sum(times[part]) for part in ("step", "last layer", "decide", "cut")
            }
            rest = parts["last layer"] + parts["decide"] + parts["cut"]
            steps.append({**parts, "segments": parts["step"] - rest})
    return {part: statistics.median(step[part] for step in steps) for part in steps[0]}


@contextmanager
def timed() -> Iterator[Times]:
    """Record the seconds of each part of the exit loop while the context lasts."""
    times: Times = defaultdict(list)

    def wrap(part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_function(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            times[part].append(time.perf_counter() - start)
            return result

        return timed_function

    parts: list[tuple[type, str, str]] = [
        (ExitLoop, "run", "step"),
        (ForwardPass, "finish", "last layer"),
        (ScriptedPolicy, "decide", "decide"),
        (ForwardPass, "regroup", "cut"),
    ]
    patches = [
        mock.patch.object(owner, name, wrap(part, getattr(owner, name)))
        for owner, name, part in parts
    ]
    for patch in patches:
        patch.start()
    try:
        yield times
    finally:
        for patch in patches:
            patch.stop()


def probe_times(hidden_size: int, vocabulary: int) -> list[dict[str, Any]]:
    """Milliseconds of a probe, by vocabulary size and number of rows."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for size in (2, vocabulary // 4, vocabulary):
        head = torch.randn(size, hidden_size, generator=generator).to(torch.bfloat16)
        norm = Norm("rms", torch.ones(hidden_size, dtype=torch.bfloat16))
        probe = Probe(Head(head), norm=norm)
        for rows in (1, 16, 128):
            states = torch.randn(rows, hidden_size, generator=generator).to(torch.bfloat16)
            runs = []
            for _ in range(STEPS):
                start = time.perf_counter()
                probe.score(probe.readout(states))
                runs.append(time.perf_counter() - start)
            found.append(
                {
                    "probes": 1,
                    "vocabulary": size,
                    "rows x vocabulary": rows * size,
                    "rows": rows,
                    "probe": 1000 * statistics.median(runs),
                }
            )
    return found


def fit(part: str, measured: Sequence[dict[str, Any]], terms: Sequence[str]) -> dict[str, Any]:
    """Fit the line of least relative error through a part's times, without negative slopes."""
    used = [row for row in measured if row[part] > 0]
    times = np.array([row[part] for row in used])
    design = np.array([[row[term] for term in terms] for row in used], dtype=np.float64)
    slopes, _ = nnls(design / times[:, None], np.ones(len(used)))
    errors = np.abs(design @ slopes / times - 1)
    return {
        "part": part,
        "microseconds": {term: 1000 * slope for term, slope in zip(terms, slopes, strict=True)},
        "median_error": float(np.median(errors)),
        "largest_error": float(errors.max()),
    }


def table(report: dict[str, Any]) -> str:
    """Markdown: the fitted lines, the measured steps, the measured probes."""
    lines = []
    for line in report["lines"]:
        sums = [f"{slope:.3g} x {term}" for term, slope in line["microseconds"].items() if slope]
        off = f"{line['median_error']:.0%} ({line['largest_error']:.0%})"
        lines.append(
            {
                "part of a step": line["part"],
                "microseconds": " + ".join(sums),
                "line is off by, median (most)": off,
            }
        )
    steps = [
        [
            *(f"{step[count]}" for count in ("layers", "requests", "cuts")),
            *(f"{step[part]:.1f}" for part in ("step", "segments")),
            *(f"{step[part]:.2f}" for part in ("last layer", "decide", "cut")),
        ]
        for step in report["steps"]
    ]
    probes = [
        {
            "probe over this many tokens": f"{probe['vocabulary']}",
            "rows": f"{probe['rows']}",
            "ms": f"{probe['probe']:.2f}",
        }
        for probe in report["probes"]
    ]
    step_columns = [
        "layers",
        f"requests of {PROMPT} tokens",
        "exit points used",
        "step, ms",
        "segments",
        "last layer",
        "decide",
        "cut",
    ]
    tables = [
        markdown_table(lines, 2),
        markdown_grid(step_columns, steps, 0),
        markdown_table(probes, 0),
    ]
    return "\n\n".join(tables) + "\n"


if __name__ == "__main__":
    typer.run(main)
