"""What a self-test says: passed, failed or not tested; and what is remembered of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.e2e.faults import answers_are_right
from tests.e2e.scripted import parts
from tests.triton_on_cpu import IS_V2
from vllm_adainfer import stats
from vllm_adainfer.engine.segments.segments import Stack
from vllm_adainfer.engine.self_test.scripted_steps import ScriptedSteps
from vllm_adainfer.engine.self_test.self_test import Failure, Outcome, WrongAtFullDepth, self_test
from vllm_adainfer.engine.worker.gpu_worker import AdaInferGPUWorker, configuration_of, record_of
from vllm_adainfer.exits.batch.hidden_states import HiddenStates

pytestmark = pytest.mark.skipif(not IS_V2, reason="vLLM uses Model Runner V1 on CPUs alone")


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_a_pass_is_all_that_counts_as_one(tested):
    assert self_test(parts(tested)[1]) == Outcome()
    assert Outcome().passed
    assert stats(tested)["not_tested"] == ""


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_without_room_for_two_requests_nothing_is_tested(tested, monkeypatch, caplog):
    monkeypatch.setattr(ScriptedSteps, "capacity", lambda *_: 1)
    found = self_test(parts(tested)[1])
    assert (found.failures, found.passed) == ((), False)
    assert stats(tested)["not_tested"] == found.not_tested
    assert found.not_tested == "there is no room for two short requests"
    assert "were not tested on this device: there is no room" in caplog.text


def spoilt(output: Any) -> Any:
    """What a layer yields, not a number."""
    hidden, *rest = output
    return (hidden * torch.nan, *rest)


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_where_the_model_itself_computes_no_numbers_nothing_is_tested(tested, request):
    """As random weights may; vLLM's own run of the layers shows it."""
    model, runner, _ = parts(tested)
    hook = model.model.layers[3].register_forward_hook(lambda *call: spoilt(call[-1]))
    request.addfinalizer(hook.remove)
    assert self_test(runner) == Outcome(
        not_tested="the model itself computes states that are not numbers"
    )
    assert not model.exits_off


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_an_engine_whose_segments_alone_compute_no_numbers_must_not_serve(
    tested, reference, monkeypatch
):
    """Requests that run all layers would run through the segments, too."""
    run = Stack.run

    def with_nan(*args: Any) -> HiddenStates:
        after = run(*args)
        return replace(after, hidden=after.hidden * torch.nan)

    monkeypatch.setattr(Stack, "run", with_nan)
    with pytest.raises(WrongAtFullDepth, match=r"please report this .* serve without the plugin"):
        self_test(parts(tested)[1])
    monkeypatch.undo()
    assert answers_are_right(tested, reference)


@pytest.mark.parametrize("tested", ["engine"], indirect=True)
def test_a_device_that_has_passed_is_not_tested_again(tested, monkeypatch, tmp_path):
    """Until anything of it changes; what failed or was not tested is tested at each start."""
    _, runner, _ = parts(tested)
    runs = []
    failed, untested = Outcome((Failure("exits", "", ""),)), Outcome(not_tested="there is no room")
    result = failed

    def counted(_: Any) -> Outcome:
        runs.append(1)
        return result

    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr("vllm_adainfer.engine.worker.gpu_worker.self_test", counted)
    worker = object.__new__(AdaInferGPUWorker)
    worker.model_runner = runner
    starts = (failed, 1), (failed, 2), (untested, 3), (untested, 4), (Outcome(), 5), (Outcome(), 5)
    for result, expected in starts:  # noqa: B007
        worker.self_test()
        assert len(runs) == expected
    for name, value in (
        ("torch.cuda.get_device_name", lambda _: "another GPU"),
        ("vllm.__version__", "0.32.1"),
        ("vllm_adainfer.engine.worker.gpu_worker.digest_of", lambda _: 7),
    ):
        monkeypatch.setattr(name, value)
        assert not record_of(configuration_of(runner)).exists()
