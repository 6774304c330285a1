"""The times of stock vLLM and of each method, in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.rivals.contest import Contest
from benchmarks.rivals.task import Task
from vllm_adainfer.offline.calibration.record.collect import greedy
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.calibration.write.policy_artifact import write_artifact
from vllm_adainfer.offline.evaluation.rounds import in_rounds
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.reports.speedup import LEAST_ROUNDS

if TYPE_CHECKING:
    from vllm import LLM


AT_ONCE, ALONE = 300, 100  # prompts to time together, and one at a time
ROUNDS = LEAST_ROUNDS  # of nine ways to answer, which take their time
WARM_UP = 32


def timed_in_turn(task: Task, contest: Contest, folder: Path) -> dict[str, Any]:
    """The times of stock and of each method: all tests at once in turn, and one at a time."""
    request, places = task.request, task.tests.rows[:AT_ONCE]
    examples, texts, labels = task.examples(places), task.texts_of(places), task.labels(places)
    hf_config, _ = load_config_and_tokenizer(request.model)
    for name, policy in contest.policies.items():
        write_artifact(policy, request.model, hf_config, request.template, folder / name)
    [(cut, cut_serves)] = contest.cut
    cut.save(folder / "cut")
    artifacts = {name: str(folder / name) for name in contest.policies}
    engines = {
        "stock": start_engine(request.model, examples),
        "ours": start_engine(request.model, examples, {"artifact": artifacts}),
        "cut": start_engine(str(folder / "cut"), examples),
    }

    def ask(engine: str, some: Sequence[int], policy: str | None = None) -> None:
        if some:
            extra = None if policy is None else {"adainfer_policy": policy}
            engines[engine].generate(
                [{"prompt_token_ids": examples[place].token_ids} for place in some],
                [greedy(list(labels[place]), extra) for place in some],
                use_tqdm=False,
            )

    def behind(name: str) -> Callable[[Sequence[int]], None]:
        def answer(some: Sequence[int]) -> None:
            spared = contest.spares[name]([texts[place] for place in some])
            ask("stock", np.array(some)[~spared].tolist())

        return answer

    def cut_first(some: Sequence[int]) -> None:
        ask("cut", some)
        ask("stock", [place for place in some if not cut_serves[place]])

    ways: dict[str, Callable[[Sequence[int]], None]] = {"stock": lambda some: ask("stock", some)}
    ways |= {name: behind(name) for name in contest.spares}
    ways["cut"] = cut_first
    for name in contest.policies:
        ways[name] = lambda some, name=name: ask("ours", some, name)  # type: ignore[misc]
    try:
        return times_of(ways, list(engines.values()))
    finally:
        for engine in engines.values():
            stop_engine(engine)


def times_of(
    ways: Mapping[str, Callable[[Sequence[int]], None]], engines: Sequence[LLM]
) -> dict[str, Any]:
    """Seconds for all at once by round, and for each alone, of each way to answer."""

    def seconds(answer: Callable[[Sequence[int]], None], some: Sequence[int]) -> float:
        for engine in engines:
            engine.reset_prefix_cache()
        start = time.perf_counter()
        answer(some)
        return time.perf_counter() - start

    everyone = range(AT_ONCE)
    for answer in ways.values():
        answer(everyone[:WARM_UP])
    rounds = in_rounds([*ways], ROUNDS, lambda name: seconds(ways[name], everyone))
    places = {name: iter(everyone) for name in ways}
    single = in_rounds(
        [*ways], ALONE, lambda name: seconds(ways[name], [next(places[name])]), "alone"
    )
    return {
        name: {
            "seconds": rounds[name],
            "p50_ms": float(1e3 * np.percentile(single[name], 50)),
        }
        for name in ways
    }
