r"""Generated text: stock vLLM against exits at every token.

    .venv/bin/vllm-adainfer calibrate --model MODEL --data FILE --max-tokens 64 --output POLICY
    .venv/bin/python benchmarks/offline/bench_generation.py --model MODEL --artifact POLICY \
        --data-dir DIR

Engines run interleaved on chat prompts from DIR: test rows of GSM8K, and the rows of alpaca_eval
and specbench that calibration has not seen. Speed is measured at each batch size, quality once. The
headroom (the depth of an oracle) comes from the artifact.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer
from tqdm import tqdm

from benchmarks.common.report_files import write_report
from vllm_adainfer.artifact.files import load_artifact_config, load_details
from vllm_adainfer.offline.calibration.data.examples import Example, Row, make_examples
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.evaluation.rounds import ROUNDS, in_rounds
from vllm_adainfer.offline.evaluation.run import Run
from vllm_adainfer.offline.evaluation.sequences import compare, has_number, rescore
from vllm_adainfer.offline.facts.document import markdown_grid
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.reports.speedup import Speedup
from vllm_adainfer.plugin import register
from vllm_adainfer.settings.request import EXIT_ARG
from vllm_adainfer.stats import stats

if TYPE_CHECKING:
    from vllm import LLM

STOCK, NEVER, EXACT = VARIANTS = "stock", "never exit", "exact"
# Directory -> field, and how many of its first rows calibration used.
SOURCES = {"gsm8k": ("question", 0), "alpaca_eval": ("text", 250), "specbench": ("text", 90)}
# Batch size -> prompts in a timed pass (a few full batches).
BATCHES = {1: 12, 8: 24, 32: 64, 128: 128}
MOST = 48  # prompts per data set
MAX_PROMPT = 512  # tokens; longer prompts are left out


def main(
    model: Annotated[str, typer.Option()],
    artifact: Annotated[str, typer.Option(help="Calibrated with --max-tokens above 1.")],
    data_dir: Annotated[Path, typer.Option()],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/generation.json"),
    max_tokens: Annotated[int, typer.Option(min=2)] = 64,
    prompts: Annotated[int, typer.Option(help="Prompts per data set, for quality.")] = 24,
    rounds: Annotated[int, typer.Option(min=1)] = ROUNDS,
) -> None:
    """Measure, and write JSON and a Markdown table next to each other."""
    config = load_artifact_config(artifact)
    sets = read_sets(model, data_dir, MOST)
    mixed = [e for group in zip_longest(*sets.values()) for e in group if e is not None]
    engines = start_engines(model, artifact, mixed, max_tokens)
    speed = []
    for batch, count in BATCHES.items():
        speed += measure_speed(engines, mixed[:count], batch, max_tokens, rounds)
    quality = []
    for name, examples in tqdm(sets.items(), desc="quality", unit="set"):
        quality += measure_quality(engines, model, name, examples[:prompts], max_tokens)
    for engine in engines.values():
        stop_engine(engine)
    report = {
        "model": config.base_model,
        "artifact": Path(artifact).name,
        "epsilon": config.epsilon,
        "delta": config.delta,
        "exit_points": config.exit_points,
        "layers_total": config.layers,
        "oracle_layers_run": load_details(artifact)["oracle_layers_run"],
        "max_tokens": max_tokens,
        "prompts": prompts,
        "rounds": rounds,
        "speed": speed,
        "quality": quality,
        "provenance": provenance(),
    }
    write_report(output, report, table(report))


def read_sets(model: str, data_dir: Path, count: int) -> dict[str, list[Example]]:
    """Up to `count` chat prompts of each source; those of GSM8K are labelled with the answer."""
    _, tokenizer = load_config_and_tokenizer(model)
    sets = {}
    for name, (field, used) in SOURCES.items():
        path = data_dir / name / "test.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines][used:]
        chats = [
            Row(
                f"{path}",
                {"messages": [{"role": "user", "content": row[field]}]}
                | ({"label": row["answer"]} if name == "gsm8k" else {}),
            )
            for row in rows
        ]
        examples = make_examples(chats, tokenizer, None, "label", 1 << 20)
        short = [example for example in examples if len(example.token_ids) <= MAX_PROMPT]
        sets[name] = short[:count]
    return sets


def start_engines(
    model: str, artifact: str, examples: Sequence[Example], max_tokens: int
) -> dict[str, LLM]:
    """Start stock and ours side by side."""
    os.environ["VLLM_PLUGINS"] = ""
    engines = {STOCK: start_engine(model, examples, None, max_tokens)}
    del os.environ["VLLM_PLUGINS"]
    register()  # vLLM loads plugins once per process, and loaded none here
    engines[EXACT] = start_engine(model, examples, {"artifact": artifact}, max_tokens)
    return engines


def run(
    engines: Mapping[str, LLM],
    variant: str,
    examples: Sequence[Example],
    batch: int,
    max_tokens: int,
) -> Run:
    """Run `examples` in consecutive batches of `batch`, from an empty prefix cache."""
    from vllm import SamplingParams

    engine = engines[EXACT if variant == NEVER else variant]
    arguments = {EXIT_ARG: 0} if variant == NEVER else None
    params = SamplingParams(temperature=0, max_tokens=max_tokens, extra_args=arguments)
    engine.reset_prefix_cache()
    before = None if variant == STOCK else stats(engine)
    texts = []
    start = time.perf_counter()
    for first in range(0, len(examples), batch):
        prompts = [{"prompt_token_ids": e.token_ids} for e in examples[first : first + batch]]
        outputs = engine.generate(prompts, params, use_tqdm=False)
        texts += [list(output.outputs[0].token_ids) for output in outputs]
    seconds = time.perf_counter() - start
    if before is None:
        return Run(seconds, texts)
    return Run.counted(seconds, texts, before, stats(engine))


def measure_speed(
    engines: Mapping[str, LLM],
    examples: Sequence[Example],
    batch: int,
    max_tokens: int,
    rounds: int,
) -> list[dict[str, Any]]:
    """Measure interleaved rounds at one batch size; returns a row per variant."""
    for variant in VARIANTS:
        run(engines, variant, examples[:batch], batch, 4)
    passes = in_rounds(
        VARIANTS,
        rounds,
        lambda variant: run(engines, variant, examples, batch, max_tokens),
        f"batch {batch}",
    )
    rows = []
    for variant, found in passes.items():
        is_stock = variant == STOCK
        rates = [one.tokens / one.seconds for one in found]
        stock = [one.tokens / one.seconds for one in passes[STOCK]]
        rows.append(
            {
                "batch": batch,
                "variant": variant,
                "tokens_per_second": median(rates),
                **Speedup.of(rates, stock).entries("speedup"),
                "layers_saved": None if is_stock else median(one.layers_saved for one in found),
                "passes_saved": None if is_stock else median(one.passes_saved for one in found),
                "exit_histogram": found[-1].exit_histogram,
            }
        )
    return rows


def measure_quality(
    engines: Mapping[str, LLM],
    model: str,
    name: str,
    examples: Sequence[Example],
    max_tokens: int,
) -> list[dict[str, Any]]:
    """Have stock vLLM rescore the texts of each variant; returns a row per variant.

    Texts are generated one request at a time, so every settled token exits.
    """
    _, tokenizer = load_config_and_tokenizer(model)
    prompts = [example.token_ids for example in examples]
    texts = {v: run(engines, v, examples, 1, max_tokens).texts for v in VARIANTS}
    rows = []
    for variant, found in texts.items():
        scored = [
            has_number(tokenizer.decode(text), example.label)
            for text, example in zip(found, examples, strict=True)
            if example.label is not None
        ]
        rows.append(
            {
                "data": name,
                "variant": variant,
                **compare(found, texts[NEVER]),
                "read_back": rescore(engines[STOCK], prompts, found),
                "score": sum(scored) / len(scored) if scored else None,
            }
        )
    return rows


SPEED = [
    "batch",
    "variant",
    "tokens/s",
    "of stock (range)",
    "layers x rows saved",
    "layers entered, saved",
    "tokens that left",
]
QUALITY = [
    "data",
    "variant",
    "differs from never exiting, per token",
    "same text",
    "first difference at token",
    "read back: not the full model's choice",
    "perplexity",
    "number match",
]


def table(report: Mapping[str, Any]) -> str:
    """Markdown: speed by batch size, then quality by data set."""
    room, depth = report["oracle_layers_run"], report["layers_total"]
    head = (
        f"{report['model']}, greedy, up to {report['max_tokens']} tokens, epsilon "
        f"{report['epsilon']:g} at delta {report['delta']:g} per token, exit points after "
        f"{', '.join(map(str, report['exit_points']))} of {depth} layers. The room: an oracle that "
        f"knew where each token's answer is first right would run {room:.1f} layers "
        f"({1 - room / depth:.0%} fewer)."
    )
    speed = []
    for row in report["speed"]:
        cells = ["", "", "", ""]
        if row["variant"] != STOCK:
            left = {int(layers): count for layers, count in row["exit_histogram"].items()}
            cells = [
                Speedup.read(row, "speedup").bold,
                f"{row['layers_saved']:.1%}",
                f"{row['passes_saved']:.1%}",
                f"{1 - left.get(depth, 0) / sum(left.values()):.0%}",
            ]
        speed.append([f"{row['batch']}", row["variant"], f"{row['tokens_per_second']:.0f}", *cells])
    quality = []
    for row in report["quality"]:
        place, score, back = row["first_divergence"], row["score"], row["read_back"]
        quality.append(
            [
                row["data"],
                row["variant"],
                f"{row['disagreement']:.1%}",
                f"{row['same']:.0%}",
                "" if place is None else f"{place:.0f}",
                f"{back['disagreement']:.1%}",
                f"{back['perplexity']:.2f}",
                "" if score is None else f"{score:.0%}",
            ]
        )
    return "\n\n".join(
        [head, markdown_grid(SPEED, speed, 2), markdown_grid(QUALITY, quality, 2) + "\n"]
    )


if __name__ == "__main__":
    typer.run(main)
