"""A server that calibrates itself: whom it records, and whom its ledger lets exit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from adainfer_kernels import normed
from safetensors.torch import load_file
from torch import Tensor
from vllm import PoolingParams, SamplingParams
from vllm.lora.request import LoRARequest

from tests.adapters import merged, save_adapter
from tests.classifier import classifier
from tests.conftest import tiny_engine
from tests.e2e.asking import ask, greedy, tokens
from tests.e2e.oracle import hidden_states
from tests.e2e.pooled import LEVELS
from tests.e2e.scripted import parts, running_of
from tests.full import full_on_v2
from tests.tiny import LAYERS, served_fingerprint, tiny_artifact, tiny_config
from tests.waiting import wait_for
from vllm_adainfer.arrays import Floats
from vllm_adainfer.artifact.config import policy_of
from vllm_adainfer.artifact.fields import Label, LastToken
from vllm_adainfer.auto import endings
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.table import RECURS
from vllm_adainfer.auto.tries import CERTIFIED, RECORDING, State, Try
from vllm_adainfer.engine.runner import admitted_kinds
from vllm_adainfer.engine.scheduler import kinds as kind_counts
from vllm_adainfer.engine.worker import self_calibration
from vllm_adainfer.engine.worker.trainer_process import TrainerProcess
from vllm_adainfer.exits.recording.recorder import CHUNK
from vllm_adainfer.offline.adapter import read_adapter
from vllm_adainfer.watch import ledger as ledgers
from vllm_adainfer.watch.ledger import Ledger

DRAW = np.random.default_rng(0)
# Of one row, longer than a step of 128 rows, and all between; those before `RECURS` are not kept.
PROMPTS = [DRAW.integers(5, 1000, n).tolist() for n in DRAW.integers(1, 200, RECURS + 2 * CHUNK)]
# Prompts of a kind of their own, which all begin alike; the prefix cache has that of some.
BEGINNING = DRAW.integers(5, 1000, 40).tolist()
ALIKE = [[*BEGINNING, *prompt] for prompt in PROMPTS]
# What shares a prefix with one that left early may have to run all layers: tests have their own.
OF_PROBABILITIES, OF_POOL = ([[first, *prompt] for prompt in PROMPTS] for first in (4, 6))
TEXT = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
CUTS = (0, 2, 3, 4, 5)


@pytest.fixture(scope="module")
def labels(tiny_model: Path) -> list[int]:
    return list(tiny_config(tiny_model).label_ids)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> AutoDirectory:
    return AutoDirectory(tmp_path_factory.mktemp("auto") / "kinds")


@pytest.fixture(scope="module")
def auto(tiny_model: Path, directory: AutoDirectory) -> Iterator[Any]:
    """An engine that calibrates itself, without its trainer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainerProcess, "keep_running", lambda self: None)
        patch.setattr(self_calibration, "TICK_SECONDS", 0.05)
        patch.setattr(kind_counts, "WRITE_SECONDS", 0.05)
        yield tiny_engine(
            tiny_model,
            {"auto": {"directory": str(directory.root), "tolerance": 0.2}, "min_rows_saved": 1},
            max_model_len=512,
            kv_cache_memory_bytes=64 << 20,
        )


def label(labels: list[int], **arguments: Any) -> SamplingParams:
    return greedy(allowed_token_ids=labels, extra_args=arguments or None)


def rows_of(directory: AutoDirectory, kind: str) -> dict[str, Tensor]:
    files = [load_file(path) for path in sorted(directory.rows(kind).glob("*.safetensors"))]
    return {name: torch.cat([file[name] for file in files]) for name in files[0]} if files else {}


def oracle_answer(model: Any, prompt: list[int], labels: list[int]) -> int | None:
    """The label at full depth; None where two are too close to call."""
    state = model.model.norm(hidden_states(model, prompt)[LAYERS][-1:])
    scores = model.lm_head(state)[0, labels]
    best, second = scores.topk(2).values.tolist()
    return None if best - second < 1e-3 else labels[int(scores.argmax())]


@torch.inference_mode()
def test_a_kind_that_recurs_is_recorded_and_every_answer_is_that_of_full_depth(
    auto, directory, labels, reference
):
    kind = Kind("label", tuple(sorted(labels))).name(directory.salt)
    texts = tokens(auto, PROMPTS[:4], TEXT)
    answers = tokens(auto, PROMPTS, label(labels))
    assert texts == tokens(auto, PROMPTS[:4], TEXT)
    for prompt, [token] in zip(PROMPTS, answers, strict=True):
        assert oracle_answer(reference, prompt, labels) in (None, token)
    recorded = wait_for(lambda: rows_of(directory, kind))
    count = len(recorded["computed"])
    assert CHUNK <= count <= len(PROMPTS) - RECURS + 16, "a step of those that made it recur"
    named = {f"{what}.{cut}" for cut in CUTS for what in ("layer", "mean")}
    assert set(recorded) == {*named, "final", "computed", "subset"}
    states = [hidden_states(reference, prompt) for prompt in PROMPTS]
    found = set()
    for row in range(count):
        distances = [float((recorded["layer.5"][row] - one[5][-1]).norm()) for one in states]
        place = int(np.argmin(distances))
        found.add(place)
        for cut in CUTS:
            torch.testing.assert_close(
                recorded[f"layer.{cut}"][row], states[place][cut][-1], rtol=1e-3, atol=1e-3
            )
        final = reference.model.norm(states[place][LAYERS][-1:])[0]
        torch.testing.assert_close(recorded["final"][row], final, rtol=1e-3, atol=1e-3)
    assert len(found) == count


@torch.inference_mode()
def test_the_means_over_whole_prompts_are_recorded_from_where_they_differ(
    auto, directory, labels, reference
):
    """Of chunked prompts, too; not where the prefix cache has rows that are to be read."""
    own = [*labels, 9]
    kind = Kind("label", tuple(sorted(own))).name(directory.salt)
    tokens(auto, ALIKE, label(own))
    tokens(auto, ALIKE, label(own))  # of these the prefix cache has nearly all
    admitted = running_of(parts(auto)[1]).kinds.kinds[kind]
    assert admitted.pooled_from == len(BEGINNING)
    loop = parts(auto)[0].loop
    assert loop.times.means.seconds > 0
    assert loop.times.means.work > 0
    read = loop.times.means.work
    tokens(auto, ALIKE[:4], TEXT)
    assert loop.times.means.work == read, "the means of nobody are read"
    wait_for(lambda: len(rows_of(directory, kind).get("final", ())) >= 2 * CHUNK)
    recorded = rows_of(directory, kind)
    states = [hidden_states(reference, prompt) for prompt in ALIKE]
    found = 0
    for row in range(len(recorded["computed"])):
        distances = [float((recorded["layer.5"][row] - one[5][-1]).norm()) for one in states]
        own_states, mean = states[int(np.argmin(distances))], recorded["mean.5"][row]
        if mean.isnan().any():
            assert all(recorded[f"mean.{cut}"][row].isnan().all() for cut in CUTS)
            continue
        found += 1
        for cut in CUTS:
            expected = normed(own_states[cut][len(BEGINNING) :]).mean(0)
            torch.testing.assert_close(
                recorded[f"mean.{cut}"][row].float(), expected, rtol=2e-2, atol=5e-3
            )
    assert CHUNK < found < len(recorded["computed"])


def test_only_its_user_can_read_the_directory(auto, directory, labels):
    tokens(auto, PROMPTS, label(labels))
    wait_for(lambda: [*directory.root.rglob("*.safetensors")])
    for path in [directory.root, *directory.root.rglob("*")]:
        assert path.stat().st_mode & 0o077 == 0, path


def read_probabilities(llm: Any, prompts: list[list[int]], labels: list[int]) -> Floats:
    """[prompts, labels], in the whole vocabulary."""
    answers = ask(llm, prompts, greedy(logprob_token_ids=labels))
    return np.exp([[answer.logprobs[0][one].logprob for one in labels] for answer in answers])


def moved(early: Floats, full: Floats) -> int:
    """Answers whose probabilities moved by more than the tolerance, or with another best label."""
    return int(((np.abs(early - full).max(1) > 0.2) | (early.argmax(1) != full.argmax(1))).sum())


@full_on_v2
def test_probabilities_are_a_kind_whose_policy_decides_no_request_for_the_label(
    auto, directory, tiny_model, labels
):
    kind = Kind("probabilities", tuple(sorted(labels))).name(directory.salt)
    full = read_probabilities(auto, OF_PROBABILITIES, labels)
    wait_for(lambda: rows_of(directory, kind))
    promise = {"risk": "probability", "tolerance": 0.2, "label_mass": True}
    tiny_artifact(tiny_model, directory.policy(kind, 1), exit_points=CUTS[1:3], **promise)
    certify(directory, kind, 1)
    wait_for(lambda: kind_policy(directory, kind) == 1)
    tokens(auto, PROMPTS[:1], TEXT)  # the step after takes the policy into service
    own = running_of(parts(auto)[1]).kinds.kinds[kind]
    own.ledger.allowed = 60.0
    early = read_probabilities(auto, OF_PROBABILITIES, labels)
    assert 0 < moved(early, full) <= own.ledger.changed_at_most <= own.ledger.allowed
    before = depths(auto, kind)
    assert before.total() == own.ledger.decided > 0
    tokens(auto, PROMPTS, label(labels))
    assert depths(auto, kind) == before


@pytest.fixture(scope="module")
def classifying(tiny_model: Path, tmp_path_factory) -> Iterator[tuple[Any, Path, AutoDirectory]]:
    """A classifier that calibrates itself, without its trainer."""
    model = classifier(tiny_model, tmp_path_factory.mktemp("classifier") / "softmax", 3)
    place = AutoDirectory(tmp_path_factory.mktemp("auto") / "classes")
    switch = {"auto": {"directory": str(place.root), "tolerance": 0.2}, "min_rows_saved": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainerProcess, "keep_running", lambda self: None)
        patch.setattr(self_calibration, "TICK_SECONDS", 0.05)
        small = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 512}
        yield tiny_engine(model, switch, **small), model, place


def classify(llm: Any, prompts: list[list[int]]) -> Floats:
    """[prompts, classes], their probabilities."""
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    params = PoolingParams(task="classify")
    found = llm.encode(asked, params, pooling_task="classify", use_tqdm=False)
    return np.array([output.outputs.data.tolist() for output in found])


@full_on_v2
def test_labels_that_vary_from_request_to_request_are_one_kind_with_a_pool(
    auto, directory, tiny_model
):
    """Each is recorded with the labels that it names, and answered with one of them."""
    pool = [20, 30, 40, 50, 60]
    sets = [list(some) for size in (2, 3) for some in combinations(pool, size)]
    asked = [sets[place % len(sets)] for place in range(len(OF_POOL) * 2)]
    kind = Kind("label", tuple(pool), is_pool=True).name(directory.salt)
    params = [label(some) for some in asked]
    tokens(auto, OF_POOL * 2, params)
    wait_for(lambda: read_json(directory.kinds)["served_pools"])
    full = tokens(auto, OF_POOL * 2, params)
    rows = wait_for(lambda: rows_of(directory, kind))
    named = {sum(1 << pool.index(one) for one in some) for some in sets}
    assert set(rows["subset"].tolist()) == named
    labels = tuple(Label(name=f"label {token}", token_id=token) for token in pool)
    own = {"labels": labels, "label_pool": True, "exit_points": CUTS[1:3]}
    tiny_artifact(tiny_model, directory.policy(kind, 1), **own)
    certify(directory, kind, 1)
    wait_for(lambda: kind_policy(directory, kind) == 1)
    tokens(auto, PROMPTS[:1], TEXT)
    ledger = running_of(parts(auto)[1]).kinds.kinds[kind].ledger
    ledger.allowed = 60.0
    early = tokens(auto, OF_POOL * 2, params)
    assert all(token in some for [token], some in zip(early, asked, strict=True))
    changed = sum(one != two for one, two in zip(early, full, strict=True))
    assert 0 < changed <= ledger.changed_at_most <= ledger.allowed


@full_on_v2
def test_two_questions_with_the_same_labels_become_two_kinds_once_many_asked_them(
    auto, directory, monkeypatch
):
    """They end alike, and differ before that."""
    monkeypatch.setattr(endings, "ASKED", len(PROMPTS) // 2)
    questions, end, own = [[70, 71, 72, 73], [80, 81, 82, 83]], [90, 91, 92, 93], [15, 25]
    asked = [[8, *prompt, *questions[n % 2], *end] for n, prompt in enumerate(PROMPTS)]
    tokens(auto, asked, label(own))
    wait_for(lambda: read_json(directory.kinds)["questions"])
    tokens(auto, asked, label(own))  # after which all have places
    whole = Kind("label", tuple(own))
    kinds = [whole, *(replace(whole, ending=(*question, *end)) for question in questions)]
    admitted = running_of(parts(auto)[1]).kinds.kinds

    def counted() -> list[int]:
        return [admitted[kind.name(directory.salt)].ledger.requests for kind in kinds]

    before = counted()
    tokens(auto, [*asked[:21], *PROMPTS[:5]], label(own))
    added = [now - then for now, then in zip(counted(), before, strict=True)]
    assert added == [5, 11, 10], "five ask neither"


@full_on_v2
@torch.inference_mode()
def test_requests_under_an_adapter_are_a_kind_and_its_policy_is_for_these_weights(
    tiny_model, reference, tmp_path_factory, labels
):
    """An adapter with weights for the LM head, which the trainer has not, gets none."""
    folder = tmp_path_factory.mktemp("adapters")
    place = AutoDirectory(folder / "auto")
    named = {"few": ("q_proj", "down_proj"), "head": ("q_proj", "lm_head")}
    few, head = (
        LoRARequest(name, number, str(save_adapter(reference, folder / name, number, modules)))
        for number, (name, modules) in enumerate(named.items(), start=1)
    )
    own_model = merged(reference, Path(few.lora_path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainerProcess, "keep_running", lambda self: None)
        patch.setattr(self_calibration, "TICK_SECONDS", 0.05)
        patch.setattr(ledgers, "ERROR_RATE", 1e-300)  # nothing closes it
        llm = tiny_engine(
            tiny_model,
            {"auto": {"directory": str(place.root)}, "min_rows_saved": 1},
            enable_lora=True,
            max_loras=3,
            max_lora_rank=8,
            max_model_len=320,
            kv_cache_memory_bytes=8 << 20,
        )
        for adapter in (few, head):
            tokens(llm, PROMPTS, label(labels), lora_request=adapter)
        kinds = running_of(parts(llm)[1]).kinds.kinds
        kind = Kind("label", tuple(sorted(labels)), adapter="few").name(place.salt)
        assert [*kinds] == [kind]
        described = read_adapter(f"few={few.lora_path}").described
        assert kinds[kind].weights == described.fingerprint
        rows = wait_for(lambda: rows_of(place, kind))
        states = [hidden_states(own_model, prompt)[CUTS[-1]][-1] for prompt in PROMPTS]
        for row in rows[f"layer.{CUTS[-1]}"]:
            assert min(float((row - state).norm()) for state in states) < 1e-2
        shape = {"exit_points": CUTS[1:3], "adapter": described}
        tiny_artifact(tiny_model, place.policy(kind, 1), **shape)
        certify(place, kind, 1)
        wait_for(lambda: kind_policy(place, kind) == 1)
        tokens(llm, PROMPTS[:1], TEXT)
        kinds[kind].ledger.allowed = 1000.0
        tokens(llm, PROMPTS[:20], label(labels), lora_request=few)
        assert kinds[kind].ledger.decided > 10


@full_on_v2
def test_a_classifier_records_its_requests_and_changes_no_more_than_its_ledger_allows(classifying):
    llm, model, place = classifying
    kind = Kind("scores").name(place.salt)
    full = classify(llm, PROMPTS)
    wait_for(lambda: rows_of(place, kind))
    config = {
        "architecture": "LlamaForSequenceClassification",
        "score_head": "softmax",
        "weights_fingerprint": served_fingerprint(model),
        "labels": tuple(Label(name=f"c{column}", token_id=column) for column in range(3)),
        "risk": "probability",
        "tolerance": 0.2,
        "exit_points": CUTS[1:3],
    }
    tiny_artifact(model, place.policy(kind, 1), **config)
    certify(place, kind, 1)
    wait_for(lambda: kind_policy(place, kind) == 1)
    classify(llm, PROMPTS[:1])
    own = running_of(parts(llm)[1]).kinds.kinds[kind]
    own.ledger.allowed = 60.0
    early = classify(llm, PROMPTS)
    assert 0 < moved(early, full) <= own.ledger.changed_at_most <= own.ledger.allowed
    assert depths(llm, kind).total() == own.ledger.decided > 0


def test_full_depth_by_choice_sampled_and_lone_answers_are_no_kind_and_earn_no_budget(auto, labels):
    kinds = running_of(parts(auto)[1]).kinds
    before = {name: own.ledger.requests for name, own in kinds.kinds.items()}
    many = PROMPTS[: 2 * RECURS]
    tokens(auto, many, label(labels, adainfer=0))
    tokens(auto, many, label(labels, adainfer_epsilon=0))
    tokens(auto, many, label(labels[:1]))
    tokens(auto, many, SamplingParams(temperature=1, max_tokens=1, allowed_token_ids=labels))
    assert {name: own.ledger.requests for name, own in kinds.kinds.items()} == before


def certify(
    directory: AutoDirectory, kind: str, number: int, course: int = 0, status: str = CERTIFIED
) -> None:
    """Say that a policy is certified, as the trainer does."""
    state = State(status, (Try(number, "", 0, 0, 1, CERTIFIED, course),))
    write_json(directory.trainer(kind), asdict(state))


def kind_policy(directory: AutoDirectory, kind: str) -> int | None:
    """The policy that has come into service last, by the events."""
    events = [event for event in directory.told() if event["event"] == "serving"]
    numbers = [event["policy"] for event in events if event["kind"] == kind]
    return numbers[-1] if numbers else None


POLICIES = {
    "last token": {"exit_points": CUTS[1:3]},
    "whole prompt": {
        "exit_points": CUTS[:2],
        "probe": "pooled-label-head",
        "pooled_from": 2,
        "last_token": LastToken(exit_points=CUTS[1:3], levels=LEVELS),
        "levels": LEVELS,
    },
}


@pytest.fixture
def served(auto, directory, tiny_model, labels, request) -> tuple[str, Any]:
    """The kind, with a random policy that settles everybody and a budget of its own to set.

    It misses so often that evidence would close the kind at once.
    """
    kind = Kind("label", tuple(sorted(labels))).name(directory.salt)
    reads = getattr(request, "param", "last token")
    number = 10 + 10 * [*POLICIES].index(reads)
    tiny_artifact(tiny_model, directory.policy(kind, number), **POLICIES[reads])
    tokens(auto, PROMPTS[: 2 * RECURS], label(labels))
    certify(directory, kind, number)
    own = running_of(parts(auto)[1]).kinds.kinds[kind]
    wait_for(lambda: own.state == "served" and kind_policy(directory, kind) == number)
    tokens(auto, PROMPTS[:1], TEXT)  # the step after takes the policy into service
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledgers, "ERROR_RATE", 1e-300)
        own.ledger = Ledger(0.02, 0.1, 0.25)
    return kind, own


def depths(llm: Any, kind: str) -> Counter[int]:
    """How many layers requests under the kind's policy ran, whichever part decided them."""
    work = parts(llm)[0].loop.stats.as_dict()["policies"]
    own = [found["exit_histogram"] for part, found in work.items() if policy_of(part) == kind]
    return sum(map(Counter, own), Counter[int]())


@pytest.mark.parametrize("served", ["whole prompt", "last token"], indirect=True)
def test_nobody_exits_until_the_budget_allows_for_it_and_no_more_than_it_allows(
    auto, directory, labels, served, monkeypatch
):
    kind, own = served
    monkeypatch.setattr(running_of(parts(auto)[1]).kinds, "_toss", Random(0).random)
    full = tokens(auto, PROMPTS, label(labels))
    assert own.ledger.decided == 0
    assert own.ledger.requests == len(PROMPTS)
    own.ledger.allowed = 60.0
    before = sum(depths(auto, kind).values())
    auto.reset_prefix_cache()  # or no prompt is read as a whole
    early = tokens(auto, PROMPTS * 2, label(labels))
    ledger = own.ledger
    changed = sum(one != two for one, two in zip(early, full * 2, strict=True))
    assert ledger.misses > 0, "a random policy misses"
    assert 0 < changed <= ledger.changed_at_most <= ledger.allowed
    histogram = depths(auto, kind)
    assert sum(histogram.values()) - before == ledger.decided
    early = sum(count for layer, count in histogram.items() if layer < LAYERS)
    assert early > histogram[LAYERS] > 0, "most leave, some are compared"
    written = read_json(directory.ledger(kind))
    assert written["misses"] + written["reserved"] >= ledger.misses, "written ahead"
    # No block that an exit left incomplete is in the prefix cache.
    assert tokens(auto, PROMPTS, label(labels, adainfer=0)) == full


def test_while_the_ledger_cannot_be_written_nobody_exits(auto, labels, served, monkeypatch):
    _, own = served
    own.ledger.allowed = 1000.0
    monkeypatch.setattr(AutoDirectory, "ledger", lambda self, kind: Path("/proc/none/ledger.json"))
    own.note()  # the fixture's new ledger may be on disk already, and is written once
    wait_for(lambda: not own.is_saved)
    tokens(auto, PROMPTS, label(labels))
    assert own.ledger.decided == 0
    monkeypatch.undo()
    wait_for(lambda: own.is_saved)
    tokens(auto, PROMPTS[:10], label(labels))
    assert own.ledger.decided == 10


@pytest.mark.parametrize(
    ("number", "damage"),
    [
        pytest.param(1, {"exit_points": (1, 3)}, id="other exit points"),
        pytest.param(2, {"weights_fingerprint": "0123456789abcdef"}, id="other weights"),
        pytest.param(3, None, id="no files"),
    ],
)
def test_a_policy_that_cannot_be_served_is_put_away_and_the_one_before_serves_on(
    auto, directory, tiny_model, labels, served, number, damage
):
    kind, own = served
    number += kind_policy(directory, kind)
    if damage is None:
        directory.policy(kind, number).mkdir()
    else:
        tiny_artifact(tiny_model, directory.policy(kind, number), **damage)
    certify(directory, kind, number)
    wait_for(lambda: read_json(directory.ledger(kind))["quarantined"].get("policy") == number)
    own.ledger.allowed = 1000.0
    tokens(auto, PROMPTS[:10], label(labels))
    assert own.ledger.decided == 10


@full_on_v2
def test_while_a_policy_serves_those_who_are_compared_are_recorded_for_a_better_one(
    auto, directory, labels, served, monkeypatch
):
    kind, own = served
    certify(directory, kind, own.certified, status=RECORDING)
    wait_for(lambda: own.records)
    own.ledger.allowed = 1000.0
    before = len(rows_of(directory, kind).get("final", ()))
    exits = sum(count for layer, count in depths(auto, kind).items() if layer < LAYERS)
    tokens(auto, PROMPTS * 4, label(labels))
    exits -= sum(count for layer, count in depths(auto, kind).items() if layer < LAYERS)
    assert exits < -CHUNK
    stayed = 4 * len(PROMPTS) + exits
    wait_for(lambda: len(rows_of(directory, kind)["final"]) - before > stayed - 2 * CHUNK)
    assert len(rows_of(directory, kind)["final"]) - before <= stayed + CHUNK


@full_on_v2
def test_a_closed_kind_is_recorded_anew_and_opens_with_a_policy_of_those_rows(
    auto, directory, tiny_model, labels, served, monkeypatch
):
    kind, own = served
    number, full = own.certified, tokens(auto, PROMPTS, label(labels, adainfer=0))
    monkeypatch.setattr(ledgers, "ERROR_RATE", 0.01)
    own.ledger.open_again()  # with that rate
    while not own.ledger.is_closed:
        own.ledger.allowed = 1000.0
        tokens(auto, PROMPTS[:20], label(labels))
    wait_for(lambda: own.state == "recording" and own.records)
    misses = own.ledger.misses
    assert tokens(auto, PROMPTS, label(labels)) == full
    wait_for(lambda: rows_of(directory, kind))
    tiny_artifact(tiny_model, directory.policy(kind, number + 5), **POLICIES["last token"])
    certify(directory, kind, number)  # that of the course before
    certify(directory, kind, number + 5, course=own.course)
    wait_for(lambda: kind_policy(directory, kind) == number + 5)
    tokens(auto, PROMPTS[:1], TEXT)
    assert not own.ledger.is_closed
    assert own.ledger.misses >= misses, "what is spent stays spent"
    own.ledger.allowed = 1000.0
    monkeypatch.setattr(ledgers, "ERROR_RATE", 1e-300)
    own.ledger.open_again()
    before = own.ledger.decided
    tokens(auto, PROMPTS, label(labels))
    assert own.ledger.decided > before


def test_a_client_cannot_ask_a_server_that_calibrates_itself_for_another_bound(auto, labels):
    with pytest.raises(Exception, match="makes one promise for all: drop adainfer_epsilon"):
        tokens(auto, PROMPTS[:1], label(labels, adainfer_epsilon=0.5))


def test_a_kind_that_loses_its_place_leaves_nothing_and_begins_anew(
    auto, directory, labels, served, monkeypatch
):
    kind, own = served
    full = tokens(auto, PROMPTS, label(labels, adainfer=0))
    own.ledger.allowed = 1000.0
    kinds = running_of(parts(auto)[1]).kinds.kinds
    for name in [name for name in kinds if name != kind]:
        del kinds[name]
    monkeypatch.setattr(admitted_kinds, "MOST_KINDS", 1)
    own.since = 0.0
    own.recent.requests = RECURS / 4
    loop = parts(auto)[0].loop
    assert kind in loop.policies.names
    tokens(auto, PROMPTS[:RECURS], label([*labels, 7]))
    assert kind not in kinds
    tokens(auto, PROMPTS[:1], TEXT)  # the step after takes the policy out of service
    assert kind not in loop.policies.names
    wait_for(lambda: not (directory.root / kind).exists())
    assert tokens(auto, PROMPTS, label(labels)) == full
    monkeypatch.setattr(admitted_kinds, "MOST_KINDS", 64)
    tokens(auto, PROMPTS[:RECURS], label(labels))
    assert kinds[kind].ledger.requests == len(PROMPTS[:RECURS])
    assert kinds[kind].state == "recording"
    assert kind not in loop.policies.names
