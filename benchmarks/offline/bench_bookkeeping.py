r"""The cost of a step's bookkeeping, without the model: scheduler and worker, stock against ours.

    .venv/bin/python benchmarks/offline/bench_bookkeeping.py --model MODEL --label after \
        --artifact sst2=policies/sst2 --artifact choices=policies/choices

No model runs. One engine in this process provides the config, the worker's loop and the grammars. A
stock scheduler and ours, with the same config, then take turns to schedule the same requests and
get made-up tokens. Timed are `schedule` and `update_from_output`, the arrival of a request
(`add_request`), and the worker's `RunningRequests.add` and `describe`. The worker's note to the
scheduler is left out.

The output file keeps results by `--label`, so runs of two commits can be compared. At least one
artifact must be for labels and one for choices.
"""

from __future__ import annotations

import gc
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import numpy as np
import torch
import typer
from tqdm import tqdm
from vllm import LLM, SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from benchmarks.common.report_files import write_report
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.engine.runner.requests import RunningRequests
from vllm_adainfer.engine.scheduler.scheduler import build_scheduler
from vllm_adainfer.offline.provenance import provenance
from vllm_adainfer.offline.tables import markdown_table

STOCK, OURS = "stock", "ours"
BATCHES = (1, 32, 256)
LENGTHS = (16, 512)  # tokens a text has when its steps are timed
BLOCK, BLOCKS = 32, 1 << 14  # tokens per block; more blocks than all requests need
PROMPT = 100  # tokens
MANY = 5000  # allowed token ids
STEPS = 8  # timed steps per text
TEXT = "the cat sat on the mat and looked at the dog while it ran " * 60
SCHEMA = json.dumps({"type": "string"})


@dataclass(frozen=True)
class Kind:
    """Requests of one kind.

    Attributes:
        title: name for the table.
        params: makes the sampling parameters of a request.
        written: tokens a request has generated when timing starts; 0 times the prompt's step.
        tokens: token ids of the answer, in the order they are sampled.

    """

    title: str
    params: Callable[[], SamplingParams]
    written: int
    tokens: Sequence[int]


@dataclass
class Times:
    """Microseconds of processor time, one number per step (`arrive`, `add`: per batch).

    Attributes:
        step: the scheduler's `schedule` and `update_from_output`.
        arrive: the scheduler's `add_request`, for all requests of a batch.
        add: the worker's `RunningRequests.add`, for all requests of a batch.
        describe: the worker's `RunningRequests.describe`.

    """

    step: list[float] = field(default_factory=list)
    arrive: list[float] = field(default_factory=list)
    add: list[float] = field(default_factory=list)
    describe: list[float] = field(default_factory=list)

    def medians(self) -> dict[str, float]:
        """The median of each part that was measured."""
        return {name: statistics.median(found) for name, found in vars(self).items() if found}


class Bookkeeping:
    """A stock scheduler, ours, and the worker's view of requests, all from one engine."""

    def __init__(self, model: str, artifacts: Mapping[str, str]) -> None:
        """Start the engine."""
        self._llm = LLM(
            model,
            max_model_len=2048,
            max_num_seqs=max(BATCHES),
            block_size=BLOCK,
            enforce_eager=True,
            async_scheduling=False,
            additional_config={"adainfer": {"artifact": dict(artifacts)}},
        )
        self.tokenizer = self._llm.get_tokenizer()
        engine = self._llm.llm_engine
        self._process = engine.input_processor.process_inputs
        self._tasks = engine.get_supported_tasks()
        self._core = engine.engine_core.engine_core
        self._config = engine.vllm_config
        limits = self._config.scheduler_config  # lets the schedulers below take whole batches
        limits.max_num_batched_tokens = limits.max_num_scheduled_tokens = 1 << 17
        self._loop = self._core.model_executor.driver_worker.worker.model_runner.model.loop
        made = {
            "kv_cache_config": replace(self._core.scheduler.kv_cache_config, num_blocks=BLOCKS),
            "structured_output_manager": self._core.structured_output_manager,
            "block_size": BLOCK,
            "hash_block_size": BLOCK,
            "log_stats": True,
        }
        self._schedulers: dict[str, Scheduler] = {
            STOCK: Scheduler(vllm_config=self._config, **made),
            OURS: build_scheduler(self._config, **made),
        }
        self._dice = random.Random(0)
        self._number = 0

    def measure(self, kind: Kind, batch: int, repeat: int) -> dict[str, dict[str, float]]:
        """Medians of each part, by scheduler."""
        times = {name: Times() for name in self._schedulers}
        for number in range(repeat + 1):
            for name in list(times)[:: 1 if number % 2 else -1]:
                # The first batch warms up.
                self._once(name, kind, batch, times[name] if number else Times())
        return {name: one.medians() for name, one in times.items()}

    def _once(self, name: str, kind: Kind, batch: int, times: Times) -> None:
        scheduler = self._schedulers[name]
        requests = [self._request(kind) for _ in range(batch)]
        with timing(times.arrive):
            for request in requests:
                scheduler.add_request(request)
        running = RunningRequests(self._config, self._loop) if name == OURS else None
        tokens = list(kind.tokens)
        if kind.written:  # the prompt, and then all earlier tokens in one step
            self._step(scheduler, running, tokens[: kind.written], Times(add=times.add))
            tokens = tokens[kind.written :]
            self._step(scheduler, running, [tokens.pop(0)], Times())
        for token in tokens:
            self._step(scheduler, running, [token], times)
        if kind.written and any(one.num_output_tokens != len(kind.tokens) for one in requests):
            raise RuntimeError(f"{kind.title}: vLLM did not take all tokens")
        ids = [request.request_id for request in requests if not request.is_finished()]
        scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)
        left = scheduler.schedule()
        assert not left.num_scheduled_tokens

    def _step(
        self,
        scheduler: Scheduler,
        running: RunningRequests | None,
        sampled: Sequence[int],
        times: Times,
    ) -> None:
        parts: list[float] = []
        with timing(parts):
            output = scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        cached = output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        computed |= {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        if running is not None:
            if output.scheduled_new_reqs:
                with timing(times.add):
                    for new in output.scheduled_new_reqs:
                        running.add(new)
            step: dict[str, Any] = {
                "request_ids": ids,
                "lens": np.array([output.num_scheduled_tokens[one] for one in ids]),
                "computed": np.array([computed[one] for one in ids]),
                "sampled": np.ones(len(ids), dtype=bool),
                "device": torch.device("cpu"),
            }
            with timing(times.describe):
                running.describe(**step)
        made = ModelRunnerOutput(
            req_ids=ids,
            req_id_to_index={one: place for place, one in enumerate(ids)},
            sampled_token_ids=[list(sampled) for _ in ids],
        )
        with timing(parts):
            scheduler.update_from_output(output, made)
        times.step.append(sum(parts))

    def _request(self, kind: Kind) -> Request:
        """A new request with its own prompt, as the engine core makes it."""
        self._number += 1
        prompt = [self._dice.randrange(1000, 20_000) for _ in range(PROMPT)]
        asked = self._process(
            f"{self._number}", {"prompt_token_ids": prompt}, kind.params(), self._tasks
        )
        request, _ = self._core.preprocess_add_request(asked)
        structured = request.structured_output_request
        while structured is not None and not structured.is_grammar_ready:
            time.sleep(0.001)
        return request


@contextmanager
def timing(found: list[float]) -> Iterator[None]:
    """Append the microseconds of processor time that a block takes in this thread."""
    gc.disable()
    begin = time.thread_time()
    yield
    found.append(1e6 * (time.thread_time() - begin))
    gc.enable()


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id.")],
    artifact: Annotated[list[str], typer.Option(help="NAME=DIR, once per policy.")],
    label: Annotated[str, typer.Option(help="Name for these results in the file.")] = "now",
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/bookkeeping.json"),
    repeat: Annotated[int, typer.Option(min=1, help="Batches per kind and size.")] = 7,
    note: Annotated[str, typer.Option(help="Remark on the run, for the table.")] = "",
) -> None:
    """Measure, and write JSON and a Markdown table next to each other."""
    artifacts = dict(named.split("=", 1) for named in artifact)
    configs = [load_artifact_config(one) for one in artifacts.values()]
    labels = next(list(one.label_ids) for one in configs if not one.choices)
    choices = next([one.text for one in config.choices] for config in configs if config.choices)
    books = Bookkeeping(model, artifacts)
    rows = []
    for kind in tqdm(kinds(books.tokenizer, labels, choices)):
        for batch in BATCHES:
            found = books.measure(kind, batch, repeat)
            rows.append({"kind": kind.title, "requests": batch, **found})
    report = {"model": Path(model).name, "runs": {}}
    if output.exists():
        report["runs"] = json.loads(output.read_text())["runs"]
    report["runs"][label] = {"rows": rows, "note": note, "provenance": provenance()}
    write_report(output, report, table(report["runs"]))


def kinds(tokenizer: Any, labels: list[int], choices: list[str]) -> list[Kind]:
    """The kinds of requests to measure."""

    def params(**more: Any) -> Callable[[], SamplingParams]:
        """Give each request lists of its own, as if it had come over a socket."""
        return lambda: SamplingParams(temperature=0, **json.loads(json.dumps(more)))

    def structured(tokens: int, **outputs: Any) -> Callable[[], SamplingParams]:
        return lambda: SamplingParams(
            temperature=0, max_tokens=tokens, structured_outputs=StructuredOutputsParams(**outputs)
        )

    many = [*labels, *range(1000, 1000 + MANY - len(labels))]
    choice = tokenizer.encode(choices[0], add_special_tokens=False)
    found = [
        Kind("a label", params(max_tokens=1, allowed_token_ids=labels), 0, labels[:1]),
        Kind(f"one of {MANY:,} ids", params(max_tokens=1, allowed_token_ids=many), 0, labels[:1]),
        Kind(
            "a label's probability",
            params(max_tokens=1, allowed_token_ids=labels, logprobs=len(labels)),
            0,
            labels[:1],
        ),
        Kind("a choice", structured(32, choice=choices), 0, choice[:1]),
    ]
    for length in LENGTHS:
        most = length + STEPS + 2
        text = tokenizer.encode(TEXT, add_special_tokens=False)[: length + STEPS + 1]
        quoted = tokenizer.encode(f'"{TEXT}', add_special_tokens=False)[: length + STEPS + 1]
        found += [
            Kind(f"text, {length} tokens", params(max_tokens=most), length, text),
            Kind(f"JSON, {length} tokens", structured(most, json=SCHEMA), length, quoted),
        ]
    return found


def table(runs: Mapping[str, Any]) -> str:
    """Markdown: a row per kind and number of requests, with the microseconds of each run."""
    heads = ("step, scheduler", "arrival, scheduler", "`add`", "`describe`")
    beside = " / ".join(runs)
    by_case: dict[tuple[str, int], dict[str, Any]] = {}
    for label, run in runs.items():
        for row in run["rows"]:
            by_case.setdefault((row["kind"], row["requests"]), {})[label] = row

    def cell(case: Mapping[str, Any], server: str, name: str, each: int = 1) -> str:
        found = [case[label][server].get(name) if label in case else None for label in runs]
        return " / ".join("-" if one is None else f"{one / each:,.0f}" for one in found)

    rows = []
    for (kind, requests), case in by_case.items():
        cells = [cell(case, server, "step") for server in (STOCK, OURS)]
        cells += [cell(case, server, "arrive", requests) for server in (STOCK, OURS)]
        cells += [cell(case, OURS, "add", requests), cell(case, OURS, "describe")]
        rows.append([kind, f"{requests}", *cells])
    columns = ["requests of", "running", f"{heads[0]}, stock", f"{heads[0]}, ours"]
    columns += [f"{heads[1]}, stock", f"{heads[1]}, ours", *heads[2:]]
    lines = [
        f"Microseconds, {beside}: of a step with so many requests (`schedule` and "
        "`update_from_output`; the worker's `describe`), and of a request when it comes "
        "(`add_request`; the worker's `add`). Medians of processor time.",
        "",
        markdown_table(columns, rows),
        "",
    ]
    for label, run in runs.items():
        source = run["provenance"]
        note = f"; {run['note']}" if run["note"] else ""
        lines += [f"{label}: {source['git']}, {source['cpu']}, {source['time']}{note}.", ""]
    return "\n".join(lines[:-1]) + "\n"


if __name__ == "__main__":
    typer.run(main)
