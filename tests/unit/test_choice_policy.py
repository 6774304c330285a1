"""Policies for choices: which tokens begin which, what is certified, who may exit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xgrammar
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.utils import choice_as_grammar

from tests.admitted import admitted, resolved, row_of
from tests.byte_model import SETS, byte_tokenizer
from tests.calibrations import of_choices
from tests.tiny import tiny_artifact
from vllm_adainfer.artifact.fields import Choice, Label
from vllm_adainfer.artifact.outputs import Choices
from vllm_adainfer.cli.promises import choice_texts
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.offline.calibration import calibrate as calibrating
from vllm_adainfer.offline.calibration.data.batch_files import read_requests
from vllm_adainfer.offline.calibration.data.choices import (
    common_choices,
    find_choices,
    with_labels,
)
from vllm_adainfer.offline.calibration.data.examples import Example, Row
from vllm_adainfer.offline.calibration.fit_policy import make_policy
from vllm_adainfer.offline.calibration.options import CalibrationRequest
from vllm_adainfer.policy.first_tokens import FirstTokens
from vllm_adainfer.settings.engine import Settings

TOKENIZER = byte_tokenizer()
# In two of the sets no first token decides; in the last one here, none decides "\u00e9t\u00e9".
DECIDABLE = [*(SETS[place] for place in (0, 1, 2, 3, 7)), ["caf\u00e9", "non", "\u00e9t\u00e9"]]
ONES = [Example("here, line 1", "text", [1], None, choices=("yes", "no"))]


@pytest.mark.parametrize("texts", DECIDABLE, ids=", ".join)
def test_first_tokens_are_those_that_vllms_grammar_takes_by_the_choice_that_they_leave(texts):
    info = xgrammar.TokenizerInfo.from_huggingface(TOKENIZER, vocab_size=len(TOKENIZER))
    grammar = xgrammar.GrammarCompiler(info).compile_grammar(choice_as_grammar(texts))
    bits = xgrammar.allocate_token_bitmask(1, len(TOKENIZER))
    xgrammar.GrammarMatcher(grammar).fill_next_token_bitmask(bits)
    taken = {t for t in range(len(TOKENIZER)) if bits[0, t // 32] >> (t % 32) & 1}
    found = find_choices(texts, TOKENIZER, len(TOKENIZER))
    by_choice = {choice.text: set(choice.first_tokens) for choice in found.choices}
    assert set(found.undecided).union(*by_choice.values()) == taken
    for token in taken:
        written = info.decoded_vocab[token]
        left = [text for text in texts if text.encode().startswith(written)]
        decides = len(left) == 1 and by_choice[left[0]]
        assert [text for text in texts if token in by_choice[text]] == (left if decides else [])
        assert (token in found.undecided) == (not decides)
    for choice in found.choices:
        assert TOKENIZER.decode(choice.token_ids) == choice.text


def test_a_choice_is_answered_by_the_token_that_begins_it_and_the_rest_by_one_undecided():
    found = find_choices(["yes", "yes, but", "no"], TOKENIZER, len(TOKENIZER))
    [no] = TOKENIZER.encode("no")
    [answered, undecided] = found.labels
    assert (answered.name, answered.token_id, undecided.name) == ("no", no, "undecided")
    assert set(found.undecided) == set(TOKENIZER.convert_tokens_to_ids(["y", "ye", "yes"]))
    first = FirstTokens.of(found)
    tokens = first.token_ids.numpy()
    decided = np.array([one.token_id for one in found.labels])[first.labels_of(tokens)]
    for token, label in zip(tokens.tolist(), decided.tolist(), strict=True):
        assert label == (undecided if token in found.undecided else answered).token_id


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        (["yes"], "at least two different texts"),
        (["yes", "yes"], "at least two different texts"),
        (["yes", ""], "at least two different texts"),
        (["a film", "a plot"], "no first token of the choices"),
        (["yes", "yes, but"], "no first token of the choices"),
        (["\u00e9t\u00e9", "\u00fcber"], "no first token of the choices"),
    ],
)
def test_choices_that_no_first_token_can_decide_are_refused(texts, sentence):
    with pytest.raises(AdaInferError, match=sentence):
        find_choices(texts, TOKENIZER, len(TOKENIZER))


def test_a_choice_is_not_decided_by_a_part_of_its_first_letter_which_the_scheduler_cannot_end():
    found = find_choices(["caf\u00e9", "\u00e9t\u00e9"], TOKENIZER, len(TOKENIZER))
    assert [label.name for label in found.labels] == ["caf\u00e9", "undecided"]
    assert set(found.undecided) == {TOKENIZER.encode("\u00e9")[0]}


@pytest.mark.parametrize(
    ("text", "names"),
    [("", ()), ("a,b", ("a", "b")), (" a, b", (" a", " b")), ("a b,c", ("a b", "c"))],
)
def test_choices_are_taken_as_written(text, names):
    assert choice_texts(text) == names


def test_a_blank_that_only_some_choices_begin_with_is_hardly_meant():
    with pytest.raises(AdaInferError, match="some begin with a blank"):
        choice_texts("positive, negative")


def test_answers_that_decide_no_choice_are_the_reason_given_for_no_policy(monkeypatch):
    policy = replace(make_policy(of_choices()), points={})
    policy.calibration.rows.tokens[:] = policy.calibration.target.undecided
    monkeypatch.setattr(calibrating, "calibration_of", lambda *_: policy.calibration)
    monkeypatch.setattr(calibrating, "fit_policy", lambda *_: policy)
    request = CalibrationRequest("m", Path("rows"), Path("out"))
    prompts = SimpleNamespace(student=None, schema=None)
    with pytest.raises(AdaInferError, match="100% of the answers of m begin with a token that dec"):
        calibrating.fit_and_certify(request, prompts, policy.calibration.rows)


def test_of_equal_scores_the_lowest_token_decides_as_in_vllms_sampler():
    one = Choice(text="one", token_ids=(9,), first_tokens=(9, 3))
    tokens = FirstTokens.of(Choices(choices=(one,), undecided=(5,)))
    assert tokens.token_ids.tolist() == [3, 5, 9]
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.5, 1.0]])
    assert tokens.decided_by(scores).tolist() == [0, 1, 0]
    assert tokens.best(scores).tolist() == [[1.0, 1.0], [1.0, 1.0], [1.0, 0.5]]


YES_NO = {
    "choices": (
        Choice(text="yes", token_ids=(10, 11), first_tokens=(10, 12)),
        Choice(text="no", token_ids=(20,), first_tokens=(20,)),
    ),
    "labels": (Label(name="yes", token_id=10), Label(name="no", token_id=20)),
}


def choosing(*texts: str, **settings: Any) -> SamplingParams:
    structured = StructuredOutputsParams(choice=list(texts))
    given = {"temperature": 0, "max_tokens": 8, "structured_outputs": structured, **settings}
    params = SamplingParams(**given)
    params._eos_token_id = 2
    return params


@pytest.fixture(scope="module")
def source(tiny_model, tmp_path_factory) -> str:
    return str(tiny_artifact(tiny_model, tmp_path_factory.mktemp("choices") / "policy", **YES_NO))


@pytest.mark.parametrize(
    ("params", "exits"),
    [
        (choosing("yes", "no"), True),
        (choosing("no", "yes", "no"), True),
        (choosing("yes", "no", max_tokens=3), True),
        (choosing("yes", "no", max_tokens=2), False),
        (choosing("yes", "no", max_tokens=1), False),
        (choosing("yes"), False),
        (choosing("yes", "no", "maybe"), False),
        (choosing("yes", "no", temperature=1), False),
        (choosing("yes", "no", logprobs=1), False),
        (choosing("yes", "no", stop=["e"]), False),
        (choosing("yes", "no", allowed_token_ids=[10, 20]), False),
        (choosing("yes", "no", min_tokens=1), False),
        (choosing("yes", "no", prompt_logprobs=1), False),
        (choosing("yes", "no", repetition_penalty=1.1), False),
        (choosing("yes", "no", presence_penalty=1), False),
        (choosing("yes", "no", extra_args={"adainfer": 0}), False),
        (choosing("yes", "no", extra_args={"adainfer_policy": "default"}), True),
        (choosing(structured_outputs=StructuredOutputsParams(regex="yes|no")), False),
        (
            choosing(
                structured_outputs=StructuredOutputsParams(grammar=choice_as_grammar(["yes", "no"]))
            ),
            True,
        ),
        (SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=[10, 20]), False),
        (SamplingParams(temperature=0, max_tokens=1), False),
    ],
)
def test_requests_with_exactly_the_policys_choices_may_exit_if_nothing_else_is_asked(
    source, params, exits
):
    admission = Admission(Settings(artifact=source))
    assert resolved(admission, params).may_exit == exits
    assert (row_of(admission, params) != FULL_DEPTH) == exits
    assert admitted(admission, params).has_choice_policy == exits


def test_where_the_scheduler_does_not_end_choices_their_requests_run_at_full_depth(source):
    admission = Admission(Settings(artifact=source), ends_choices=False)
    assert not resolved(admission, choosing("yes", "no")).may_exit


def test_of_two_policies_for_the_same_choices_a_request_names_one(source):
    admission = Admission(Settings(artifact={"one": source, "other": source}))
    assert admission.policies.ambiguous == [["one", "other"]]
    assert not resolved(admission, choosing("yes", "no")).may_exit
    named = choosing("yes", "no", extra_args={"adainfer_policy": "other"})
    assert resolved(admission, named).may_exit


def line_of(body: dict[str, Any], **more: Any) -> Row:
    fields = {"url": "/v1/completions", "body": {"prompt": "yes or no? ", **body}, **more}
    return Row("requests.jsonl, line 1", json.loads(json.dumps(fields)))


def choice(*texts: str, **body: Any) -> dict[str, Any]:
    return {"structured_outputs": {"choice": list(texts)}, **body}


def read(*rows: Row) -> list[Example]:
    return read_requests(rows, TOKENIZER, len(TOKENIZER), 100)


def test_requests_with_a_choice_are_read_with_their_texts_and_the_right_one():
    [example] = read(line_of(choice("yes", "no", "yes"), label="no"))
    assert (example.choices, example.labels, example.label) == (("yes", "no"), None, "no")
    assert read(line_of(choice("yes", "no", max_tokens=4)))
    [other] = read(line_of(choice("yes", "no"), label="maybe"))
    assert other.label is None


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (choice("yes", "no", max_tokens=1), "that max_tokens may cut off"),
        (choice("yes", "no", logprobs=1), "a choice and logprobs"),
        (choice("yes", "no", stop=["e"]), "a choice and stop"),
        (choice("yes", "no", allowed_token_ids=[3]), "a choice and allowed_token_ids"),
        ({"structured_outputs": {"regex": "yes|no"}}, "structured_outputs other than choice"),
        (choice(), "structured_outputs other than choice"),
        ({"structured_outputs": "yes"}, "vLLM would refuse it"),
        (choice("yes", "no", max_tokens="many"), "vLLM would refuse it"),
    ],
)
def test_requests_with_a_choice_that_run_at_full_depth_are_left_out(body, reason):
    with pytest.raises(AdaInferError, match=reason):
        read(line_of(body))


def test_a_policy_is_for_the_choices_that_all_requests_have_or_those_asked_for():
    others = [Example("here, line 2", "text", [1], None, choices=("a", "b"))]
    labels = [Example("here, line 3", "text", [1], None, labels=(1, 2))]
    assert common_choices(ONES, ()) == (ONES, ("yes", "no"))
    assert common_choices(labels, ()) == (labels, ())
    assert common_choices(ONES + others + labels, ("no", "yes")) == (ONES, ("no", "yes"))
    with pytest.raises(AdaInferError, match="give --choices, such as 'no,yes'"):
        common_choices(ONES * 2 + others, ())
    with pytest.raises(AdaInferError, match="no request has the choices 'x', 'y'"):
        common_choices(ONES, ("x", "y"))


def test_the_right_label_of_a_row_is_its_choice_with_or_without_its_blanks():
    rows = [Example("here, line 1", "", [1], label) for label in ("no", " yes", None)]
    assert [one.label for one in with_labels(rows, (" yes", " no"))] == [" no", " yes", None]
    with pytest.raises(AdaInferError, match="line 1: the label 'no' is not among"):
        with_labels(rows, ("maybe", " yes"))
