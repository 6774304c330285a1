r"""A server with everything on lives through everything that clients do.

    .venv/bin/python benchmarks/soak/bench_everything.py --model MODEL --minutes 15 \
        --artifact sst2=policies/sst2 --data sst2.jsonl --template $'Review: {text}\nSentiment:' \
        --artifact trec=policies/trec --data trec.jsonl --template $'Question: {text}\nType:' \
        --choices choices=policies/choices --pool pool=policies/pool --pool-data lines.jsonl \
        --adapter decisions=DIR

Policies for labels, for choices, for a label pool, and one that lies beside an adapter
(DIR/adainfer); requests are captured. There are no shadows, because their answers, of full depth,
may differ from those of the quiet pass. In the mix: questions to each policy, at full depth,
generated texts, clients that leave, requests to be refused, and those of `hostile_growth.py` up to
a size. Meanwhile artifacts are reloaded, and the adapter comes and goes under another name. Answers
are judged as in `bench_faults.py`. Choices and the adapter are asked with the first data and
template, the pool with its own lines of a batch file.
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
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # imports start at the checkout

import aiohttp
import typer

from benchmarks.common.server import serving
from benchmarks.soak.fault_bench import ENVIRONMENT, Bench, tasks
from benchmarks.soak.fault_measures import of_policy
from benchmarks.soak.fault_scenarios import AT_ONCE, RELOAD, Stage, meanwhile, sampled_memory
from benchmarks.soak.faults_report import growth
from benchmarks.soak.hostile_growth import FACTORS, THINGS
from benchmarks.soak.hostile_requests import cheap_refused
from benchmarks.soak.load_client import Question
from vllm_adainfer.policy.artifact_files import load_artifact_config

GUEST = "guest"  # the adapter's other name
# A CPU gives rows without an adapter the update of the one in the last slot, and each load takes
# another slot, see docs/adapters.md.
SLOTS = 32
VISITS = SLOTS - 4
ASKED_IN_A_VISIT = 8
ADAPTER_ROWS = 20  # few, because adapters are slow on a CPU
RELOAD_SECONDS = 10.0
REPORT_SECONDS = 1.0  # until what was decided is in the metrics
LEAVING, REFUSED, HOSTILE = 0.04, 0.02, 0.02  # shares of the requests
ARGUMENTS = ("--max-model-len", "2048", "--enable-lora", "--max-loras", f"{SLOTS}")
RUNTIME = {**ENVIRONMENT, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


@dataclass
class Mix:
    """What is sent, beside questions.

    Attributes:
        largest: factor of the hostile requests' size.
        adapter: name and directory.
        problems: sentences.
        done: how often what else was done.
        doubtful: indices of questions that the guest answered differently than the adapter.
        gone: what was counted of the guest's policy before it went.

    """

    largest: int
    adapter: tuple[str, str]
    problems: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    doubtful: list[int] = field(default_factory=list)
    gone: Counter[str] = field(default_factory=Counter)


def main(
    model: Annotated[str, typer.Option(help="Directory or hub id.")],
    artifact: Annotated[list[str], typer.Option(help="NAME=DIR, one per policy for labels.")],
    data: Annotated[list[Path], typer.Option(help="JSON lines, one file per such policy.")],
    template: Annotated[list[str], typer.Option(help="For the prompts, one per such policy.")],
    choices: Annotated[str, typer.Option(help="NAME=DIR of a policy for choices.")],
    adapter: Annotated[str, typer.Option(help="NAME=DIR of an adapter with DIR/adainfer.")],
    pool: Annotated[str, typer.Option(help="NAME=DIR of a policy with a label pool.")] = "",
    pool_data: Annotated[Path | None, typer.Option(help="Lines of a batch file for it.")] = None,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/everything.json"),
    minutes: Annotated[float, typer.Option()] = 15,
    rows: Annotated[int, typer.Option(help="Rows of the data per policy.")] = 50,
    largest: Annotated[int, typer.Option(help="Largest factor of hostile requests.")] = 100,
    rank: Annotated[int, typer.Option(help="Largest rank of an adapter.")] = 16,
) -> None:
    """Serve, ask, and write JSON and a Markdown table beside each other."""
    sources, questions = tasks(artifact, data, template, rows)
    first = [one for one in questions if one.kind == next(iter(sources)) and not one.deep]
    name, _, directory = adapter.partition("=")
    others = dict(named.split("=", 1) for named in (choices, pool) if named)
    questions += choice_questions(first, *choices.split("=", 1))
    questions += adapter_questions(first[:ADAPTER_ROWS], name, directory)
    if pool_data is not None:
        questions += pool_questions(pool.partition("=")[0], pool_data, rows)
    bench = Bench(questions, Path(next(iter(sources.values()))))
    points = load_artifact_config(f"{directory}/adainfer").exit_points
    with (
        tempfile.TemporaryDirectory() as folder,
        bench.written_to(output, model, [*sources, *others, name]),
    ):
        switch = {
            "artifact": {**sources, **others},
            "exit_points": list(points),
            "capture": {"directory": f"{folder}/captured", "rate": 0.1},
        }
        flags = (*ARGUMENTS, "--max-lora-rank", f"{rank}", "--lora-modules", adapter)
        with serving(model, switch, Path(folder, "server.log"), flags, RUNTIME) as server:
            bench.quiet(server)
            mix = Mix(largest, (name, directory))
            row = bench.run("soak", server, partial(everything_for, mix=mix, seconds=60 * minutes))
            row["growth"] = growth(row["samples"])
        lines = [line for file in Path(folder, "captured").glob("*.jsonl") for line in file.open()]
        row["captured"] = sum("url" in json.loads(line) for line in lines)
        if not row["captured"]:
            row["problems"].append("no request was captured")


def choice_questions(asked: Sequence[Question], name: str, directory: str) -> list[Question]:
    """The same prompts for a choice, early and at full depth."""
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
    """The same prompts for an adapter, about the labels of its policy."""
    labels = list(load_artifact_config(f"{directory}/adainfer").label_ids)
    more = {"model": name, "allowed_token_ids": labels}
    return [replace(question, kind=name, body={**question.body, **more}) for question in asked]


def pool_questions(name: str, data: Path, rows: int) -> list[Question]:
    """Lines of a batch file, as they are."""
    more = {"model": "model", "temperature": 0, "return_token_ids": True}
    lines = data.read_text().splitlines()[:rows]
    return [Question(name, False, {**json.loads(line)["body"], **more}) for line in lines]


async def everything_for(stage: Stage, mix: Mix, seconds: float) -> dict[str, Any]:
    """The mix, in a closed loop, while artifacts and an adapter come and go."""
    client, begin = stage.client, time.monotonic()
    async with (
        aiohttp.ClientSession(stage.server.url) as session,
        sampled_memory(stage) as samples,
        meanwhile(reloads(session, mix)),
    ):
        visiting = asyncio.create_task(visits(stage, session, mix, seconds))
        await asyncio.gather(*(work(stage, mix, begin + seconds) for _ in range(AT_ONCE)))
        await visiting
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
    """One client, which sends whatever comes to its mind."""
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
            if reply == 200:
                mix.problems.append("a request that should be refused was answered")
        elif chance < LEAVING + REFUSED + HOSTILE:
            thing, factor = dice.choice(THINGS), dice.choice(factors)
            reply = await send(stage, *thing.request(thing.base * factor, number))
            mix.done[f"{thing.title} x {factor}: HTTP {reply}"] += 1
        else:
            await client.ask(index)


async def send(stage: Stage, body: Any, headers: Mapping[str, str] | None = None) -> int:
    """The status of a request that may be refused."""
    stage.client.tally.sent += 1
    reply = await stage.client.send(body, headers)
    stage.client.count(reply, refusable=True)
    return reply.status


async def reloads(session: aiohttp.ClientSession, mix: Mix) -> None:
    """Reload the artifacts now and then."""
    while True:
        await post(session, mix, RELOAD)
        await asyncio.sleep(RELOAD_SECONDS)


async def visits(stage: Stage, session: aiohttp.ClientSession, mix: Mix, seconds: float) -> None:
    """Load the adapter under another name, ask it, and unload it, again and again."""
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
    """The guest's doubtful questions, alone."""
    await load(session, mix)
    for index in mix.doubtful:
        stage.client.judge(index, await as_guest(stage, index))
    await unload(stage, session, mix)


def of_adapter(stage: Stage, mix: Mix) -> list[int]:
    """Indices of its questions."""
    questions = enumerate(stage.client.questions)
    return [index for index, question in questions if question.kind == mix.adapter[0]]


async def as_guest(stage: Stage, index: int) -> Any:
    """The reply to a question of the adapter under its other name."""
    return await stage.client.send({**stage.client.questions[index].body, "model": GUEST})


async def load(session: aiohttp.ClientSession, mix: Mix) -> None:
    """The guest comes."""
    asked = {"lora_name": GUEST, "lora_path": str(Path(mix.adapter[1]).absolute())}
    await post(session, mix, "/v1/load_lora_adapter", asked)


async def unload(stage: Stage, session: aiohttp.ClientSession, mix: Mix) -> None:
    """The guest goes, and with it the metrics of its policy."""
    await asyncio.sleep(REPORT_SECONDS)
    mix.gone.update(await asyncio.to_thread(of_policy, stage.server, GUEST))
    await post(session, mix, "/v1/unload_lora_adapter", {"lora_name": GUEST})


async def post(
    session: aiohttp.ClientSession, mix: Mix, path: str, body: Mapping[str, Any] | None = None
) -> None:
    """Anything but 200 is a problem."""
    async with session.post(path, json=body) as response:
        told = await response.text()
    mix.done[path] += 1
    if response.status != 200:
        mix.problems.append(f"{path}: {response.status}: {told[:200]}")


if __name__ == "__main__":
    typer.run(main)
