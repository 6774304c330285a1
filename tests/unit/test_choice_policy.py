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
from pydantic import ValidationError
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.utils import choice_as_grammar

from tests.admitted import admitted, resolved, row_of
from tests.byte_model import SETS, byte_tokenizer
from tests.tiny import tiny_artifact
from tests.unit.readings import views_as_it_decides, wrong_of
from tests.unit.test_make_policy import HF_CONFIG, LAYERS, SPLIT, recording_of
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import Choice, Label
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.cli.promises import choice_texts
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.offline.calibration import calibrate as calibrating
from vllm_adainfer.offline.calibration.data.batch_files import read_requests
from vllm_adainfer.offline.calibration.data.choices import (
    Choices,
    common_choices,
    find_choices,
    with_labels,
)
from vllm_adainfer.offline.calibration.data.examples import Example, Row
from vllm_adainfer.offline.calibration.fit.calibration import Calibration
from vllm_adainfer.offline.calibration.fit.probes import Target
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy, make_policy
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.write.policy_artifact import policy_config, policy_tensors
from vllm_adainfer.policy.exit_policy import UndecidedRows
from vllm_adainfer.policy.first_tokens import FirstTokens
from vllm_adainfer.policy.policy import Policy
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
    by_choice = {choice.text: set(choice.first_tokens) for choice in found.texts}
    assert set(found.undecided).union(*by_choice.values()) == taken
    for token in taken:
        written = info.decoded_vocab[token]
        left = [text for text in texts if text.encode().startswith(written)]
        decides = len(left) == 1 and by_choice[left[0]]
        assert [text for text in texts if token in by_choice[text]] == (left if decides else [])
        assert (token in found.undecided) == (not decides)
    for choice in found.texts:
        assert TOKENIZER.decode(choice.token_ids) == choice.text


def test_a_choice_is_answered_by_the_token_that_begins_it_and_the_rest_by_one_undecided():
    found = find_choices(["yes", "yes, but", "no"], TOKENIZER, len(TOKENIZER))
    [no] = TOKENIZER.encode("no")
    [answered, undecided] = found.labels
    assert (answered.name, answered.token_id, undecided.name) == ("no", no, "undecided")
    assert set(found.undecided) == set(TOKENIZER.convert_tokens_to_ids(["y", "ye", "yes"]))
    tokens = found.first_tokens.token_ids.numpy()
    decided = found.decided_by(tokens)
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


TOKENS = Choices(
    (
        Choice(text="a", token_ids=(3, 9), first_tokens=(3, 8)),
        Choice(text="b", token_ids=(7,), first_tokens=(7, 20, 21)),
        Choice(text="c", token_ids=(30,), first_tokens=(30,)),
    ),
    undecided=(1, 2),
)


def calibrated(choices: Choices = TOKENS, **options: Any) -> FittedPolicy:
    recording = recording_of(labels=False, noise=0.2)
    lens, first = (
        recording.model.logit_lens.of_tokens(choices.first_tokens.token_ids),
        choices.first_tokens,
    )
    best = lens.score(lens.readout(recording.final)).top1_id.numpy()
    recording = replace(recording, tokens=choices.decided_by(best))
    ids = torch.tensor([label.token_id for label in choices.labels])
    never = options.get("never_early", ())
    runs_on = frozenset(label.token_id for label in choices.labels if label.name in never)
    target = Target("label-head", ids, first_tokens=first, never_early=runs_on)
    asked = PolicyOptions(epsilon=0.05, exit_points=LAYERS, **options)
    return make_policy(
        Calibration(recording, target, SPLIT, asked, choices.labels, choices=choices)
    )


def test_answers_that_decide_no_choice_are_the_reason_given_for_no_policy(monkeypatch):
    policy = replace(calibrated(), points={})
    policy.calibration.rows.tokens[:] = policy.calibration.target.undecided
    monkeypatch.setattr(calibrating, "calibration_of", lambda *_: policy.calibration)
    monkeypatch.setattr(calibrating, "fit_policy", lambda *_: policy)
    request = CalibrationRequest("m", Path("rows"), Path("out"))
    with pytest.raises(AdaInferError, match="100% of the answers of m begin with a token that dec"):
        calibrating.fit_and_certify(request, SimpleNamespace(student=None), policy.calibration.rows)


def served(policy: FittedPolicy, directory: Path) -> Policy:
    config = policy_config(policy, "tiny", HF_CONFIG)
    save_artifact(directory, config, policy_tensors(policy), {}, "card")
    return Policy(load_artifact(str(directory)), torch.device("cpu"))


@pytest.mark.parametrize("classifier", ["svm", "crf"])
@pytest.mark.parametrize(
    ("with_undecided", "never"), [(False, ()), (True, ()), (False, ("b",)), (True, ("a",))]
)
def test_what_is_served_of_choices_is_what_was_certified(
    tmp_path, classifier, with_undecided, never
):
    choices = TOKENS if with_undecided else replace(TOKENS, undecided=())
    policy = calibrated(choices, classifier=classifier, never_early=never)
    serving = served(policy, tmp_path / "policy")
    recording, rows = policy.calibration.rows, SPLIT.certify
    lens = recording.model.logit_lens
    logits = lens.score(lens.readout(recording.final[rows]), return_scores=True).scores
    ids = serving.answer_ids.numpy()
    tags = torch.full((len(rows),), list(policy.points).index(0.05))
    exits, wrong = np.full(len(rows), len(policy.exits)), np.zeros(len(rows))
    memory = None
    for index, layer in enumerate(serving.exit_points):
        undecided = UndecidedRows(recording.states[layer][rows], tags, memory)
        decision = serving.decide(index, undecided)
        assert views_as_it_decides(serving, index, undecided, decision)
        leaves = (exits == len(policy.exits)) & decision.settled.numpy()
        exits[leaves] = index
        early = ids[decision.answers.scores.argmax(1).numpy()]
        runs_on = [one.first_tokens[0] for one in TOKENS.texts if one.text in never]
        assert not np.isin(early[leaves], [*runs_on, TOKENS.undecided[0]]).any()
        differs = early != recording.tokens[rows]
        assert np.array_equal(wrong_of(serving, decision.answers, logits).numpy(), differs)
        wrong[leaves] = differs[leaves]
        memory = decision.memory
    point = policy.points[0.05]
    assert np.array_equal(exits, point.exits)
    assert np.array_equal(wrong, point.losses)
    assert len(set(exits.tolist())) > 1


def test_of_equal_scores_the_lowest_token_decides_as_in_vllms_sampler():
    one = Choice(text="one", token_ids=(9,), first_tokens=(9, 3))
    tokens = FirstTokens.of([one], undecided=(5,))
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


@pytest.mark.parametrize(
    "changes",
    [
        {"labels": YES_NO["labels"][:1]},
        {"labels": YES_NO["labels"][::-1]},
        {"labels": (Label(name="yes", token_id=11), YES_NO["labels"][1])},
        {"undecided": (30,)},
        {"undecided": (12,), "labels": (*YES_NO["labels"], Label(name="u", token_id=12))},
        {"choices": ()},
        {"choices": (), "undecided": (30,)},
        {"max_tokens": 4},
        {"label_pool": True},
        {"risk": "probability", "tolerance": 0.1, "features": ("top_logit", "gap", "mass_logit")},
    ],
)
def test_a_config_whose_choices_and_labels_do_not_fit_together_is_not_an_artifact(source, changes):
    config = load_artifact(source).config.model_dump()
    if changes == {"choices": ()}:  # a policy for labels
        assert ArtifactConfig(**{**config, **changes}).choices == ()
        return
    with pytest.raises(ValidationError):
        ArtifactConfig(**{**config, **changes})


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
