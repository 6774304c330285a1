"""How much time skipping layers saves, with exits that follow a script.

    .venv/bin/python benchmarks/offline/bench_throughput.py --model .demo/SmolLM2-135M-Instruct
    python benchmarks/offline/bench_throughput.py --model llama-1b    # on a GPU, see `make gpu`
    python benchmarks/offline/bench_throughput.py --model llama-8b --quick --rounds 3

Engines run interleaved on the same random prompts: stock vLLM, stock with half of the layers (for
the bound, see `throughput_report.py`), the idle plugin, and scripted engines with one and with four
exit points. Weights are random, so the numbers are synthetic: they show how much of the skipped
work turns into time saved. For the quality of decisions see `vllm-adainfer evaluate`.

In generation, tokens that exit early wait until their request ends (``kv`` = ``exact``), so the
benchmark times decode steps with fewer layers. On a GPU, stock runs with its CUDA graphs.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import torch
import typer
from tqdm import tqdm

from benchmarks.common.report_files import write_report
from benchmarks.offline.llama_shapes import SHAPES, write_shape
from benchmarks.offline.scripted_requests import random_prompts, scripted_request
from benchmarks.offline.throughput_report import (
    HALF,
    IDLE,
    STOCK,
    case_rows,
    plot,
    table,
)
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.evaluation.rounds import ROUNDS, turns
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.plugin import register
from vllm_adainfer.stats import stats

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams

ONE, FOUR = "one exit point", "four exit points"
MIN_TOKENS = 1024  # per timed pass; smaller cases are repeated within it
STEP_TOKENS = 64  # prompt tokens that take about as long as one decode step


@dataclass(frozen=True)
class Case:
    """A batch of requests: `batch` prompts of `length` tokens, for `output` tokens each."""

    length: int
    batch: int
    output: int = 1

    @property
    def repeats(self) -> int:
        """How often a timed pass runs the batch."""
        tokens = self.batch * self.length + STEP_TOKENS * (self.output - 1)
        return -(-MIN_TOKENS // tokens)


@dataclass(frozen=True)
class Scenario:
    """The share of requests that exit, by layer, at an engine; the others run at full depth."""

    name: str
    engine: str
    leaving: Mapping[int, float]

    def fits(self, case: Case) -> bool:
        """Whether every share is at least one request."""
        counts = [share * case.batch for share in self.leaving.values()]
        return all(count >= 1 for count in counts)

    def exits(self, batch: int, generator: np.random.Generator) -> list[int | None]:
        """The layer after which each request exits, shuffled; None for full depth."""
        layers = [
            layer for layer, share in self.leaving.items() for _ in range(round(share * batch))
        ]
        exits: list[int | None] = [*layers, *[None] * batch][:batch]
        return [exits[place] for place in generator.permutation(batch)]


CASES = [
    *(Case(32, batch) for batch in (1, 8, 32, 128)),
    *(Case(128, batch) for batch in (1, 8, 32)),
    *(Case(512, batch) for batch in (1, 8)),
    *(Case(1024, batch) for batch in (1, 8)),
    *(Case(32, batch, output=32) for batch in (1, 8, 32)),
]
GPU_CASES = [
    *(Case(128, batch) for batch in (1, 8, 64, 256)),
    *(Case(1024, batch) for batch in (1, 8, 32)),
    # No more tokens than the KV policy lets wait.
    *(Case(32, batch, output=64) for batch in (1, 8, 32)),
    Case(512, 64, output=64),
]
# Few, but of prompts, of generation, and of generation after long prompts.
QUICK_CASES = [Case(128, 64), Case(1024, 8), Case(32, 8, output=64), Case(512, 64, output=64)]
ON_GPU = torch.cuda.is_available()
# Room for the largest case, and graphs of the cases' sizes instead of the 51 of vLLM's default.
MORE: dict[str, Any] = {
    "kv_cache_memory_bytes": 5 << 30,
    "max_num_seqs": 256,
    "compilation_config": {"cudagraph_capture_sizes": [1, 8, 32, 64, 128, 256]},
}


def scenarios(depth: int) -> list[Scenario]:
    """Scenarios from no exits to exits at four points."""
    middle, fifths = depth // 2, [depth * part // 5 for part in range(1, 5)]
    return [
        Scenario("never exit", FOUR, {}),
        Scenario("all leave halfway", ONE, {middle: 1.0}),
        Scenario("half leave halfway", ONE, {middle: 0.5}),
        Scenario("a tenth leaves halfway", ONE, {middle: 0.1}),
        Scenario("a fifth leaves at each of four", FOUR, dict.fromkeys(fifths, 0.2)),
    ]


def quick_scenarios(depth: int) -> list[Scenario]:
    """Scenarios of one engine, from no exits to all requests."""
    fifths = [depth * part // 5 for part in range(1, 5)]
    return [
        Scenario("never exit", FOUR, {}),
        Scenario("all leave at the second of four", FOUR, {fifths[1]: 1.0}),
        Scenario("a fifth leaves at each of four", FOUR, dict.fromkeys(fifths, 0.2)),
    ]


def main(
    model: Annotated[
        str,
        typer.Option(help=f"Only its config is used, not its weights; or {', '.join(SHAPES)}."),
    ],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/throughput.json"),
    rounds: Annotated[int, typer.Option(min=1)] = ROUNDS,
    quick: Annotated[bool, typer.Option(help="Few cases, and three engines side by side.")] = False,
) -> None:
    """Measure, and write JSON, a Markdown table and a plot next to each other."""
    if model in SHAPES:
        model = str(write_shape(model, Path(tempfile.mkdtemp())))
    hf_config, _ = load_config_and_tokenizer(model)
    depth, vocabulary = hf_config.num_hidden_layers, hf_config.vocab_size
    cases = QUICK_CASES if quick else GPU_CASES if ON_GPU else CASES
    planned = quick_scenarios(depth) if quick else scenarios(depth)
    measured: list[dict[str, dict[str, Any]]] = [{} for _ in cases]
    for names in [(STOCK, HALF, FOUR)] if quick else side_by_side():
        engines = start_engines(model, depth, cases, names)
        for case, found in zip(tqdm(cases, desc="cases", unit="case"), measured, strict=True):
            prompts = random_prompts(case.batch, case.length, vocabulary)
            runs = measure(engines, planned, case, prompts, rounds)
            for run in runs.values():
                run["stock"] = runs[STOCK]["seconds"]
            found |= runs
        for engine in engines.values():
            stop_engine(engine)
    report = {
        "synthetic": "exits follow a script, weights are random",
        "model": Path(model).name,
        "layers_total": depth,
        "rounds": rounds,
        "cases": [
            row
            for case, runs in zip(cases, measured, strict=True)
            for row in case_rows(vars(case), runs)
        ],
        "provenance": provenance(),
    }
    write_report(output, report, table(report), plot(report))


def side_by_side() -> list[tuple[str, ...]]:
    """The engines that run in turn: all, or each with stock on a GPU, whose memory is full then."""
    if ON_GPU:
        return [(STOCK, other) for other in (HALF, ONE, FOUR)]
    return [(STOCK, HALF, IDLE, ONE, FOUR)]


def start_engines(
    model: str, depth: int, cases: Sequence[Case], names: Sequence[str]
) -> dict[str, LLM]:
    """Start the engines `names` side by side."""
    longest = max(case.length + case.output for case in cases)
    examples = [Example("", "", [0] * longest, None)]
    points = [depth * part // 5 for part in range(1, 5)]
    plans: dict[str, dict[str, Any]] = {
        STOCK: {},
        HALF: {"hf_overrides": {"num_hidden_layers": depth // 2}},
        IDLE: {},
        ONE: {"adainfer": {"exit_script": [depth // 2]}},
        FOUR: {"adainfer": {"exit_script": points}},
    }
    engines: dict[str, LLM] = {}
    os.environ["VLLM_PLUGINS"] = ""
    wanted = {name: plans[name] for name in names}
    for name, settings in tqdm(wanted.items(), desc="engines", unit="engine"):
        if name not in (STOCK, HALF) and "VLLM_PLUGINS" in os.environ:
            del os.environ["VLLM_PLUGINS"]
            register()  # vLLM loads plugins once per process, and loaded none here
        more = MORE if ON_GPU else {}
        engines[name] = start_engine(model, examples, load_format="dummy", **more, **settings)
    return engines


def measure(
    engines: Mapping[str, LLM],
    planned: Sequence[Scenario],
    case: Case,
    prompts: Sequence[Any],
    rounds: int,
) -> dict[str, dict[str, Any]]:
    """Measure one case in interleaved rounds, after a few warm-up requests.

    Returns:
        for each scenario (for stock, each engine): ``seconds`` per batch in each round, and the
        share ``layers_saved``.

    """
    plain = [Scenario(name, name, {}) for name in (STOCK, HALF, IDLE)]
    runs = [run for run in (*plain, *planned) if run.engine in engines and run.fits(case)]
    found: dict[str, dict[str, Any]] = {
        run.name: {"seconds": [], "layers_saved": None} for run in runs
    }
    few = 1 + MIN_TOKENS // case.length
    for run in runs:
        one_pass(engines[run.engine], prompts[:few], [scripted_request(None)] * len(prompts[:few]))
    for number, run in turns(runs, rounds, "rounds of a case"):
        engine = engines[run.engine]
        exits = run.exits(case.batch, np.random.default_rng(number))
        params = [scripted_request(layer, case.output) for layer in exits]
        ours = run.engine in (ONE, FOUR)
        before = stats(engine) if ours else {}
        seconds = statistics.mean(one_pass(engine, prompts, params) for _ in range(case.repeats))
        found[run.name]["seconds"].append(seconds)
        if ours:
            after = stats(engine)
            executed = after["layers_run"] - before["layers_run"]
            possible = after["layers_possible"] - before["layers_possible"]
            found[run.name]["layers_saved"] = 1 - executed / possible
    return found


def one_pass(engine: LLM, prompts: Sequence[Any], params: Sequence[SamplingParams]) -> float:
    """Seconds for one batch, starting from an empty prefix cache."""
    engine.reset_prefix_cache()
    start = time.perf_counter()
    engine.generate(prompts, params, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
