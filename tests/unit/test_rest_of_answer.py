"""What is appended to an answer that its grammar decides, and when it is left to vLLM's steps."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import llguidance
import llguidance.hf
import pytest
import xgrammar
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.convert_slow_tokenizer import bytes_to_unicode
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.structured_output.backend_guidance import GuidanceGrammar
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar
from vllm.v1.structured_output.request import StructuredOutputRequest
from vllm.v1.structured_output.utils import choice_as_grammar

from tests.byte_model import byte_tokenizer
from vllm_adainfer.artifact.fields import Choice
from vllm_adainfer.engine.compat.scheduler import append_tokens, sampled_tokens
from vllm_adainfer.engine.scheduler import rest_of_answer
from vllm_adainfer.engine.scheduler.observer import Step
from vllm_adainfer.engine.scheduler.rest_of_answer import RestOfAnswer, check_tokenizer
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings, read_settings

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id
SIZE = len(TOKENIZER)
INFO = xgrammar.TokenizerInfo.from_huggingface(TOKENIZER, vocab_size=SIZE)
COMPILER = xgrammar.GrammarCompiler(INFO)
LL_TOKENIZER = llguidance.hf.from_tokenizer(TOKENIZER, n_vocab=SIZE)
REVIEW = {
    "type": "object",
    "properties": {"mood": {"enum": ["good", "bad"]}, "long": {"type": "boolean"}},
    "required": ["mood", "long"],
    "additionalProperties": False,
}


def tokens_of(text: str) -> list[int]:
    """Canonical tokens."""
    return TOKENIZER.encode(text, add_special_tokens=False)


def letters(text: str) -> list[int]:
    """A token for each byte."""
    spelt = bytes_to_unicode()
    return [TOKENIZER.convert_tokens_to_ids(spelt[byte]) for byte in text.encode()]


class FakeRequest(SimpleNamespace):
    """As vLLM's, no two are the same."""

    __hash__ = object.__hash__


def by_xgrammar(structured: StructuredOutputsParams, white_space: bool) -> XgrammarGrammar:
    if structured.json is not None:
        separators = None if white_space else (",", ":")
        compiled = COMPILER.compile_json_schema(
            json.dumps(structured.json), any_whitespace=white_space, separators=separators
        )
    elif structured.regex is not None:
        compiled = COMPILER.compile_regex(structured.regex)
    else:
        compiled = COMPILER.compile_grammar(choice_as_grammar(structured.choice))
    matcher = xgrammar.GrammarMatcher(compiled, max_rollback_tokens=0)
    return XgrammarGrammar(vocab_size=SIZE, matcher=matcher, ctx=compiled)


def by_guidance(structured: StructuredOutputsParams, white_space: bool) -> GuidanceGrammar:
    if structured.json is not None:
        flexible = {"whitespace_flexible": white_space}
        grammar = llguidance.LLMatcher.grammar_from_json_schema(structured.json, defaults=flexible)
    elif structured.regex is not None:
        grammar = llguidance.LLMatcher.grammar_from_regex(structured.regex)
    else:
        alternatives = " | ".join(map(json.dumps, structured.choice))
        grammar = llguidance.LLMatcher.grammar_from_lark("start: " + alternatives)
    return GuidanceGrammar(llguidance.LLMatcher(LL_TOKENIZER, grammar), LL_TOKENIZER, SIZE)


BACKENDS: Any = pytest.mark.parametrize("backend", [by_xgrammar, by_guidance])


def request_of(
    wanted: Sequence[str] | dict[str, Any] | str,
    so_far: Sequence[int] = (),
    backend: Any = by_xgrammar,
    white_space: bool = False,
    **settings: Any,
) -> Any:
    """A request for a choice, an object of a schema, or a regex, that has written `so_far`."""
    structured = StructuredOutputsParams(
        **{"json": wanted}
        if isinstance(wanted, dict)
        else {"regex": wanted}
        if isinstance(wanted, str)
        else {"choice": list(wanted)}
    )
    params = SamplingParams(**{"max_tokens": 80, "structured_outputs": structured, **settings})
    params._eos_token_id = END
    grammar = backend(structured, white_space)
    assert grammar.accept_tokens("", list(so_far))
    asked = StructuredOutputRequest(structured)
    asked._grammar = grammar
    return FakeRequest(
        sampling_params=params,
        structured_output_request=asked,
        output_token_ids=list(so_far),
        num_output_tokens=len(so_far),
        num_prompt_tokens=100,
        max_tokens=params.max_tokens,
        resumable=False,
    )


def rest_of(reasoner: type | None = None, max_model_len: int = 1000) -> RestOfAnswer:
    manager: Any = SimpleNamespace(tokenizer=TOKENIZER, reasoner_cls=reasoner)
    return RestOfAnswer(manager, max_model_len)


def after(request: Any, sampled: list[int], **rest: Any) -> list[int]:
    finder = rest_of(**rest)
    finder.arrived(request)
    return finder.after(request, sampled)


@BACKENDS
@pytest.mark.parametrize(
    ("choices", "so_far", "sampled", "rest"),
    [
        (["yes", "no"], "", ["y"], ["e", "s"]),
        (["yes", "no"], "y", ["e"], ["s"]),
        (["yes", "no"], "ye", ["s"], []),
        (["yes", "yes, but"], "ye", ["s"], None),
        (["yes", "yes, but"], "yes", [","], [" ", "b", "u", "t"]),
        (["yes", "yes"], "", ["y"], ["e", "s"]),
        (["ab", "ac"], "", ["a"], None),
        (["positive", "x"], "", ["pos"], ["itive"]),
        (["positive", "x"], "", ["positi"], ["ve"]),
        (["positive", "x"], "", ["positive"], []),
        (["positives", "x"], "", ["positive"], ["s"]),
    ],
)
def test_the_rest_of_the_only_choice_left_is_appended(backend, choices, so_far, sampled, rest):
    request = request_of(choices, letters(so_far), backend)
    before = request.structured_output_request.grammar
    found = after(request, [token for text in sampled for token in tokens_of(text)])
    assert TOKENIZER.decode(found) == ("" if rest is None else "".join(rest) + TOKENIZER.eos_token)
    assert before.validate_tokens(letters(sampled[0])) == letters(sampled[0]), "the state is kept"


@BACKENDS
@pytest.mark.parametrize(
    ("white_space", "written", "rest"),
    [
        (False, '{"mood":"b', None),
        (False, '{"mood":"good","long":', None),
        (False, '{"mood":"good","long":t', "rue}"),
        (True, '{"mood": "good", "long": t', None),
        (True, '{"mood": "good", "long": true', None),
        (True, '{"mood": "good", "long": true}', ""),
        (True, '{"mood":\n"good", "long": true}', ""),
    ],
)
def test_an_object_ends_once_everything_behind_is_forced(backend, white_space, written, rest):
    """White space is never forced, so where it may stand only the end is."""
    *so_far, last = letters(written)
    found = after(request_of(REVIEW, so_far, backend, white_space), [last])
    assert TOKENIZER.decode(found) == ("" if rest is None else rest + TOKENIZER.eos_token)


@BACKENDS
def test_the_rest_has_the_tokens_that_the_whole_answer_would_have(backend):
    """As canonical as what the model began with."""
    canonical = tokens_of("positive film")
    request = request_of(["positive film", "x"], backend=backend)
    assert after(request, canonical[:1]) == [*canonical[1:], END]
    request = request_of(["positive film", "x"], backend=backend)
    assert after(request, letters("p")) == [*tokens_of("ositive film"), END]


@BACKENDS
@pytest.mark.parametrize("regex", ["(ab)+", "a.*", "[0-9]{3}x?"])
def test_an_answer_that_may_go_on_is_not_ended(backend, regex):
    request = request_of(regex, backend=backend)
    finder = rest_of()
    finder.arrived(request)
    for token in letters("abab" if regex[0] in "(a" else "12"):
        assert finder.after(request, [token]) == []
        request.structured_output_request.grammar.accept_tokens("", [token])


@pytest.mark.parametrize(
    ("max_tokens", "max_model_len", "fits"),
    [(4, 1000, True), (3, 1000, False), (20, 104, True), (20, 103, False)],
)
def test_a_rest_that_does_not_fit_is_left_to_vllm(max_tokens, max_model_len, fits):
    request = request_of(["abc", "no"], max_tokens=max_tokens)
    assert bool(after(request, letters("a"), max_model_len=max_model_len)) == fits


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
def test_settings_that_ask_for_more_than_the_answer_take_every_step(settings):
    assert after(request_of(["yes", "no"], **settings), letters("y")) == []


@pytest.mark.parametrize("why", ["the prompt goes on", "no end token", "another backend"])
def test_what_has_to_take_every_step_does(why):
    request = request_of(["yes", "no"])
    request.resumable = why == "the prompt goes on"
    if why == "no end token":
        request.sampling_params._eos_token_id = None
    if why == "another backend":
        request.structured_output_request._grammar = object()
    assert after(request, letters("y")) == []


def test_thoughts_before_an_answer_are_not_taken_for_it():
    request = request_of(["yes", "no"])
    assert after(request, letters("y"), reasoner=object) == []
    request.structured_output_request.reasoning_ended = True
    assert after(request, letters("y"), reasoner=object) == [*tokens_of("es"), END]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    choices=st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=6),
    backend=st.sampled_from([by_xgrammar, by_guidance]),
    seed=st.integers(0, 1000),
)
def test_whatever_the_choices_an_answer_is_one_of_them_and_ends_where_it_is_decided(
    choices, backend, seed
):
    """A model that picks letters at random among those that the choices allow, or ends."""
    generator, written = random.Random(seed), ""
    while True:
        going_on = sorted(
            {c[len(written)] for c in choices if c.startswith(written) and c != written}
        )
        if written in choices and (not going_on or generator.random() < 0.5):
            break  # stock's end token
        letter = generator.choice(going_on)
        rest = after(request_of(choices, letters(written), backend), letters(letter))
        written += letter
        left = {choice for choice in choices if choice.startswith(written)}
        if rest:
            assert written + TOKENIZER.decode(rest[:-1]) in choices
            assert rest[-1] == END
        assert bool(rest) == (len(left) == 1)
        if rest:
            break


@pytest.mark.parametrize("accent", ["\u00e9t\u00e9", "\u6f22\u5b57", "\U0001f600\U0001f600"])
@BACKENDS
def test_half_a_character_is_completed_or_left_to_vllm(backend, accent):
    for place, token in enumerate(letters(accent)):
        request = request_of([accent, "x"], letters(accent)[:place], backend)
        rest = after(request, [token])
        if rest:
            written = [*letters(accent)[: place + 1], *rest[:-1]]
            assert TOKENIZER.decode(written) == accent


@BACKENDS
def test_an_answer_is_completed_only_once_and_nothing_is_tokenised_before(backend, monkeypatch):
    encoded: list[str] = []
    written = rest_of_answer._written
    monkeypatch.setattr(
        rest_of_answer, "_written", lambda _, text: encoded.append(text) or written(TOKENIZER, text)
    )
    request, finder = request_of(["abcabcx", "abcabcy"], backend=backend), rest_of()
    finder.arrived(request)
    for token in letters("abcabc"):
        assert finder.after(request, [token]) == []
        request.structured_output_request.grammar.accept_tokens("", [token])
        request.output_token_ids.append(token)
        request.num_output_tokens += 1
    assert encoded == []
    assert finder.after(request, letters("x")) == [END]
    assert finder.after(request, letters("x")) == []


@pytest.mark.parametrize(("length", "is_long"), [(1024, False), (1025, True)])
@BACKENDS
def test_a_long_rest_is_not_tokenised_in_a_step(backend, length, is_long):
    finder = rest_of(max_model_len=10_000)
    request = request_of(["p" + "s" * length, "x"], backend=backend, max_tokens=2000)
    finder.arrived(request)
    assert bool(finder.after(request, letters("p"))) != is_long
    assert finder.after(request, letters("p")) == [], "and it is not looked at again"


@BACKENDS
def test_long_text_that_must_come_is_looked_for_once_and_not_in_each_step(backend, monkeypatch):
    looked: list[int] = []
    rest = rest_of_answer.rest_of
    monkeypatch.setattr(rest_of_answer, "rest_of", lambda *given: looked.append(1) or rest(*given))
    long = "p" + "s" * 2000
    request, finder = (
        request_of([f"{long}x", f"{long}y"], backend=backend, max_tokens=3000),
        rest_of(),
    )
    finder.arrived(request)
    for token in letters("pss"):
        assert finder.after(request, [token]) == []
        request.structured_output_request.grammar.accept_tokens("", [token])
    assert len(looked) == 1


def test_a_grammar_of_any_length_costs_nothing_in_a_step():
    request = request_of(["yes", "no"])
    long = StructuredOutputsParams(choice=["a" * rest_of_answer.LONGEST_GRAMMAR, "b"])
    request.structured_output_request.params = long
    assert after(request, letters("y")) == []


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
        choosing=lambda: [(request, letters("y"))],
        append=lambda *one: appended.append(one),
        scores=lambda _: None,
    )
    finder.stepped(step)
    rest = [*tokens_of("es"), END]
    assert appended == [(request, letters("y"), rest)]
    assert finder.report() == {
        "added": [("choices_finished", 1), ("choice_tokens_appended", len(rest))]
    }
    assert finder.report() == {}


@pytest.mark.parametrize(
    ("scheduler", "drafts", "more", "fewer"),
    [
        (Scheduler, {}, 0, 0),
        (Scheduler, {"a": [1, 2]}, 0, 3),
        (AsyncScheduler, {}, 3, 0),
        (AsyncScheduler, {"a": [1, 2]}, 0, 3),
    ],
)
def test_what_is_appended_is_expected_but_never_counts_as_computed(scheduler, drafts, more, fewer):
    """Of a request with drafts, vLLM counts all tokens but one as expected, and as computed."""
    request: Any = SimpleNamespace(
        num_output_placeholders=1, num_computed_tokens=10, request_id="a"
    )
    scheduled, sampled = SimpleNamespace(scheduled_spec_decode_tokens=drafts), [1]
    append_tokens(scheduler.__new__(scheduler), scheduled, request, sampled, [2, 3, 4])
    assert request.num_output_placeholders == 1 + more
    assert request.num_computed_tokens == 10 - fewer
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
        ({"draft_structure": True, "record": [2]}, '"draft_structure" and "record" do not go'),
        ({"finish_choices": True, "epsilon": 0.1}, '"epsilon" goes with "artifact"'),
    ],
)
def test_a_switch_that_makes_no_sense_is_refused(switch, sentence):
    with pytest.raises(AdaInferError, match=sentence):
        read_settings({"adainfer": switch})


def test_a_tokenizer_that_writes_a_policys_choices_otherwise_is_refused():
    same = Choice(text="yes", token_ids=tuple(tokens_of("yes")), first_tokens=tuple(letters("y")))
    check_tokenizer(TOKENIZER, "mood", [same, same.model_copy(update={"first_tokens": ()})])
    for other in ({"token_ids": (1, 2)}, {"first_tokens": (*letters("x"), *letters("y"))}):
        with pytest.raises(AdaInferError, match=r"policy mood: .* the choice 'yes' with other"):
            check_tokenizer(TOKENIZER, "mood", [same, same.model_copy(update=other)])


def test_an_answer_that_a_stop_token_of_the_requests_own_has_ended_is_left_as_it_is():
    """A grammar may end with it, and cannot be asked what follows; vLLM ends the request."""
    stop = TOKENIZER.encode("z", add_special_tokens=False)[0]
    request = request_of(["yes", "no"])
    structured = request.structured_output_request
    compiled = COMPILER.compile_grammar(choice_as_grammar(["yes", "yes, but"]))
    matcher = xgrammar.GrammarMatcher(compiled, override_stop_tokens=[END, stop])
    structured._grammar = XgrammarGrammar(vocab_size=SIZE, matcher=matcher, ctx=compiled)
    written = TOKENIZER.encode("yes", add_special_tokens=False)
    assert after(request, [*written, stop]) == []
    assert structured.grammar.accept_tokens("", [*written, stop]), "its state has not changed"
