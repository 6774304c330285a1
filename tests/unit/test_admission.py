from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.admitted import admitted, resolved, row_of
from tests.tiny import tiny_artifact, tiny_config
from vllm_adainfer.artifact.fields import MOST_ANSWERS, Label
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.engine.admission import arrival, policies
from vllm_adainfer.engine.admission import traffic_sample as sample
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.running import (
    NOT_RECORDED,
    UNLIMITED,
    attach_resolved,
    resolved_of,
)
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.policy.script import SCRIPT_LABELS
from vllm_adainfer.settings.engine import Settings
from vllm_adainfer.settings.instruments import COMPARE_ARG

SCORED = "prompt_logprob_token_ids"
DEFAULT = 1  # the tiny artifact's default epsilon, 0.05, is the second of its levels


@pytest.fixture
def label_ids(tiny_policy) -> list[int]:
    return list(load_artifact(str(tiny_policy)).config.label_ids)


@pytest.fixture
def admission(tiny_policy) -> Any:
    def make(requests: str = "greedy", **settings: Any) -> Admission:
        return Admission(Settings(artifact=str(tiny_policy), requests=requests, **settings))

    return make


def decided(admission: Admission, params: Any) -> int:
    """The threshold row that the worker gives a request, which the scheduler must know to exit."""
    row = row_of(admission, params)
    assert resolved(admission, params).may_exit == (row != FULL_DEPTH)
    return row


def label_request(label_ids: Sequence[int], **changes: Any) -> SamplingParams:
    """A request for one greedy token among the labels."""
    plain = {"temperature": 0, "max_tokens": 1, "allowed_token_ids": list(label_ids)}
    return SamplingParams(**{**plain, **changes})


@pytest.mark.parametrize(
    ("requests", "changes", "tag"),
    [
        ("greedy", {}, DEFAULT),
        ("greedy", {"extra_args": {"adainfer": 1}}, DEFAULT),
        ("greedy", {"extra_args": {"adainfer": 0}}, FULL_DEPTH),
        ("greedy", {"temperature": 1}, FULL_DEPTH),
        ("greedy", {"temperature": 1, "extra_args": {"adainfer": 1}}, FULL_DEPTH),
        ("all", {}, DEFAULT),
        ("all", {"temperature": 1}, DEFAULT),
        ("all", {"extra_args": {"adainfer": 0}}, FULL_DEPTH),
        ("opt-in", {}, FULL_DEPTH),
        ("opt-in", {"extra_args": {"adainfer": 1}}, DEFAULT),
        ("opt-in", {"extra_args": {"adainfer": 0}}, FULL_DEPTH),
        ("opt-in", {"extra_args": {"adainfer_epsilon": 0.02}}, FULL_DEPTH),
        ("opt-in", {"extra_args": {"adainfer": 1, "adainfer_epsilon": 0.02}}, 0),
        ("opt-in", {"temperature": 1, "extra_args": {"adainfer": 1}}, FULL_DEPTH),
    ],
)
def test_the_setting_says_which_one_token_requests_exit(
    admission, label_ids, requests, changes, tag
):
    assert decided(admission(requests), label_request(label_ids, **changes)) == tag


@pytest.mark.parametrize(
    ("never", "temperature", "tag"),
    [((), 0, DEFAULT), ((), 1, DEFAULT), (("bad",), 0, DEFAULT), (("bad",), 1, FULL_DEPTH)],
)
def test_a_sampled_answer_may_be_any_label_so_that_it_runs_on_where_one_must_not_be_early(
    tiny_model, tmp_path, label_ids, never, temperature, tag
):
    artifact = tiny_artifact(tiny_model, tmp_path / "policy", never_early=never)
    admission = Admission(Settings(artifact=str(artifact), requests="all"))
    assert decided(admission, label_request(label_ids, temperature=temperature)) == tag


@pytest.mark.parametrize("requests", ["greedy", "all", "opt-in"])
@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 2},
        {"max_tokens": None},
        {"logprobs": 0},
        {"logprobs": 1},
        {"logprob_token_ids": [1]},
        {"prompt_logprobs": 1},
        {SCORED: [[3], [4]]},
        {"trace_decode_token_ids": [3]},
        {"min_tokens": 1},
        {"logit_bias": {1: 0.5}},
        {"bad_words": ["bad"]},
        {"structured_outputs": StructuredOutputsParams(choice=["bad", "good"])},
        {"repetition_penalty": 1.1},
        {"thinking_token_budget": 5},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items())[:30],
)
def test_a_request_that_the_bound_does_not_cover_runs_at_full_depth(
    admission, label_ids, requests, changes
):
    params = label_request(label_ids, extra_args={"adainfer": 1}, **changes)
    assert decided(admission(requests), params) == FULL_DEPTH


@pytest.mark.parametrize(
    ("pick", "tag"),
    [
        (lambda ids: ids, DEFAULT),
        (lambda ids: ids[::-1], DEFAULT),
        (lambda ids: ids[:1], FULL_DEPTH),
        (lambda ids: [*ids, 1], FULL_DEPTH),
        (lambda ids: [1, 2], FULL_DEPTH),
        (lambda ids: None, FULL_DEPTH),
    ],
    ids=["the labels", "in any order", "one of them", "one more", "others", "no restriction"],
)
def test_a_label_policy_serves_requests_among_its_labels(admission, label_ids, pick, tag):
    params = label_request(label_ids, allowed_token_ids=pick(label_ids))
    assert decided(admission(), params) == tag


@pytest.mark.parametrize(("restricted", "tag"), [(False, DEFAULT), (True, FULL_DEPTH)])
def test_an_open_vocabulary_policy_serves_unrestricted_requests(
    tiny_model, tmp_path, label_ids, restricted, tag
):
    open_ended = {"probe": "logit-lens", "candidates": "full", "labels": ()}
    artifact = tiny_artifact(tiny_model, tmp_path / "policy", **open_ended)
    admission = Admission(Settings(artifact=str(artifact)))
    params = label_request(label_ids, allowed_token_ids=label_ids if restricted else None)
    assert decided(admission, params) == tag


@pytest.mark.parametrize(
    ("epsilon", "tag"),
    [
        (0, FULL_DEPTH),
        (0.02, 0),
        (0.03, 0),
        (0.05, 1),
        (0.9, 1),
        (0.001, FULL_DEPTH),
        (-1, FULL_DEPTH),
        ("x", FULL_DEPTH),
        (True, FULL_DEPTH),
        ([0.02], FULL_DEPTH),
    ],
)
@pytest.mark.parametrize("default", [None, 0, 0.02])
def test_a_request_may_ask_for_its_own_epsilon(admission, label_ids, default, epsilon, tag):
    """The scheduler lets it, at any but 0: another artifact may certify it."""
    params = label_request(label_ids, extra_args={"adainfer_epsilon": epsilon})
    assert row_of(admission(epsilon=default), params) == tag
    if isinstance(epsilon, (int, float)) and 0 <= epsilon < 1:
        assert resolved(admission(epsilon=default), params).may_exit == (epsilon > 0)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({}, "adainfer_epsilon"), ({}, "adainfer_unknown"), ({"exit_script": (2,)}, "adainfer_exit")],
)
def test_clients_cannot_fill_the_log_with_the_values_of_an_argument(
    tiny_policy, label_ids, monkeypatch, settings, name
):
    said: list[str] = []
    for module in (arrival, policies):
        monkeypatch.setattr(
            module.logger, "warning_once", lambda text, *values: said.append(text % values)
        )
    source = {} if settings else {"artifact": str(tiny_policy)}
    admission = Admission(Settings(**source, **settings))
    for value in range(3, 13):  # epsilons of 0.003 to 0.012
        asked = value / 1000 if name == "adainfer_epsilon" else value
        params = label_request(label_ids, extra_args={name: asked})
        assert row_of(admission, params) == FULL_DEPTH
    assert len(said) >= 10, "of which vLLM's logger says one"
    assert len(set(said)) == 1


@pytest.mark.parametrize(("epsilon", "tag"), [(None, 1), (0, FULL_DEPTH), (0.02, 0), (0.03, 0)])
def test_the_setting_gives_the_epsilon_of_requests_that_ask_for_none(
    admission, label_ids, epsilon, tag
):
    assert decided(admission(epsilon=epsilon), label_request(label_ids)) == tag


def test_a_setting_stricter_than_the_artifact_is_an_error(admission):
    with pytest.raises(AdaInferError, match="strictest certified bound"):
        admission(epsilon=0.001)


def test_a_request_without_sampling_parameters_runs_at_full_depth(admission):
    assert decided(admission(), None) == FULL_DEPTH


@pytest.mark.parametrize(
    ("asked", "has_kind"),
    [
        ({}, True),
        ({"adainfer": 1}, True),
        ({"adainfer": 0}, False),
        ({"adainfer_epsilon": 0}, False),
    ],
)
def test_a_request_for_full_depth_is_of_no_kind_and_earns_no_budget(
    tmp_path, label_ids, asked, has_kind
):
    AutoDirectory(tmp_path / "auto").create()
    admission = Admission(Settings(auto={"directory": str(tmp_path / "auto")}))
    kind = admission.arrival.resolve("request", label_request(label_ids, extra_args=asked)).kind
    assert (kind is not None) == has_kind


@pytest.mark.parametrize(("arguments", "row"), [({"adainfer_row": 7}, 7), ({}, NOT_RECORDED)])
def test_while_recording_each_request_names_its_row_and_none_may_exit(arguments, row):
    admission = Admission(Settings(record=(1, 2)))
    params = SamplingParams(max_tokens=1, extra_args=arguments)
    assert admission.is_recording
    assert admitted(admission, params).record_row == row
    assert decided(admission, params) == FULL_DEPTH


@pytest.mark.parametrize(
    ("arguments", "changes", "tag"),
    [
        ({"adainfer_exit": 2}, {}, 0),
        ({"adainfer_exit": 5}, {}, 1),
        ({"adainfer_exit": 3}, {}, FULL_DEPTH),
        ({"adainfer_exit": "5"}, {}, FULL_DEPTH),
        ({"adainfer_exit": [5]}, {}, FULL_DEPTH),
        ({"adainfer_exit": 5}, {"allowed_token_ids": [5, 6]}, FULL_DEPTH),
        ({"adainfer_exit": 5}, {"allowed_token_ids": None}, FULL_DEPTH),
        ({"adainfer_exit": 5}, {"max_tokens": 2}, 1),
        ({}, {}, FULL_DEPTH),
    ],
)
def test_with_a_script_the_tag_is_the_exit_point_that_a_label_request_names(
    arguments, changes, tag
):
    admission = Admission(Settings(exit_script=(2, 5)))
    params = label_request(SCRIPT_LABELS, **changes, extra_args=arguments)
    assert not admission.is_recording
    assert decided(admission, params) == tag


@pytest.mark.parametrize("arguments", [None, {}, {"adainfer": 1, "mine": 2}])
def test_what_is_decided_travels_with_the_request_without_touching_the_callers_object(
    admission, label_ids, arguments
):
    params = label_request(label_ids, extra_args=arguments)
    before, decided = repr(params), resolved(admission("all"), params)
    request = request_with(params)
    assert resolved_of(request) is None
    attach_resolved(request, decided)
    changed = request.sampling_params
    assert repr(params) == before
    assert params.extra_args == arguments
    assert changed.allowed_token_ids == params.allowed_token_ids
    assert resolved_of(request) == decided
    assert resolved(admission("all"), changed) == decided
    assert pickle.loads(pickle.dumps(decided)) == decided, "workers are other processes"


@pytest.mark.parametrize("sent", [1, True, "x", [], {"may_exit": True}])
def test_a_client_cannot_decide_for_the_scheduler(label_ids, sent):
    params = label_request(label_ids, extra_args={"_adainfer": sent})
    assert resolved_of(request_with(params)) is None


def request_with(params: Any) -> SimpleNamespace:
    """VLLM's request with these parameters."""
    return SimpleNamespace(sampling_params=params, pooling_params=None)


@pytest.fixture(scope="module")
def generation(tiny_model, tmp_path_factory) -> Any:
    """Admission by a policy for generated text."""
    texts = {"probe": "logit-lens", "candidates": "shortlist", "labels": (), "max_tokens": 64}
    artifact = tiny_artifact(tiny_model, tmp_path_factory.mktemp("generation") / "policy", **texts)

    def make(requests: str = "greedy") -> Admission:
        return Admission(Settings(artifact=str(artifact), requests=requests))

    return make


@pytest.mark.parametrize(
    ("requests", "changes", "tag"),
    [
        ("greedy", {}, DEFAULT),
        ("greedy", {"max_tokens": 1}, DEFAULT),
        ("greedy", {"max_tokens": 1000}, DEFAULT),
        ("greedy", {"max_tokens": None}, DEFAULT),
        ("greedy", {"stop": ["end"]}, DEFAULT),
        ("greedy", {"stop_token_ids": [3]}, DEFAULT),
        ("greedy", {"ignore_eos": True}, DEFAULT),
        ("greedy", {"temperature": 0.7, "seed": 1}, FULL_DEPTH),
        ("greedy", {"temperature": 0.7, "n": 3}, FULL_DEPTH),
        ("all", {"temperature": 0.7, "seed": 1, "n": 3, "top_p": 0.9}, DEFAULT),
        ("all", {"presence_penalty": 0.5}, FULL_DEPTH),
        ("all", {"frequency_penalty": 0.5}, FULL_DEPTH),
        ("all", {"repetition_penalty": 1.1}, FULL_DEPTH),
        ("all", {"presence_penalty": 0.5, "max_tokens": 1}, DEFAULT),  # nothing is present yet
        ("all", {"logprobs": 1}, FULL_DEPTH),
        ("all", {"prompt_logprobs": 1}, FULL_DEPTH),
        ("all", {"logit_bias": {1: 0.5}}, FULL_DEPTH),
        ("all", {"bad_words": ["bad"]}, FULL_DEPTH),
        ("all", {"min_tokens": 3}, FULL_DEPTH),
        ("all", {"allowed_token_ids": [1, 2]}, FULL_DEPTH),
        ("all", {"structured_outputs": StructuredOutputsParams(regex="a+")}, FULL_DEPTH),
    ],
    ids=repr,
)
def test_a_policy_for_generated_text_serves_what_its_bound_covers(
    generation, requests, changes, tag
):
    params = SamplingParams(**{"temperature": 0, "max_tokens": 30, **changes})
    assert decided(generation(requests), params) == tag


@pytest.mark.parametrize(("requested", "remembered"), [(None, UNLIMITED), (1, 1), (30, 30)])
def test_the_worker_remembers_how_many_tokens_there_may_be(generation, requested, remembered):
    params = SamplingParams(max_tokens=requested)
    assert resolved(generation(), params).max_tokens == remembered


def test_the_worker_remembers_who_wants_log_probabilities_of_the_prompt(generation):
    wants = [
        resolved(generation(), SamplingParams(**read)).wants_prompt_logprobs
        for read in ({}, {"prompt_logprobs": 0}, {"prompt_logprobs": 1}, {SCORED: [[3], [4]]})
    ]
    assert wants == [False, True, True, True]


@pytest.mark.parametrize("rate", [0, 0.01, 0.1, 0.5, 1])
def test_the_shadow_rate_is_the_share_of_requests_that_are_watched(admission, rate, monkeypatch):
    monkeypatch.setattr(sample, "SECRET", b"the same in each run")
    ids = [str(number) for number in range(10_000)]
    watched = sum(map(admission(shadow_rate=rate).arrival.is_shadow, ids))
    assert abs(watched - rate * len(ids)) <= 3 * (rate * (1 - rate) * len(ids)) ** 0.5


@pytest.mark.parametrize("compare", [True, False])
def test_a_request_is_compared_at_its_own_wish_only_where_the_switch_says_so(
    admission, label_ids, compare
):
    params = label_request(label_ids, extra_args={COMPARE_ARG: True})
    arrival = admission(compare=compare).arrival
    assert arrival.resolve("id", params).is_shadow == compare
    assert not arrival.resolve("id", label_request(label_ids)).is_shadow


def test_a_client_that_chooses_its_id_does_not_choose_who_is_watched(admission, monkeypatch):
    """vLLM appends random digits to the id that a client sends, and each engine has a secret."""
    is_shadow = admission(shadow_rate=0.5).arrival.is_shadow
    assert {is_shadow(f"mine-{number:08x}") for number in range(100)} == {False, True}
    draws = []
    for secret in b"one", b"other":
        monkeypatch.setattr(sample, "SECRET", secret)
        draws.append([is_shadow(f"{number}") for number in range(100)])
    assert 20 < sum(one != other for one, other in zip(*draws, strict=True)) < 80


@pytest.mark.parametrize(
    ("changes", "together"),
    [
        ({"largest_group": 1}, False),
        ({"bound": "wsr", "largest_group": 5}, True),
        ({"bound": "wsr"}, True),  # made before artifacts said how large groups were
    ],
)
def test_questions_of_one_request_are_drawn_together_where_they_are_watched_as_one(
    tiny_model, changes, together
):
    configs = {"default": tiny_config(tiny_model, **changes)}
    deciding = Admission(Settings(artifact="policy", shadow_rate=0.5), configs)
    drawn = [
        {deciding.arrival.is_shadow(f"decision-{text}-{part}-{part:08x}") for part in range(8)}
        for text in range(40)
    ]
    assert all(len(one) == 1 for one in drawn) == together
    assert set().union(*drawn) == {False, True}


def test_a_request_whose_prompt_is_still_being_sent_runs_at_full_depth(admission, label_ids):
    params = label_request(label_ids)
    decided = admission().arrival.resolve("id", params, resumable=True)
    assert not decided.may_exit
    assert admission().admit(decided, []).threshold_row == FULL_DEPTH
    scripted = Admission(Settings(exit_script=(2, 5)))
    params = label_request(SCRIPT_LABELS, extra_args={"adainfer_exit": 5})
    decided = scripted.arrival.resolve("id", params, resumable=True)
    assert not decided.may_exit
    assert scripted.admit(decided, []).threshold_row == FULL_DEPTH


class Unread(list[int]):
    """Token ids that nobody may go through."""

    def __iter__(self) -> Any:
        raise AssertionError("read in full")


@pytest.mark.parametrize("field", ["allowed_token_ids", "logprob_token_ids"])
def test_more_tokens_than_a_policy_can_have_are_not_looked_at(admission, field):
    params = SamplingParams(temperature=0, max_tokens=1)
    setattr(params, field, Unread([1]) * (MOST_ANSWERS + 1))
    setattr(params, field, Unread(getattr(params, field)))
    assert row_of(admission(), params) == FULL_DEPTH


def test_after_its_arrival_nothing_that_a_client_sent_is_looked_at(
    admission, label_ids, monkeypatch
):
    deciding = admission()
    decided = resolved(deciding, label_request(label_ids))
    for name in "requested_output", "read_request", "wants_prompt_logprobs":
        monkeypatch.delattr(f"vllm_adainfer.engine.admission.arrival.{name}")
    assert deciding.admit(decided, [5]).threshold_row == DEFAULT


PROBABILITY = {"risk": "probability", "tolerance": 0.05}
READS = {
    "the label": {},
    "in the vocabulary": {"allowed_token_ids": None, "logprob_token_ids": "labels"},
    "in the vocabulary, at temperature 1": {
        "allowed_token_ids": None,
        "logprob_token_ids": "labels",
        "temperature": 1,
    },
    "in the vocabulary, restricted": {"logprob_token_ids": "labels"},
    "the best two": {"logprobs": 2},
    "the best two, at temperature 1": {"logprobs": 2, "temperature": 1},
    "the best two of any": {"logprobs": 2, "allowed_token_ids": None},
    "of one label": {"allowed_token_ids": None, "logprob_token_ids": "first"},
    "of other tokens": {"allowed_token_ids": None, "logprob_token_ids": "others"},
    "of labels, restricted to others": {
        "allowed_token_ids": "others",
        "logprob_token_ids": "labels",
    },
    "of the prompt": {"prompt_logprobs": 1},
}
RAW, PROCESSED = "raw_logprobs", "processed_logprobs"
EXITING = {  # by the policy's risk and mass, and the engine's mode
    ("disagreement", False, RAW): {"the label"},
    ("disagreement", False, PROCESSED): {"the label"},
    ("probability", False, RAW): {"the label"},
    ("probability", False, PROCESSED): {
        "the label",
        "the best two",
        "in the vocabulary, restricted",
    },
    ("probability", True, RAW): {
        "the label",
        "in the vocabulary",
        "in the vocabulary, at temperature 1",
        "in the vocabulary, restricted",
    },
    ("probability", True, PROCESSED): {
        "the label",
        "the best two",
        "in the vocabulary",
        "in the vocabulary, restricted",
    },
    ("probability", True, "raw_logits"): {"the label"},
    ("probability", True, "processed_logits"): {"the label"},
}


def policy_that_promises(tiny_model, directory, risk: str, label_mass: bool = False) -> str:
    changes = PROBABILITY | {"label_mass": label_mass} if risk == "probability" else {}
    return str(tiny_artifact(tiny_model, directory, **changes))


def reading(label_ids: Sequence[int], read: str, **more: Any) -> SamplingParams:
    named = {"labels": list(label_ids), "first": list(label_ids[:1]), "others": [1, 2]}
    changes = {
        key: named[value] if isinstance(value, str) else value for key, value in READS[read].items()
    }
    return label_request(label_ids, **changes, **more)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize(("risk", "label_mass", "mode"), EXITING)
def test_a_request_exits_only_under_a_policy_that_promises_what_it_reads(
    tiny_model, tmp_path, label_ids, risk, label_mass, mode, read
):
    source = policy_that_promises(tiny_model, tmp_path / "policy", risk, label_mass)
    admission = Admission(Settings(artifact=source), logprobs_mode=mode)
    exits = read in EXITING[risk, label_mass, mode]
    params = reading(label_ids, read)
    assert decided(admission, params) == (DEFAULT if exits else FULL_DEPTH)


def test_beside_a_policy_for_probabilities_one_for_the_label_decides_labels(
    tiny_model, tmp_path, label_ids
):
    sources = {
        "sure": policy_that_promises(tiny_model, tmp_path / "sure", "probability", True),
        "label": policy_that_promises(tiny_model, tmp_path / "label", "disagreement"),
    }
    admission = Admission(Settings(artifact=sources))
    assert admission.policies.ambiguous == []
    sure, label = DEFAULT, 2 + DEFAULT
    assert row_of(admission, reading(label_ids, "the label")) == label
    assert row_of(admission, reading(label_ids, "in the vocabulary")) == sure
    named = {"extra_args": {"adainfer_policy": "sure"}}
    assert row_of(admission, reading(label_ids, "the label", **named)) == sure
    named = {"extra_args": {"adainfer_policy": "label"}}
    assert row_of(admission, reading(label_ids, "in the vocabulary", **named)) == FULL_DEPTH


def test_two_policies_for_the_same_probabilities_have_to_be_named(tiny_model, tmp_path, label_ids):
    sources = {
        name: policy_that_promises(tiny_model, tmp_path / name, "probability", True)
        for name in ("one", "two")
    }
    admission = Admission(Settings(artifact=sources))
    assert admission.policies.ambiguous == [["one", "two"]]
    assert row_of(admission, reading(label_ids, "in the vocabulary")) == FULL_DEPTH


def classifying(tiny_model: Path, tmp_path: Path) -> Admission:
    """Admission by a policy for a classifier's scores."""
    labels = tuple(Label(name=f"c{column}", token_id=column) for column in range(3))
    directory = tiny_artifact(tiny_model, tmp_path / "policy", score_head="softmax", labels=labels)
    return Admission(Settings(artifact=str(directory)))


@pytest.mark.parametrize(
    ("changes", "may_exit"),
    [
        ({}, True),
        ({"use_activation": True}, True),
        ({"use_activation": False}, False),  # no policy promises raw scores
        ({"task": "token_classify"}, False),
        ({"task": "embed"}, False),
        ({"extra_kwargs": {"adainfer": 0}}, False),
        ({"extra_kwargs": {"adainfer_epsilon": 0.0}}, False),
        ({"extra_kwargs": {"adainfer": "never"}}, False),  # invalid: no frontend has refused it
    ],
)
def test_a_classifiers_requests_exit_where_they_read_probabilities_of_classes(
    tiny_model, tmp_path, changes, may_exit
):
    admission = classifying(tiny_model, tmp_path)
    decided = admission.arrival.resolve("one", PoolingParams(**{"task": "classify", **changes}))
    assert decided.may_exit == may_exit
    assert decided.max_tokens == 1
    request = SimpleNamespace(sampling_params=None, pooling_params=PoolingParams(task="classify"))
    attach_resolved(request, decided)
    assert resolved_of(request) == decided


def test_a_policy_for_scores_decides_no_tokens_and_the_other_way_round(
    tiny_model, tmp_path, admission, label_ids
):
    scores, tokens = PoolingParams(task="classify"), label_request([0, 1, 2])
    assert not classifying(tiny_model, tmp_path).arrival.resolve("one", tokens).may_exit
    assert not admission("all").arrival.resolve("one", scores).may_exit
