r"""Soak a server that has every feature on with everything clients do.

    .venv/bin/python benchmarks/soak/bench_everything.py --model MODEL --minutes 15 \
        --artifact sst2=policies/sst2 --data sst2.jsonl --template $'Review: {text}\nSentiment:' \
        --artifact trec=policies/trec --data trec.jsonl --template $'Question: {text}\nType:' \
        --choices choices=policies/choices --pool pool=policies/pool --pool-data lines.jsonl \
        --adapter decisions=DIR

The server has policies for labels, for choices, for a label pool, and one that ships with an
adapter (DIR/adainfer), and captures requests. Shadow requests are off: their full-depth answers may
differ from those of the quiet pass. The mix has questions to each policy and at full depth,
generated texts, disconnects, requests to be refused, and those of `hostile_growth.py` up to a size.
Meanwhile artifacts are reloaded, and the adapter is loaded and unloaded under a second name.
Then a stock server gets the same mix for as long, without the reloads. The policies for choices and
the adapter get the first data and template, the label pool its own lines of a batch file.

The right answer is the one an idle server gives to a single request. Rounding depends on the batch,
so a request whose answer differs is sent again on its own: it is a tie if the right answer comes
then, and wrong otherwise. `soak_verdict.py` judges how long clients waited,
beside stock, and whether memory still grows after some minutes. Each server's cache of grammars is
small. vLLM's memory grows with hostile grammars all the same, see `benchmarks/README.md`.

Exits with code 1 and a sentence per problem.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import aiohttp
import typer

from benchmarks.common.server import serving
from benchmarks.soak.hostile_growth import FACTORS, THINGS
from benchmarks.soak.hostile_requests import cheap_refused
from benchmarks.soak.load_client import Question
from benchmarks.soak.measures import of_policy
from benchmarks.soak.soak import ENVIRONMENT, Bench, Stage, in_background, sampled_memory, tasks
from benchmarks.soak.soak_report import growth
from benchmarks.soak.soak_verdict import still_grows, worse_than_stock
from vllm_adainfer.artifact.files import load_artifact_config

AT_ONCE = 16  # clients in a closed loop
RELOAD = "/adainfer/reload"
GUEST = "guest"  # the adapter's second name
# On a CPU, rows without an adapter get the update of the adapter in the last slot, and each load
# takes a new slot, see docs/adapters.md.
SLOTS = 32
VISITS = SLOTS - 4
ASKED_IN_A_VISIT = 8
ADAPTER_ROWS = 20  # few: adapters are slow on a CPU
RELOAD_SECONDS = 10.0
REPORT_SECONDS = 1.0  # until decisions show in the metrics
LEAVING, REFUSED, HOSTILE = 0.04, 0.02, 0.02  # shares of requests
ARGUMENTS = ("--max-model-len", "2048")
WITH_ADAPTERS = ("--enable-lora", "--max-loras", f"{SLOTS}")
RUNTIME = {
    **ENVIRONMENT,
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    "VLLM_XGRAMMAR_CACHE_MB": "16",  # compiled grammars: 512 by default
}


@dataclass
class Mix:
    """The traffic besides questions, and its outcome.

    Attributes:
        largest: largest size factor of hostile requests.
        adapter: name and directory of the adapter, empty without one.
        on_stock: whether the server knows nothing of policies.
        done: how often each other thing was done.
        doubtful: indices of questions that the guest answered differently than the adapter.
        gone: counters of the guest's policy, read before each unload.

    """

    largest: int
    adapter: tuple[str, str]
    on_stock: bool = False
    problems: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    doubtful: list[int] = field(default_factory=list)
    gone: Counter[str] = field(default_factory=Counter)


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id.")],
    artifact: Annotated[list[str], typer.Option(help="NAME=DIR, once per policy for labels.")],
    data: Annotated[list[Path], typer.Option(help="JSON lines, one file per such policy.")],
    template: Annotated[list[str], typer.Option(help="Prompt template, one per such policy.")],
    choices: Annotated[str, typer.Option(help="NAME=DIR of a policy for choices.")],
    adapter: Annotated[str, typer.Option(help="NAME=DIR of an adapter with DIR/adainfer.")] = "",
    pool: Annotated[str, typer.Option(help="NAME=DIR of a policy with a label pool.")] = "",
    pool_data: Annotated[Path | None, typer.Option(help="Its requests, as a batch file.")] = None,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/everything.json"),
    minutes: Annotated[float, typer.Option()] = 15,
    rows: Annotated[int, typer.Option(help="Rows of the data per policy.")] = 50,
    largest: Annotated[int, typer.Option(help="Largest size factor of hostile requests.")] = 100,
    rank: Annotated[int, typer.Option(help="Largest rank of an adapter.")] = 16,
) -> None:
    """Run the soak, and write JSON and a Markdown table next to each other."""
    sources, questions = tasks(artifact, data, template, rows)
    first = [one for one in questions if one.kind == next(iter(sources)) and not one.deep]
    name, _, directory = adapter.partition("=")
    others = dict(named.split("=", 1) for named in (choices, pool) if named)
    questions += choice_questions(first, *choices.split("=", 1))
    if adapter:
        questions += adapter_questions(first[:ADAPTER_ROWS], name, directory)
    if pool_data is not None:
        questions += pool_questions(pool.partition("=")[0], pool_data, rows)
    bench = Bench(questions, Path(next(iter(sources.values()))))
    with (
        tempfile.TemporaryDirectory() as folder,
        bench.written_to(output, model, [*sources, *others, *filter(None, [name])]),
    ):
        capture = {"directory": f"{folder}/captured", "rate": 0.1}
        switch: dict[str, Any] = {"artifact": {**sources, **others}, "capture": capture}
        flags = ARGUMENTS
        if adapter:
            flags += (*WITH_ADAPTERS, "--max-lora-rank", f"{rank}", "--lora-modules", adapter)
            points = load_artifact_config(f"{directory}/adainfer").exit_points
            switch["exit_points"] = list(points)
        found = {}
        for title, one in (("soak", switch), ("soak, stock", None)):
            mix = Mix(largest, (name, directory), on_stock=one is None)
            environment = {**RUNTIME, **({"VLLM_PLUGINS": ""} if mix.on_stock else {})}
            with serving(model, one, Path(folder, "server.log"), flags, environment) as server:
                bench.quiet(server)
                scenario = partial(everything_for, mix=mix, seconds=60 * minutes)
                found[title] = row = bench.run(title, server, scenario)
            row["growth"] = growth(row["samples"])
        ours, stock = found.values()
        lines = [line for file in Path(folder, "captured").glob("*.jsonl") for line in file.open()]
        ours["captured"] = sum("url" in json.loads(line) for line in lines)
        if not ours["captured"]:
            ours["problems"].append("no request was captured")
        ours["problems"] += worse_than_stock(ours["waits"], stock["waits"])
        ours["problems"] += still_grows(ours["samples"])


def choice_questions(asked: Sequence[Question], name: str, directory: str) -> list[Question]:
    """The same prompts as requests for a choice, with early exits and at full depth."""
    texts = [choice.text for choice in load_artifact_config(directory).choices]
    found = []
    for question in asked:
        body = dict(question.body)
        del body["allowed_token_ids"]
        body |= {"max_tokens": 32, "structured_outputs": {"choice": texts}}
        found.append(Question(name, False, body))
        found.append(Question(name, True, {**body, "vllm_xargs": {"adainfer": 0}}))
    return found


def adapter_questions(asked: Sequence[Question], name: str, directory: str) -> list[Question]:
    """The same prompts as requests to an adapter, about its policy's labels."""
    labels = list(load_artifact_config(f"{directory}/adainfer").label_ids)
    more = {"model": name, "allowed_token_ids": labels}
    return [replace(question, kind=name, body={**question.body, **more}) for question in asked]


def pool_questions(name: str, data: Path, rows: int) -> list[Question]:
    """The first `rows` requests of a batch file."""
    more = {"model": "model", "temperature": 0, "return_token_ids": True}
    lines = data.read_text().splitlines()[:rows]
    return [Question(name, False, {**json.loads(line)["body"], **more}) for line in lines]


async def everything_for(stage: Stage, mix: Mix, seconds: float) -> dict[str, Any]:
    """Send the mix in a closed loop while artifacts reload and an adapter comes and goes."""
    client, begin = stage.client, time.monotonic()
    async with (
        aiohttp.ClientSession(stage.server.url) as session,
        sampled_memory(stage) as samples,
        nullcontext() if mix.on_stock else in_background(reloads(session, mix)),
    ):
        visiting = [visits(stage, session, mix, seconds)] if all(mix.adapter) else []
        working = (work(stage, mix, begin + seconds) for _ in range(AT_ONCE))
        await asyncio.gather(*working, *visiting)
    if mix.doubtful:
        async with aiohttp.ClientSession(stage.server.url) as session:
            await ask_again(stage, session, mix)
    took = time.monotonic() - begin
    return {
        "samples": samples,
        "requests_per_second": client.tally.sent / took,
        "hours_at_5_a_second": client.tally.sent / 5 / 3600,
        "done": dict(mix.done),
        "gone": dict(mix.gone),
        "problems": mix.problems,
    }


async def work(stage: Stage, mix: Mix, end: float) -> None:
    """One client, which draws each request at random."""
    client, dice = stage.client, stage.dice
    short = next(one.body for one in client.questions if not one.deep)
    refused = cheap_refused(short)
    factors = [factor for factor in FACTORS if factor <= mix.largest]
    for number in range(1 << 30):
        if time.monotonic() > end:
            return
        index, chance = dice.randrange(len(client.questions)), dice.random()
        if chance < LEAVING:
            is_plain = "allowed_token_ids" in client.questions[index].body
            body = stage.to_leave(index, is_plain and dice.random() < 0.5)
            await client.leave(body, dice.uniform(0.01, 2))
        elif chance < LEAVING + REFUSED:
            reply = await send(stage, dice.choice(refused))
            if reply == 200 and not mix.on_stock:
                mix.problems.append("a request that should be refused was answered")
        elif chance < LEAVING + REFUSED + HOSTILE:
            thing, factor = dice.choice(THINGS), dice.choice(factors)
            reply = await send(stage, *thing.request(thing.base * factor, number))
            mix.done[f"{thing.title} x {factor}: HTTP {reply}"] += 1
        else:
            await client.ask(index)


async def send(stage: Stage, body: Any, headers: Mapping[str, str] | None = None) -> int:
    """Send a request that may be refused; returns its status."""
    stage.client.tally.sent += 1
    reply = await stage.client.send(body, headers)
    stage.client.count(reply, refusable=True)
    return reply.status


async def reloads(session: aiohttp.ClientSession, mix: Mix) -> None:
    """Reload the artifacts every `RELOAD_SECONDS`."""
    while True:
        await post(session, mix, RELOAD)
        await asyncio.sleep(RELOAD_SECONDS)


async def visits(stage: Stage, session: aiohttp.ClientSession, mix: Mix, seconds: float) -> None:
    """Repeatedly load the adapter under its second name, ask it, and unload it."""
    end = time.monotonic() + seconds
    own = of_adapter(stage, mix)
    while time.monotonic() < end:
        pause = asyncio.create_task(asyncio.sleep(max(seconds / VISITS, 1)))
        await load(session, mix)
        for index in stage.dice.sample(own, ASKED_IN_A_VISIT):
            stage.client.tally.sent += 1
            reply = await as_guest(stage, index)
            if reply.status == 200 and reply.tokens != stage.client.expected[index]:
                mix.doubtful.append(index)
            else:
                stage.client.count(reply)
        await unload(stage, session, mix)
        await pause


async def ask_again(stage: Stage, session: aiohttp.ClientSession, mix: Mix) -> None:
    """Ask the guest its doubtful questions again, one at a time."""
    await load(session, mix)
    for index in mix.doubtful:
        stage.client.judge(index, await as_guest(stage, index))
    await unload(stage, session, mix)


def of_adapter(stage: Stage, mix: Mix) -> list[int]:
    """Indices of the adapter's questions."""
    questions = enumerate(stage.client.questions)
    return [index for index, question in questions if question.kind == mix.adapter[0]]


async def as_guest(stage: Stage, index: int) -> Any:
    """Send a question of the adapter to its second name."""
    return await stage.client.send({**stage.client.questions[index].body, "model": GUEST})


async def load(session: aiohttp.ClientSession, mix: Mix) -> None:
    """Load the guest."""
    asked = {"lora_name": GUEST, "lora_path": str(Path(mix.adapter[1]).absolute())}
    await post(session, mix, "/v1/load_lora_adapter", asked)


async def unload(stage: Stage, session: aiohttp.ClientSession, mix: Mix) -> None:
    """Unload the guest, after reading the metrics that vanish with its policy."""
    await asyncio.sleep(REPORT_SECONDS)
    mix.gone.update(await asyncio.to_thread(of_policy, stage.server, GUEST))
    await post(session, mix, "/v1/unload_lora_adapter", {"lora_name": GUEST})
    await asyncio.sleep(2 * REPORT_SECONDS)
    # What an engine without work has not taken back yet will be read again.
    mix.gone.subtract(await asyncio.to_thread(of_policy, stage.server, GUEST))


async def post(
    session: aiohttp.ClientSession, mix: Mix, path: str, body: Mapping[str, Any] | None = None
) -> None:
    """POST, and record any status but 200 as a problem."""
    async with session.post(path, json=body) as response:
        told = await response.text()
    mix.done[path] += 1
    if response.status != 200:
        mix.problems.append(f"{path}: {response.status}: {told[:200]}")


if __name__ == "__main__":
    typer.run(main)
