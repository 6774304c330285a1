"""What is appended to a choice, and when it is left to vLLM's steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_adainfer.artifact.fields import MOST_CHOICE_CHARACTERS, MOST_CHOICES, Choice
from vllm_adainfer.engine.compat.scheduler import append_tokens, sampled_tokens
from vllm_adainfer.engine.scheduler import rest_of_choice
from vllm_adainfer.engine.scheduler.observer import Step
from vllm_adainfer.engine.scheduler.rest_of_choice import RestOfChoice, check_tokenizer
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings, read_settings

END = 0
WORDS = {"pos": 1000, "positive": 1001}  # tokens beside the letters


class Tokenizer:
    """Letters by their numbers; two words of more letters are canonical.

    Attributes:
        encoded: the texts it was given, one after the other.
        decoded: how many tokens it has put together.

    """

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.decoded = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        self.encoded.append(text)
        for word in sorted(WORDS, key=len, reverse=True):
            if text.startswith(word):
                return [WORDS[word], *map(ord, text.removeprefix(word))]
        return list(map(ord, text))

    def decode(self, tokens: Sequence[int]) -> str:
        self.decoded += len(tokens)
        words = {token: word for word, token in WORDS.items()}
        return "".join(words.get(token) or chr(token) for token in tokens)


class FakeRequest(SimpleNamespace):
    """As vLLM's, no two are the same."""

    __hash__ = object.__hash__


def request_of(
    choices: Sequence[str], so_far: str = "", accepts: bool = True, **settings: Any
) -> Any:
    """A request that has written `so_far`, letter by letter."""
    choosing = StructuredOutputsParams(choice=list(choices))
    params = SamplingParams(**{"max_tokens": 20, "structured_outputs": choosing, **settings})
    params._eos_token_id = END
    written = list(map(ord, so_far))
    structured = SimpleNamespace(reasoning_ended=None, grammar=accepts)
    return FakeRequest(
        sampling_params=params,
        structured_output_request=structured,
        output_token_ids=written,
        num_output_tokens=len(written),
        num_prompt_tokens=100,
        max_tokens=params.max_tokens,
        resumable=False,
    )


@pytest.fixture(autouse=True)
def _grammars_that_say_at_once_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rest_of_choice, "accepts_all", lambda accepts, tokens: accepts)


def rest_of(reasoner: type | None = None, max_model_len: int = 1000) -> RestOfChoice:
    manager: Any = SimpleNamespace(tokenizer=Tokenizer(), reasoner_cls=reasoner)
    return RestOfChoice(manager, max_model_len)


def after(request: Any, sampled: str | list[int], **rest: Any) -> list[int]:
    tokens = list(map(ord, sampled)) if isinstance(sampled, str) else sampled
    finder = rest_of(**rest)
    finder.arrived(request)
    return finder.after(request, tokens)


@pytest.mark.parametrize(
    ("choices", "so_far", "sampled", "rest"),
    [
        (["yes", "no"], "", "y", "es"),
        (["yes", "no"], "y", "e", "s"),
        (["yes", "no"], "ye", "s", ""),
        (["yes", "yes, but"], "ye", "s", None),
        (["yes", "yes, but"], "yes", ",", " but"),
        (["yes", "yes"], "", "y", "es"),
        (["ab", "ac"], "", "a", None),
        (["yes", "no"], "some thoughts", "y", None),
        (["positive", "x"], "", [WORDS["pos"]], "itive"),
        (["positive", "x"], "", [WORDS["positive"]], ""),
        (["a positive", "x"], "", "a", " positive"),
        (["positives", "x"], "", [WORDS["positive"]], "s"),
    ],
)
def test_the_rest_of_the_only_choice_left_is_appended(choices, so_far, sampled, rest):
    wanted = [] if rest is None else [*map(ord, rest), END]
    assert after(request_of(choices, so_far), sampled) == wanted


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "fits"),
    [(4, 1000, True), (3, 1000, False), (20, 104, True), (20, 103, False)],
)
def test_a_rest_that_does_not_fit_is_left_to_vllm(max_tokens, max_model_len, fits):
    request = request_of(["yes", "no"], max_tokens=max_tokens)
    assert bool(after(request, "y", max_model_len=max_model_len)) == fits


@pytest.mark.parametrize(
    "settings",
    [
        {"logprobs": 1},
        {"logprob_token_ids": [1]},
        {"allowed_token_ids": [1]},
        {"stop": ["x"]},
        {"min_tokens": 1},
        {"logit_bias": {1: 1.0}},
    ],
)
def test_settings_that_ask_for_more_than_the_choice_take_every_step(settings):
    assert after(request_of(["yes", "no"], **settings), "y") == []


@pytest.mark.parametrize("why", ["the prompt goes on", "no end token", "not in the grammar"])
def test_what_has_to_take_every_step_does(why):
    """A grammar may not accept the rest of a tokenizer that puts a blank before each text."""
    request = request_of(["yes", "no"], accepts=why != "not in the grammar")
    request.resumable = why == "the prompt goes on"
    if why == "no end token":
        request.sampling_params._eos_token_id = None
    assert after(request, "y") == []


def test_thoughts_before_a_choice_are_not_taken_for_it():
    request = request_of(["yes", "no"])
    assert after(request, "y", reasoner=object) == []
    request.structured_output_request.reasoning_ended = True
    assert after(request, "y", reasoner=object) == [*map(ord, "es"), END]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    choices=st.lists(st.text("abc\u00e9", min_size=1, max_size=6), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
)
def test_whatever_the_choices_an_answer_is_one_of_them_and_ends_where_it_is_decided(choices, seed):
    """A model that picks letters at random among those that the choices allow, or ends."""
    generator, written = random.Random(seed), ""
    while True:
        going_on = sorted(
            {c[len(written)] for c in choices if c.startswith(written) and c != written}
        )
        if written in choices and (not going_on or generator.random() < 0.5):
            break  # stock's end token
        letter = generator.choice(going_on)
        rest = after(request_of(choices, written), letter)
        written += letter
        left = {choice for choice in choices if choice.startswith(written)}
        if rest:
            assert written + Tokenizer().decode(rest[:-1]) in choices
            assert rest[-1] == END
        assert bool(rest) == (len(left) == 1)
        if rest:
            break


def grown(request: Any, text: str) -> None:
    """The request has written `text` more."""
    request.output_token_ids += map(ord, text)
    request.num_output_tokens += len(text)


def test_a_choice_is_tokenised_when_its_request_arrives_and_not_in_a_step():
    finder, request = rest_of(), request_of(["a long answer", "a lasting one"])
    finder.arrived(request)
    tokenizer: Any = finder._manager.tokenizer
    assert sorted(tokenizer.encoded) == ["a lasting one", "a long answer"]
    for letter in "a l":
        assert finder.after(request, [ord(letter)]) == []
        grown(request, letter)
    assert finder.after(request, [ord("o")]) == [*map(ord, "ng answer"), END]
    again = request_of(["a lasting one", "a long answer"])
    finder.arrived(again)
    assert len(tokenizer.encoded) == 2, "known sets are not tokenised again"


@pytest.mark.parametrize(
    "structured",
    [{"json": {"type": "object"}}, {"regex": "(a|b)+"}, {"grammar": 'root ::= "a" # "b"'}],
    ids=lambda structured: next(iter(structured)),
)
def test_the_output_of_a_request_without_choices_is_not_put_together(structured):
    request = request_of(["yes"])
    request.sampling_params.structured_outputs = StructuredOutputsParams(**structured)
    finder = rest_of()
    finder.arrived(request)
    for _ in range(100):
        assert finder.after(request, [ord("a")]) == []
        grown(request, "a")
    tokenizer: Any = finder._manager.tokenizer
    assert (tokenizer.encoded, tokenizer.decoded) == ([], 0)


def test_an_answer_that_stays_open_for_long_takes_vllms_steps():
    """So the work of all steps together stays in proportion to the length of the answer."""
    start = "a" * 2 * rest_of_choice.MOST_TOKENS
    finder, request = rest_of(), request_of([start + "b", start + "c"], max_tokens=1000)
    finder.arrived(request)
    for letter in start:
        assert finder.after(request, [ord(letter)]) == []
        grown(request, letter)
    tokenizer: Any = finder._manager.tokenizer
    assert tokenizer.decoded == sum(range(rest_of_choice.MOST_TOKENS + 1))
    assert finder.after(request, [ord("b")]) == []


@pytest.mark.parametrize(("length", "is_long"), [(1024, False), (1025, True)])
def test_a_long_rest_that_is_not_canonical_is_not_tokenised_in_a_step(length, is_long):
    finder, request = rest_of(), request_of(["positive" + "s" * length, "x"], max_tokens=2000)
    finder.arrived(request)
    finder._max_model_len = 10_000
    begun = list(map(ord, "positive"))
    assert bool(finder.after(request, begun)) != is_long


@pytest.mark.parametrize(
    "choices",
    [
        ["a" * MOST_CHOICE_CHARACTERS, "b"],
        [f"{number:05}" for number in range(MOST_CHOICES + 1)],
    ],
    ids=["characters", "choices"],
)
def test_more_than_a_policy_can_have_takes_vllms_steps(choices):
    finder, request = rest_of(), request_of(choices)
    finder.arrived(request)
    tokenizer: Any = finder._manager.tokenizer
    assert tokenizer.encoded == []
    assert finder.after(request, [ord(choices[0][0])]) == []


def test_only_running_requests_whose_output_counts_are_looked_at():
    def request(**changes: Any) -> SimpleNamespace:
        values = {"use_structured_output": True, "num_stale_output_tokens": 0, **changes}
        return SimpleNamespace(is_finished=lambda: values.get("finished", False), **values)

    requests: Any = {
        "fine": request(),
        "free": request(use_structured_output=False),
        "stale": request(num_stale_output_tokens=1),
        "ended": request(finished=True),
        "drafted": request(),
        "chunk": request(),
    }
    names = [*requests, "gone"]
    output = SimpleNamespace(
        req_ids=names, sampled_token_ids=[[] if name == "chunk" else [1] for name in names]
    )
    scheduled = SimpleNamespace(
        scheduled_spec_decode_tokens={"drafted": [2]}, has_structured_output_requests=True
    )
    found = list(sampled_tokens(scheduled, output, requests))
    assert found == [(requests["fine"], [1])]
    ours = list(sampled_tokens(scheduled, output, requests, with_drafts=True))
    assert ours == [*found, (requests["drafted"], [1])]
    found[0][1].append(5)
    assert output.sampled_token_ids[0] == [1, 5]
    scheduled.has_structured_output_requests = False
    assert not list(sampled_tokens(scheduled, output, requests))


def test_what_was_appended_in_a_step_is_reported_once():
    finder, request, appended = rest_of(), request_of(["yes", "no"]), []
    finder.arrived(request)
    step = Step(
        rows={},
        requests={},
        note=None,
        choosing=lambda: [(request, [ord("y")])],
        append=lambda *one: appended.append(one),
        scores=lambda _: None,
    )
    finder.stepped(step)
    assert appended == [(request, [ord("y")], [*map(ord, "es"), END])]
    assert finder.report() == {"added": [("choices_finished", 1), ("choice_tokens_appended", 3)]}
    assert finder.report() == {}


@pytest.mark.parametrize(
    ("scheduler", "drafts", "more"),
    [(Scheduler, {}, 0), (AsyncScheduler, {}, 3), (AsyncScheduler, {"a": [1, 2]}, 0)],
)
def test_the_asynchronous_scheduler_expects_what_is_appended(scheduler, drafts, more):
    request: Any = SimpleNamespace(num_output_placeholders=1, request_id="a")
    scheduled, sampled = SimpleNamespace(scheduled_spec_decode_tokens=drafts), [1]
    append_tokens(scheduler.__new__(scheduler), scheduled, request, sampled, [2, 3, 4])
    assert request.num_output_placeholders == 1 + more
    assert sampled == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("switch", "finishes"),
    [
        ({"artifact": "a"}, True),
        ({"artifact": "a", "finish_choices": False}, False),
        ({"exit_script": [2]}, True),
        ({"record": [2]}, False),
        ({"finish_choices": True}, True),
        ({"capture": {"directory": "d"}}, False),
        ({"capture": {"directory": "d"}, "finish_choices": True}, True),
    ],
)
def test_choices_end_early_with_a_policy_or_where_it_is_asked_for(switch, finishes):
    settings = read_settings({"adainfer": switch})
    assert isinstance(settings, Settings)
    assert settings.finishes_choices == finishes


@pytest.mark.parametrize(
    ("switch", "sentence"),
    [
        ({"finish_choices": False}, 'give "artifact"'),
        ({"finish_choices": True, "record": [2]}, '"finish_choices" and "record" do not go'),
        ({"finish_choices": True, "epsilon": 0.1}, '"epsilon" goes with "artifact"'),
    ],
)
def test_a_switch_that_makes_no_sense_is_refused(switch, sentence):
    with pytest.raises(AdaInferError, match=sentence):
        read_settings({"adainfer": switch})


def test_a_tokenizer_that_writes_a_policys_choices_otherwise_is_refused():
    same = Choice(text="yes", token_ids=tuple(map(ord, "yes")), first_tokens=(ord("y"),))
    check_tokenizer(Tokenizer(), "mood", [same, same.model_copy(update={"first_tokens": ()})])
    for other in ({"token_ids": (1, 2)}, {"first_tokens": (ord("x"), ord("y"))}):
        with pytest.raises(AdaInferError, match=r"policy mood: .* the choice 'yes' with other"):
            check_tokenizer(Tokenizer(), "mood", [same, same.model_copy(update=other)])
