"""An early object is compared with what full depth has written once its request has ended."""

from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput

from tests.byte_model import byte_tokenizer
from tests.e2e.objects import objects
from tests.running import vllm_request
from vllm_adainfer.artifact.fields import LabelBound
from vllm_adainfer.engine.admission.running import Running, attach_resolved
from vllm_adainfer.engine.compat.scheduler import attach_written_objects, written_objects
from vllm_adainfer.engine.scheduler import observers
from vllm_adainfer.engine.scheduler.objects import WrittenObjects, check_objects
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.accounting.counters import PolicyStats
from vllm_adainfer.exits.accounting.report import DecidedObject
from vllm_adainfer.exits.loop.shadow_objects import EarlyObject, ShadowObjects
from vllm_adainfer.promise.changed import Changed
from vllm_adainfer.settings.engine import Settings
from vllm_adainfer.settings.request import RequestSettings
from vllm_adainfer.watch.watch import Watch

ASKED = objects()
LINK = ASKED.link
GOOD = LINK.code_of([0, 0, 0])  # positive, good, true
BAD = LINK.code_of([1, 1, 0])
GUESSED = LINK.code_of([1, 1, 1])


class Watched:
    """Shadow requests of one policy, whose watch counts."""

    def __init__(self, *bounds: LabelBound) -> None:
        names = [label.name for label in ASKED.labels]
        self.promise = Changed().about(names, LINK)
        self.watch = Watch([0.02, 0.05], alpha=0.1, promise=self.promise)
        self.watch.watch_labels({one: names.index(one.label) for one in bounds})
        self.objects, self.stats = ShadowObjects(), PolicyStats()
        self.serving: dict[str, Watch] = {"reviews": self.watch}

    def decide(self, request_id: str, code: int | None, level: int = 0) -> None:
        early = EarlyObject("reviews", self.watch, self.promise, level, code)
        self.objects.expect(request_id, early)

    def end(self, request_id: str, code: int | None = None) -> None:
        """A request has ended, perhaps with an object at full depth."""
        if code is not None:
            self.objects.compare(request_id, code, self.serving, {"reviews": self.stats})
        self.objects.forget(request_id)
        for watch in (self.watch, *self.watch.labels):
            watch.ended(request_id)

    @property
    def counts(self) -> list[tuple[int, int]]:
        """What the watch has compared and found different, by level."""
        return [(one.checked, one.disagreed) for one in self.watch.readings()]


@pytest.mark.parametrize(
    ("early", "full", "differs"),
    [(GOOD, GOOD, 0), (GOOD, BAD, 1), (GOOD, -1, 1), (None, GOOD, 0), (None, -1, 0)],
    ids=["same", "other", "no object", "not settled", "not settled, and no object"],
)
def test_objects_are_compared_as_wholes_and_unsettled_ones_agree(early, full, differs):
    watched = Watched()
    watched.decide("a", early, level=1)
    watched.end("a", full)
    assert watched.counts == [(0, 0), (1, differs)]
    assert watched.stats.shadow_checked == {0.05: 1}
    assert watched.stats.shadow_disagreed == {0.05: differs}


def test_what_never_ends_by_itself_or_was_never_decided_counts_nothing_and_leaves_nothing():
    watched = Watched(LabelBound(kind="recall", label="seen=true", epsilon=0.01))
    watched.decide("hangs up", GOOD)
    watched.end("hangs up")
    watched.end("not decided", BAD)
    watched.decide("decided before a reload", GOOD)
    watched.serving["reviews"] = Watch([0.02, 0.05], alpha=0.1)
    watched.end("decided before a reload", BAD)
    assert watched.counts == [(0, 0), (0, 0)]
    assert not watched.stats.shadow_checked
    assert not len(watched.objects)
    for watch in (watched.watch, *watched.watch.labels):
        kept: Any = vars(watch._units)
        assert not kept["_alone"]
        assert not kept["_to_count"]


def test_a_promise_about_a_value_reads_its_field_alone():
    """All differ in another field; the recalled value is missed once."""
    bound = LabelBound(kind="recall", label='plot="good"', epsilon=0.01)
    watched = Watched(bound)
    pairs = [([0, 0, 0], [1, 0, 1]), ([0, 1, 0], [1, 0, 0]), ([0, 0, 0], [1, 2, 0])]
    for number, (early, full) in enumerate(pairs):
        watched.decide(str(number), LINK.code_of(early))
        watched.end(str(number), LINK.code_of(full))
    [watch] = watched.watch.labels
    reading = watch.readings()[0]
    assert (reading.checked, reading.disagreed) == (2, 1)
    assert watched.stats.labels_checked == {(0.02, "recall", 'plot="good"'): 2}
    assert watched.stats.labels_changed == {(0.02, "recall", 'plot="good"'): 1}
    assert watched.counts[0] == (3, 3)


def test_a_policy_whose_objects_nearly_all_differ_is_closed_with_a_warning(caplog):
    watched = Watched()
    for number in range(60):
        watched.decide(str(number), GOOD)
    for number in reversed(range(60)):
        watched.end(str(number), BAD)
    assert watched.watch.tightened.tolist() == [True, False]
    assert "policy reviews: disagreement is above epsilon = 0.02" in caplog.text


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ('{"mood": "positive", "plot": "good", "seen": true}', GOOD),
        ('{ "mood" : "negative",\n"plot":"bad","seen":true }', BAD),
        ('{"mood": "positive", "plot": "good"}', -1),
        ('{"mood": "positive", "plot": "fair", "seen": true}', -1),
        ('{"mood": "positive", "plot": "good", "seen": "true"}', -1),
        ('{"mood": "positive", "plot": "good", "seen": tr', -1),
        ("[" * 10_000, -1),
        ('"mood"', -1),
    ],
)
def test_an_object_is_read_by_its_values_however_it_is_written(text, code):
    assert ASKED.code_of(text) == code


ASKS = Running(RequestSettings(), may_exit=True, is_shadow=True, objects="reviews")


@pytest.mark.parametrize(
    ("resolved", "why", "decided", "expected"),
    [
        (ASKS, "stop", True, {"a": BAD}),
        (ASKS, "length", True, {}),
        (ASKS, "abort", True, {}),
        (ASKS, "stop", False, {}),
        (ASKS.changed(is_shadow=False), "stop", True, {}),
    ],
    ids=["whole", "cut short", "given up", "not decided", "no shadow request"],
)
def test_the_scheduler_reads_what_a_decided_shadow_request_has_written_once_it_is_whole(
    resolved, why, decided, expected
):
    tokenizer, config = byte_tokenizer(), SimpleNamespace(objects=ASKED)
    observer = WrittenObjects({"reviews": config}, tokenizer)  # type: ignore[dict-item]
    params = SamplingParams(temperature=0, max_tokens=120)
    params._eos_token_id = tokenizer.eos_token_id
    request = vllm_request("a", params)
    attach_resolved(request, resolved)
    if decided:
        objects = {"a": DecidedObject("reviews", GOOD, is_early=False)}
        note: Any = SimpleNamespace(objects=objects)
        step: Any = SimpleNamespace(note=note, choosing=lambda **_: [(request, [])])
        observer.stepped(step)
    written = tokenizer.encode('{"mood": "negative", "plot": "bad", "seen": true}')
    request.append_output_token_ids([*written, tokenizer.eos_token_id])
    observer.ended(request, why)
    assert observer.take_read() == expected
    assert observer.take_read() == {}
    assert not vars(observer)["_probable"]


def test_an_object_that_stops_at_a_token_of_its_client_is_not_compared():
    """An early one would stop there, too."""
    tokenizer, config = byte_tokenizer(), SimpleNamespace(objects=ASKED)
    observer = WrittenObjects({"reviews": config}, tokenizer)  # type: ignore[dict-item]
    request = vllm_request("a", SamplingParams(temperature=0, max_tokens=120))
    attach_resolved(request, ASKS)
    observer._probable["a"] = ()
    request.append_output_token_ids(tokenizer.encode('{"mood"'))
    request.stop_reason = request.output_token_ids[-1]
    observer.ended(request, "stop")
    assert observer.take_read() == {}


def test_what_was_read_goes_to_every_rank_with_a_step():
    scheduled = SchedulerOutput.make_empty()
    assert written_objects(scheduled) == {}
    attach_written_objects(scheduled, {"a": BAD})
    assert written_objects(pickle.loads(pickle.dumps(scheduled))) == {"a": BAD}


@pytest.mark.parametrize(
    ("drafts", "why"),
    [
        ({}, "vLLM's own speculative decoding is on"),
        ({"draft_structure": False}, '"draft_structure" is false'),
    ],
)
def test_an_engine_that_drafts_nothing_says_which_policies_decide_no_object_and_why(
    monkeypatch, caplog, drafts, why
):
    reason = "vLLM's own speculative decoding is on"
    monkeypatch.setattr(observers, "why_nothing_is_drafted", lambda _: reason)
    config: Any = SimpleNamespace(
        model_config=SimpleNamespace(return_sampling_mask=True),
        parallel_config=SimpleNamespace(data_parallel_index=0),
    )
    configs = {"reviews": SimpleNamespace(objects=ASKED), "mood": SimpleNamespace(objects=None)}
    admission = SimpleNamespace(policies=SimpleNamespace(configs=configs))
    scheduler = SimpleNamespace(admission=admission)
    settings = Settings(artifact="anywhere", finish_choices=False, **drafts)
    found = observers.observers_of(config, settings, scheduler)
    assert [type(one).__name__ for one in found] == ["Counters"]
    [said] = [one for one in caplog.messages if "decides no object by policy reviews:" in one]
    assert said.endswith(why)


def test_an_engine_whose_tokenizer_writes_other_objects_does_not_start():
    check_objects(byte_tokenizer(), "reviews", ASKED)
    other: Any = SimpleNamespace(decode=lambda tokens: byte_tokenizer().decode(tokens).upper())
    with pytest.raises(AdaInferError, match=r"reads '.*' where the calibration wrote mood"):
        check_objects(other, "reviews", ASKED)
