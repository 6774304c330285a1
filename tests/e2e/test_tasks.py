"""Several calibrated tasks in one engine, chosen request by request."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.conftest import tiny_engine
from tests.e2e.scripted import parts
from tests.e2e.tasks import cases, saved, tokens_of
from tests.full import needed
from tests.tiny import LAYERS
from vllm_adainfer import stats
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.files import pin
from vllm_adainfer.engine.runner.build_loop import monitors_of, policies_of


@pytest.fixture(scope="module")
def llm(tiny_model, sources) -> Any:
    switch = {"artifact": sources, "min_rows_saved": 1}
    return tiny_engine(tiny_model, switch, max_model_len=512, kv_cache_memory_bytes=64 << 20)


def prompts_of(seed: int, count: int, longest: int = 30) -> list[list[int]]:
    """Of less than a block: the prefix cache holds none of them."""
    draw = np.random.default_rng(seed)
    return [draw.integers(5, 1000, draw.integers(2, longest + 1)).tolist() for _ in range(count)]


@pytest.mark.parametrize("seed", needed(1, of=range(3)))
def test_requests_of_three_tasks_and_of_none_share_batches_and_each_gets_its_own_policys_answer(
    llm, tasks, reference, seed
):
    wanted = cases(tasks, reference, prompts_of(seed, 96, longest=8), seed)
    before = stats(llm)["policies"]
    for start in range(0, len(wanted), 16):  # of which a step takes all rows
        batch = wanted[start : start + 16]
        assert tokens_of(llm, batch) == [case.token for case in batch]
    assert {case.depth for case in wanted} == {2, 3, 5, LAYERS}
    depths: dict[str, Counter[int]] = defaultdict(Counter)
    layers: Counter[str] = Counter()
    for case in wanted:
        depths[case.task][case.depth] += 1
        layers[case.task] += case.depth * len(case.prompt)
    assert len(depths) == 4
    for name, found in stats(llm)["policies"].items():
        old = before.get(name, {"exit_histogram": {}, "layers_run": 0, "layers_possible": 0})
        assert Counter(found["exit_histogram"]) - Counter(old["exit_histogram"]) == depths[name]
        assert found["layers_run"] - old["layers_run"] == layers[name]
        rows = sum(len(case.prompt) for case in wanted if case.task == name)
        assert found["layers_possible"] - old["layers_possible"] == rows * LAYERS


@pytest.mark.parametrize("seed", needed(1, of=range(3)))
def test_no_request_changes_anothers_outcome_through_the_prefix_cache(llm, tasks, reference, seed):
    """The same prompts and beginnings of prompts come again, deep, early, at other bounds.

    Others can only make a request run at full depth, to complete what they left incomplete.
    """
    llm.reset_prefix_cache()
    draw = np.random.default_rng(100 + seed)
    shared = [draw.integers(5, 1000, 100).tolist() for _ in range(3)]
    pool = [beginning + own for beginning in shared for own in prompts_of(seed, 4)]
    prompts = [pool[index] for index in draw.integers(0, len(pool), 120)]
    wanted = cases(tasks, reference, prompts, seed)
    found: list[int] = []
    while len(found) < len(wanted):
        found += tokens_of(llm, wanted[len(found) :][: draw.integers(1, 12)])
    for case, token in zip(wanted, found, strict=True):
        assert token in (case.token, case.deep_token)
    early = [case.depth < LAYERS and case.token != case.deep_token for case in wanted]
    assert any(early), "some outcomes would have to change"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"adainfer_policy": "weather"}, "'weather' is not a policy .* mood, topic, next"),
        ({"adainfer_epsilon": 0.001}, "stricter than the artifact's strictest certified bound"),
        ({"adainfer_epsilon": "low"}, "adainfer_epsilon = 'low': Input should be a valid number"),
        ({"adainfer_epsilons": 0.1}, "'adainfer_epsilons' is not a key .* adainfer_epsilon"),
        ({"adainfer": 7}, "adainfer = 7: Input should be a valid boolean"),
        ({"adainfer_exit": 2}, "goes with an exit_script"),
        ({"adainfer_row": 2}, "for calibration"),
    ],
)
def test_a_request_that_asks_for_something_unknown_is_refused_and_the_engine_goes_on(
    llm, tasks, reference, arguments, sentence
):
    params = SamplingParams(temperature=0, max_tokens=1, extra_args=arguments)
    with pytest.raises(VLLMValidationError, match=sentence):
        llm.generate([{"prompt_token_ids": [5, 6, 7]}], params, use_tqdm=False)
    wanted = cases(tasks, reference, prompts_of(9, 12), 9)
    assert tokens_of(llm, wanted) == [case.token for case in wanted]
    assert not parts(llm)[1].model_config.logits_processors, "the check costs the sampler nothing"


@contextmanager
def replaced(llm: Any, tasks: Any, sources: dict[str, str], artifact: Artifact) -> Iterator[None]:
    """Another artifact lies where the mood's was, until the end."""
    directory = Path(sources["mood"]).parent
    try:
        saved({"mood": artifact}, directory)
        yield
    finally:
        saved({"mood": tasks["mood"]}, directory)
        llm.collective_rpc("adainfer_reload")


def with_thresholds(artifact: Artifact, thresholds: Tensor) -> Artifact:
    return replace(artifact, tensors={**artifact.tensors, "thresholds": thresholds})


def test_artifacts_that_were_calibrated_again_serve_without_a_restart(
    llm, tasks, sources, reference
):
    prompts, mood = prompts_of(20, 40), tasks["mood"]
    looser = with_thresholds(mood, mood.tensors["thresholds"] - 1)
    with replaced(llm, tasks, sources, looser):
        lines, *_ = llm.collective_rpc("adainfer_reload")
        assert [line.split()[1] for line in lines] == ["mood", "topic", "next"]
        looser_cases = cases({**tasks, "mood": looser}, reference, prompts, 20)
        assert tokens_of(llm, looser_cases) == [case.token for case in looser_cases]
    before = cases(tasks, reference, prompts, 20)
    assert tokens_of(llm, before) == [case.token for case in before]
    assert [case.depth for case in before] != [case.depth for case in looser_cases]


def test_an_artifact_that_cannot_be_served_is_refused_and_the_one_before_stays(
    llm, tasks, sources, reference
):
    mood = tasks["mood"]
    moved = Artifact(
        mood.config.model_copy(update={"exit_points": (2, 4)}),
        {name.replace(".3.", ".4."): tensor for name, tensor in mood.tensors.items()},
    )
    with replaced(llm, tasks, sources, moved):
        with pytest.raises(Exception, match=r"exit points \[2, 4\], this engine only \[2, 3, 5\]"):
            llm.collective_rpc("adainfer_reload")
        wanted = cases(tasks, reference, prompts_of(30, 40), 30)
        assert tokens_of(llm, wanted) == [case.token for case in wanted]


def test_nothing_is_replaced_where_another_rank_has_read_other_artifacts(
    llm, tasks, sources, reference, monkeypatch
):
    looser = with_thresholds(tasks["mood"], tasks["mood"].tensors["thresholds"] - 1)

    def gather(numbers: list[int], own: int, group: Any) -> None:
        numbers[:] = [own, own + 1]

    with replaced(llm, tasks, sources, looser):
        with monkeypatch.context() as patch:
            patch.setattr(torch.distributed, "all_gather_object", gather)
            with pytest.raises(Exception, match="ranks read different artifacts"):
                llm.collective_rpc("adainfer_reload")
        wanted = cases(tasks, reference, prompts_of(31, 40), 31)
        assert tokens_of(llm, wanted) == [case.token for case in wanted]


@pytest.mark.parametrize("end", ["all have read it", "another could not", "other files"])
def test_of_several_engines_none_switches_before_all_have_read_the_same(
    llm, tasks, sources, reference, end
):
    mood, prompts = tasks["mood"], prompts_of(33, 40)
    looser = with_thresholds(mood, mood.tensors["thresholds"] - 1)
    before = cases(tasks, reference, prompts, 33)
    with replaced(llm, tasks, sources, looser):
        pinned = {name: pin(source) for name, source in sources.items()}
        if end == "other files":
            other = {**pinned, "mood": pinned["mood"]._replace(digest="")}
            with pytest.raises(Exception, match="overwritten during the reload"):
                llm.collective_rpc("adainfer_read_again", args=("one", other))
        else:
            llm.collective_rpc("adainfer_read_again", args=("one", pinned))
        assert tokens_of(llm, before) == [case.token for case in before]
        switches = end == "all have read it"
        lines, *_ = llm.collective_rpc(
            "adainfer_end_reload", args=("one", end != "another could not")
        )
        assert bool(lines) == switches
        expected = cases({**tasks, "mood": looser if switches else mood}, reference, prompts, 33)
        assert tokens_of(llm, expected) == [case.token for case in expected]
        assert llm.collective_rpc("adainfer_end_reload", args=("one", True)) == [[]]


def test_requests_that_are_here_go_on_under_the_artifacts_read_while_they_run(llm, tasks, sources):
    """Chunks of a long prompt come before and after."""
    prompt = np.random.default_rng(5).integers(5, 1000, 300).tolist()  # chunks of 128
    labels = list(tasks["mood"].config.label_ids)
    params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=labels)
    engine, left = llm.llm_engine, stats(llm)["policies"]["mood"]["exit_histogram"].get(2, 0)
    llm.reset_prefix_cache()
    engine.add_request("long", {"prompt_token_ids": prompt}, params)
    engine.step()
    with replaced(llm, tasks, sources, with_thresholds(tasks["mood"], torch.full((2, 2), -1.0))):
        llm.collective_rpc("adainfer_reload")
        while engine.has_unfinished_requests():
            engine.step()
    assert stats(llm)["policies"]["mood"]["exit_histogram"][2] == left + 1


def test_what_shadow_requests_have_closed_is_open_again_with_the_artifact_read_again(
    llm, tasks, reference
):
    """It has not been watched yet; what was counted before stays in the counters."""
    model, _, _ = parts(llm)
    unwatched = model.settings
    # Watched, but no request is drawn.
    model.settings = unwatched.model_copy(update={"shadow_rate": 1e-9})
    try:
        model.loop.use_policies(policies_of(model, model.exit_points), monitors_of(model))
        every = cases(tasks, reference, prompts_of(50, 60), 50)
        early = [case for case in every if case.task == "mood" and case.depth < LAYERS]
        assert early
        model.loop.monitors["mood"].tightened[:] = True
        assert tokens_of(llm, early) == [case.deep_token for case in early]
        llm.collective_rpc("adainfer_reload")
        assert tokens_of(llm, early) == [case.token for case in early]
    finally:
        model.settings = unwatched
        model.loop.use_policies(policies_of(model, model.exit_points), monitors_of(model))
