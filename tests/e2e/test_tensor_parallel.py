"""Two ranks answer as one does, and leave at the same layers, on each rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.distributed import get_tp_group
from vllm.lora.request import LoRARequest

from tests import student
from tests.adapters import save_adapter
from tests.admitted import draw_by_the_clients_ids
from tests.conftest import tiny_engine
from tests.e2e.asking import tokens
from tests.tiny import EXIT_POINTS, FROM_ZERO, LAYERS, tiny_artifact, tiny_config, tiny_tensors
from tests.triton_on_cpu import IS_V2
from tests.waiting import wait_for
from vllm_adainfer.artifact.fields import LastToken, SharedTokens
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.auto.directory import AutoDirectory, write_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.tries import CERTIFIED, State, Try
from vllm_adainfer.engine.self_test import self_test
from vllm_adainfer.exits.loop.decisions import Decisions
from vllm_adainfer.exits.loop.shadow import ShadowAnswers
from vllm_adainfer.offline.adapter import read_adapter
from vllm_adainfer.settings.engine import NO_POLICY
from vllm_adainfer.watch import ledger as ledgers
from vllm_adainfer.watch.ledger import Ledger

Artifacts = Callable[[str, float], Path]


@pytest.fixture
def artifacts(tiny_model: Path, tmp_path: Path) -> Artifacts:
    """Artifacts of a probe with a threshold on its gap, for one token or more."""

    def artifact(probe: str, threshold: float) -> Path:
        candidates = "labels" if "label-head" in probe else "full"
        more: dict[str, Any] = {} if candidates == "labels" else {"labels": (), "max_tokens": 8}
        if probe == "pooled-label-head":  # of prompts of up to five tokens, the last token alone
            last_token = LastToken(exit_points=EXIT_POINTS, levels=tiny_config(tiny_model).levels)
            more |= {"exit_points": FROM_ZERO, "pooled_from": 5, "last_token": last_token}
            more |= {"student": student.described(SharedTokens()), "branches": FROM_ZERO[1:2]}
        config = tiny_config(tiny_model, probe=probe, candidates=candidates, **more)
        thresholds = torch.full((len(config.levels), len(EXIT_POINTS)), threshold)
        tensors = tiny_tensors(config, thresholds, thresholds.clone())
        trained = (student.encoder(), student.tokenizer()) if config.student else ()
        save_artifact(tmp_path / probe, config, tensors, {}, "card\n", *trained)
        return tmp_path / probe

    return artifact


def perturb_second_rank(worker: Any) -> None:
    """Let it see other early answers of shadow requests, as rounding may at a near tie."""
    of_shadows = Decisions.of_shadows

    def perturbed(decisions: Decisions, *watch: Any) -> Iterator[ShadowAnswers]:
        for shadow in of_shadows(decisions, *watch):
            answers = shadow.answers
            yield (
                shadow
                if answers is None
                else replace(shadow, answers=replace(answers, values=-answers.values))
            )

    if get_tp_group().rank_in_group == 1:
        Decisions.of_shadows = perturbed


def failed_parts(worker: Any, errs_on: int | None = None) -> list[str]:
    """What the self-test finds, if results differ on one rank alone."""
    with pytest.MonkeyPatch.context() as patch:
        if get_tp_group().rank_in_group == errs_on:
            patch.setattr(self_test, "differences", lambda *_: "they differ")
        return [failure.part for failure in self_test.self_test(worker.model_runner).failures]


@pytest.mark.parametrize(
    ("probe", "threshold"),
    [
        pytest.param("pooled-label-head", 0.2, marks=pytest.mark.full),
        ("logit-lens", 0.1),
    ],
)
def test_two_ranks_decide_watch_and_answer_as_one(
    tiny_model, artifacts, ranks_on_cores, monkeypatch, probe, threshold
):
    """The head of a logit lens is spread over both ranks; others, students, branches are on each.

    Who leaves depends on bounds that shadow requests may close, so ranks have to agree on what
    those show, too.
    """
    draw_by_the_clients_ids("admission.admission", monkeypatch)
    switch = {
        "artifact": str(artifacts(probe, threshold)),
        "min_rows_saved": 1,
        "shadow_rate": 0.4,
    }
    generator = np.random.default_rng(5)
    prompts = [generator.integers(5, 1000, n).tolist() for n in (7, 1, 23, 150, 40, 3, 64, 12)]
    config, reads_labels = tiny_config(tiny_model), probe == "pooled-label-head"
    params = SamplingParams(
        temperature=0,
        max_tokens=1 if reads_labels else 8,
        ignore_eos=True,
        allowed_token_ids=list(config.label_ids) if reads_labels else None,
    )

    def run(ranks: int) -> tuple[list[list[int]], list[dict[str, Any]]]:
        engine = tiny_engine(
            tiny_model,
            switch,
            max_model_len=256,
            kv_cache_memory_bytes=16 << 20,
            tensor_parallel_size=ranks,
        )
        engine.collective_rpc(perturb_second_rank)
        answers = tokens(engine, prompts, params)
        counted = engine.collective_rpc("adainfer_stats")
        assert len(engine.collective_rpc("adainfer_reload")) == ranks
        if IS_V2:
            assert engine.collective_rpc(failed_parts) == [[]] * ranks
            assert engine.collective_rpc(failed_parts, args=(ranks - 1,)) == [["exits"]] * ranks
        return answers, counted

    (answers, [stats]), (answers_of_two, both) = run(1), run(2)
    assert answers_of_two == answers
    assert both == [stats, stats]
    assert sum(count > 0 for count in stats["exit_histogram"].values()) > 1
    assert sum(level["checked"] for level in stats["shadow"].values()) > 0


@pytest.mark.full
def test_two_ranks_serve_adapters_and_the_policy_beside_one_of_them_as_one_does(
    tiny_model, reference, artifacts, ranks_on_cores, tmp_path
):
    generator = np.random.default_rng(6)
    prompts = [generator.integers(5, 1000, n).tolist() for n in (7, 1, 23, 150, 40, 3, 64, 12, 90)]
    saved = [save_adapter(reference, tmp_path / str(seed), seed) for seed in range(2)]
    adapters = [LoRARequest(f"a{i}", i + 1, str(path)) for i, path in enumerate(saved)]
    described = read_adapter(f"a0={saved[0]}").described
    thresholds = torch.full((2, len(EXIT_POINTS)), 0.2)
    tiny_artifact(tiny_model, saved[0] / "adainfer", thresholds, adapter=described)
    switch = {
        "artifact": str(artifacts("label-head", 0.2)),
        "exit_points": EXIT_POINTS,
        "min_rows_saved": 1,
    }
    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        allowed_token_ids=list(tiny_config(tiny_model).label_ids),
    )

    def run(ranks: int) -> tuple[list[list[int]], list[dict[str, Any]]]:
        engine = tiny_engine(
            tiny_model,
            switch,
            max_model_len=256,
            kv_cache_memory_bytes=16 << 20,
            tensor_parallel_size=ranks,
            enable_lora=True,
            max_loras=3,
            max_lora_rank=8,
        )
        engine.llm_engine.add_lora(adapters[0])
        asked = [[None, *adapters][i % 3] for i in range(len(prompts))]
        answers = tokens(engine, prompts, params, lora_request=asked)
        return answers, engine.collective_rpc("adainfer_stats")

    (answers, [stats]), (answers_of_two, both) = run(1), run(2)
    assert answers_of_two == answers
    assert both == [stats, stats]
    assert set(stats["policies"]) == {"default", "a0", NO_POLICY}
    assert len(+Counter(stats["policies"]["a0"]["exit_histogram"])) > 0


def recorded_and_served(worker: Any) -> tuple[int, list[str], int]:
    """Ledgers of a rank, the policies that serve on it, and how many of its answers came early."""
    kinds = worker._running.kinds
    loop = worker.model_runner.model.loop
    early = {layer: n for layer, n in loop.stats.exit_histogram.items() if layer < LAYERS}
    return 0 if kinds is None else len(kinds.kinds), list(loop.policies.names), sum(early.values())


def give_budget(worker: Any, name: str) -> None:
    """Its own random policy misses so often that evidence would close the kind at once."""
    if worker._running.kinds is not None:
        kind = worker._running.kinds.kinds[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ledgers, "ERROR_RATE", 1e-300)
            kind.ledger = Ledger(0.02, 0.1, 0.25)
        kind.ledger.allowed = 1000.0


def test_two_ranks_calibrate_themselves_by_the_coins_and_rows_of_the_first(
    tiny_model, ranks_on_cores, tmp_path
):
    place = AutoDirectory(tmp_path / "auto")
    labels = list(tiny_config(tiny_model).label_ids)
    generator = np.random.default_rng(8)
    prompts = [generator.integers(5, 1000, n).tolist() for n in generator.integers(1, 150, 150)]
    params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=labels)
    engine = tiny_engine(
        tiny_model,
        {"auto": {"directory": str(place.root)}, "min_rows_saved": 1},
        max_model_len=256,
        kv_cache_memory_bytes=16 << 20,
        tensor_parallel_size=2,
    )
    full = tokens(engine, prompts, params)
    kind = Kind("label", tuple(sorted(labels))).name(place.salt)
    wait_for(lambda: [*place.rows(kind).glob("*.safetensors")])
    tiny_artifact(tiny_model, place.policy(kind, 1), exit_points=(2, 3))
    write_json(place.trainer(kind), asdict(State(CERTIFIED, (Try(1, "", 0, 0, 1, CERTIFIED),))))
    wait_for(lambda: any(event["event"] == "serving" for event in place.told()))
    tokens(engine, prompts[:1], params)
    engine.collective_rpc(give_budget, args=(kind,))
    early = tokens(engine, prompts, params)
    (kinds, names, exits), (others, same_names, same_exits) = engine.collective_rpc(
        recorded_and_served
    )
    assert (kinds, others) == (1, 0)
    assert names == same_names == [kind, NO_POLICY]
    assert exits == same_exits > 0
    assert sum(one != other for one, other in zip(full, early, strict=True)) > 0
