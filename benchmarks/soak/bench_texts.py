r"""Generated text under load: half an hour of everything clients do.

    .venv/bin/vllm-adainfer calibrate ... --max-tokens 32 --epsilon 0.1 --output policies/chat
    .venv/bin/python benchmarks/soak/bench_texts.py --model MODEL \
        --text-artifact chat=policies/chat --text-data chat.jsonl \
        --artifact sst2=policies/sst2 --data sst2.jsonl --template $'Review: {text}\nSentiment:'

`text_scenarios.py` defines the scenarios and how a text is judged; label requests are sent and
compared as in `bench_faults.py`. Exits with code 1 and a sentence per problem.
"""

from __future__ import annotations

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import typer

from benchmarks.common.server import serving
from benchmarks.soak.fault_bench import ENVIRONMENT, Bench, tasks
from benchmarks.soak.faults_report import growth
from benchmarks.soak.text_scenarios import texts
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.offline.calibration.data.examples import make_examples, read_rows
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer

LENGTH = 1024  # most tokens of a prompt and its text together
LONGEST_PROMPT = 400
# So few blocks (of 128 tokens) that some of 16 texts are preempted; rejoining rows can fill a step.
ARGUMENTS = ("--max-model-len", str(LENGTH), "--num-gpu-blocks-override", "24")
ARGUMENTS += ("--max-num-batched-tokens", "512")
SHADOW_RATE = 0.1
LEAVING = 0.2  # share of the time in which clients disconnect mid-text


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id.")],
    text_artifact: Annotated[str, typer.Option(help="NAME=DIR of the policy for text.")],
    text_data: Annotated[Path, typer.Option(help="Its prompts, JSON lines.")],
    artifact: Annotated[list[str], typer.Option(help="NAME=DIR, once per other policy.")],
    data: Annotated[list[Path], typer.Option(help="JSON lines, one file per other policy.")],
    template: Annotated[list[str], typer.Option(help="Prompt template, one per other policy.")],
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/texts.json"),
    minutes: Annotated[float, typer.Option(help="How long to generate texts, in all.")] = 30,
    rows: Annotated[int, typer.Option(help="Rows of the data per other policy.")] = 20,
) -> None:
    """Serve, and write JSON and a Markdown table next to each other."""
    sources, questions = tasks(artifact, data, template, rows)
    name, _, source = text_artifact.partition("=")
    sources[name] = source
    config = load_artifact_config(source)
    bench = Bench(questions, Path(source))
    with_text = partial(texts, prompts=prompts_of(model, text_data), policy=name, config=config)
    with tempfile.TemporaryDirectory() as folder, bench.written_to(output, model, list(sources)):
        switch = {"artifact": sources, "shadow_rate": SHADOW_RATE}
        log = Path(folder, "server.log")
        with serving(model, switch, log, ARGUMENTS, ENVIRONMENT) as server:
            bench.quiet(server)
            bench.longest = LENGTH
            for title, leaves, share in (
                ("texts", False, 1 - LEAVING),
                ("texts left", True, LEAVING),
            ):
                scenario = partial(with_text, seconds=60 * minutes * share, leaves=leaves)
                row = bench.run(title, server, scenario)
                row["growth"] = growth(row["samples"])


def prompts_of(model: str, data: Path) -> list[list[int]]:
    """Prompts as token ids, short enough for a text and a next turn to follow."""
    _, tokenizer = load_config_and_tokenizer(model)
    examples = make_examples(read_rows(data), tokenizer, None, "label", 1 << 20)
    return [one.token_ids for one in examples if len(one.token_ids) <= LONGEST_PROMPT]


if __name__ == "__main__":
    typer.run(main)
