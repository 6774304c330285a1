"""The guess of an object behind its prompt: who gets one, what it takes, and what follows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

from tests.admitted import admitted, resolved
from tests.calibrations import OBJECTS
from tests.running import new_request, running_requests
from tests.tiny import tiny_config, tiny_tensors
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.drafts.grammars import Grammar, Grammars
from vllm_adainfer.drafts.schemas import digest_of
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.running import attach_resolved
from vllm_adainfer.engine.scheduler import drafts as drafts_module
from vllm_adainfer.engine.scheduler.drafts import Drafting, Drafts
from vllm_adainfer.engine.scheduler.objects import Guesses, RecordedGuesses, WrittenObjects
from vllm_adainfer.engine.scheduler.observer import Step
from vllm_adainfer.exits.accounting.report import DecidedObject, StepNote
from vllm_adainfer.exits.loop.step import CPU, FULL_DEPTH
from vllm_adainfer.settings.engine import Settings

SCHEMA = {"type": "object", "properties": {"mood": {"enum": ["bad", "fine", "good"]}}}
PLACES = OBJECTS.commonest
GUESS, PROMPT, END = OBJECTS.written(PLACES), [5] * 4, 2


def asking(schema: Any = SCHEMA, **settings: Any) -> SamplingParams:
    structured = StructuredOutputsParams(json=schema)
    given = {"temperature": 0, "max_tokens": 40, "structured_outputs": structured, **settings}
    params = SamplingParams(**given)
    params._eos_token_id = 2
    return params


@pytest.fixture(scope="module")
def source(tiny_model, tmp_path_factory) -> str:
    digest = digest_of(json.dumps(SCHEMA))
    output = OBJECTS.model_copy(update={"schema_digest": digest})
    config = ArtifactConfig.model_validate({**dict(tiny_config(tiny_model)), "output": output})
    directory = tmp_path_factory.mktemp("objects") / "policy"
    save_artifact(directory, config, tiny_tensors(config), {}, "card\n")
    return str(directory)


@pytest.fixture(scope="module")
def promising(tiny_model, tmp_path_factory) -> str:
    """A policy for the same objects that promises how far probabilities move."""
    output = OBJECTS.model_copy(update={"schema_digest": digest_of(json.dumps(SCHEMA))})
    config = tiny_config(tiny_model, risk="probability", tolerance=0.2)
    config = ArtifactConfig.model_validate({**dict(config), "output": output})
    directory = tmp_path_factory.mktemp("objects") / "policy"
    save_artifact(directory, config, tiny_tensors(config), {}, "card\n")
    return str(directory)


@pytest.mark.parametrize(
    ("params", "exits"),
    [
        (asking(), True),
        (asking(json.dumps(SCHEMA, indent=2)), True),
        (asking({**SCHEMA, "title": "Film"}), True),
        (asking(max_tokens=OBJECTS.longest + 1), True),
        (asking(max_tokens=OBJECTS.longest), False),
        (asking({**SCHEMA, "required": ["mood"]}), False),
        (asking(temperature=1), False),
        (asking(logprobs=1), False),
        (asking(stop=["x"]), False),
        (asking(min_tokens=1), False),
        (asking(extra_args={"adainfer": 0}), False),
        (asking(structured_outputs=StructuredOutputsParams(json_object=True)), False),
        (SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=[0, 1]), False),
    ],
)
def test_requests_for_the_schema_need_a_guess_if_nothing_else_is_asked(source, params, exits):
    admission = Admission(Settings(artifact=source))
    assert resolved(admission, params).may_exit == exits
    assert admitted(admission, params).guessed == (-1 if exits else 0)
    assert (admitted(admission, params).threshold_row != FULL_DEPTH) == exits


@pytest.mark.parametrize(
    ("params", "reads"),
    [
        (asking(), False),
        (asking(logprobs=1), True),
        (asking(logprobs=0), True),
        (asking(logprobs=-1), None),
        (asking(logprobs=1, temperature=1), None),
        (asking(logprobs=1, prompt_logprobs=1), None),
        (asking(logprobs=1, stop=["x"]), None),
        (asking(logprobs=1, logprob_token_ids=[1]), None),
        (asking({**SCHEMA, "required": ["mood"]}, logprobs=1), None),
    ],
)
def test_requests_for_log_probabilities_may_exit_where_these_are_promised(
    source, promising, params, reads
):
    admission = Admission(Settings(artifact=promising))
    found = admitted(admission, params)
    assert found.may_exit == (reads is not None)
    assert reads is None or found.reads_values == reads
    plain = Admission(Settings(artifact=source))
    assert admitted(plain, params).may_exit == (reads is False)
    raw = Admission(Settings(artifact=promising), logprobs_mode="raw_logits")
    assert admitted(raw, params).may_exit == (reads is False), "these are no probabilities"


@pytest.mark.parametrize(
    ("drafted", "computed", "rows", "why"),
    [
        ([len(GUESS)], 0, 4 + len(GUESS), None),
        ([len(GUESS)], 3, 1 + len(GUESS), None),
        ([len(GUESS) - 1], 0, 4 + len(GUESS) - 1, "not_guessed"),
        ([0], 0, 4, "not_guessed"),
        (None, 0, 4, "not_guessed"),
    ],
    ids=["whole", "prefix cached", "a part", "no room", "no drafts"],
)
def test_an_object_may_be_early_only_in_the_step_with_its_whole_guess(
    source, tmp_path, drafted, computed, rows, why
):
    running = running_requests({"artifact": source, "audit": {"directory": str(tmp_path)}})
    new = new_request(asking(), PROMPT)
    arrived = running.admission.arrival.resolve("a", new.sampling_params)
    attach_resolved(new, arrived.changed(guess=GUESS, guess_rows=OBJECTS.rows(PLACES)))
    running.add(new)
    step = running.describe(
        ["a"],
        np.array([rows]),
        np.array([computed]),
        np.array([True]),
        CPU,
        None if drafted is None else np.array(drafted),
    )
    assert step.guessed is not None
    assert step.guessed.tolist() == [why is None]
    assert step.continues.tolist() == [why is not None], "an early object is the whole answer"
    assert (step.threshold_rows[0] != FULL_DEPTH) == (why is None)
    assert running._why == ({} if why is None else {0: why})


def test_later_tokens_of_an_object_that_was_not_early_are_full_depth_for_no_other_reason(
    source, tmp_path
):
    running = running_requests({"artifact": source, "audit": {"directory": str(tmp_path)}})
    running.add(new_request(asking(), PROMPT))
    of_draft = np.array([1 + len(GUESS)]), np.array([4]), np.array([True])
    step = running.describe(["a"], *of_draft, CPU, np.array([len(GUESS)]))
    assert step.guessed is not None
    assert not step.guessed.any()
    assert step.threshold_rows.tolist() == [FULL_DEPTH]
    assert running._why == {}


def waiting(name: str, guess: Sequence[int] = GUESS, **changes: Any) -> Drafting:
    """A request whose prompt of 40 tokens has not begun."""
    grammar = XgrammarGrammar.__new__(XgrammarGrammar)
    values = {
        "request_id": name,
        "num_tokens": 40,
        "num_computed_tokens": 0,
        "num_output_tokens": 0,
        "output_token_ids": [],
        "num_output_placeholders": 0,
        "num_stale_output_tokens": 0,
        "is_prefill_chunk": False,
        "max_tokens": 40,
        "sampling_params": asking(),
        "structured_output_request": SimpleNamespace(grammar=grammar, reasoning_ended=None),
        **changes,
    }
    request: Any = SimpleNamespace(**values)
    return Drafting(request, Grammar("g"), END, guess=guess)


def drafts_of(
    objects: Guesses | None, *requests: Drafting, running: int = 2, chunked: bool = True
) -> Drafts:
    """In an engine whose steps have 100 tokens."""
    manager = SimpleNamespace(reasoner_cls=None, validate_tokens=lambda _, draft: draft)
    scheduler = SimpleNamespace(
        structured_output_manager=manager,
        vllm_config=SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 100)),
        max_num_scheduled_tokens=100,
        max_model_len=200,
        scheduler_config=SimpleNamespace(enable_chunked_prefill=chunked),
        running=[None] * running,
    )
    drafts = Drafts(scheduler, False, objects)
    drafts._requests = {one.request.request_id: one for one in requests}
    return drafts


@pytest.mark.parametrize(
    ("requests", "running", "guesses"),
    [
        ([], 0, 0),
        ([{}, {}], 0, 2),
        ([{}, {}, {}, {}], 0, 2),  # 49 tokens each, of 100
        ([{"num_computed_tokens": 32}] * 4, 0, 4),
        ([{"num_computed_tokens": 32}] * 4, 50, 3),  # the third ends a step later
        ([{"num_tokens": 300}, {}], 0, 0),  # the first takes all of the step
        ([{"num_tokens": 95}], 0, 1),  # it ends a step later, with its guess
        ([{}], 95, 0),
        ([{"num_output_tokens": 1}, {}], 0, 1),
        ([{"num_output_placeholders": 1}, {}], 0, 1),
    ],
)
def test_a_step_leaves_room_for_the_guesses_of_the_prompts_that_end_in_it(
    requests, running, guesses
):
    own = [waiting(str(number), **one) for number, one in enumerate(requests)]
    recorded = RecordedGuesses()
    found = drafts_of(recorded, *own, running=running).tokens_of_guesses()
    assert found == guesses * len(GUESS)
    assert drafts_of(None, *own, running=running).tokens_of_guesses() == 0
    whole = drafts_of(recorded, *own, running=running, chunked=False)
    assert whole.tokens_of_guesses() == 0, "a prompt may need all of the step"


def objects_of_policy() -> WrittenObjects:
    """Of a policy whose tokenizer is not looked at."""
    found = WrittenObjects({}, None)
    found._objects = {"policy": OBJECTS}
    return found


def planned(drafts: Drafts, monkeypatch: Any, scheduled: int) -> list[tuple[str, list[int], int]]:
    """Who gets a draft in a step with so many tokens, which one, and what it is to spare."""
    found = []

    def add_draft(_: Any, __: Any, request: Any, draft: list[int], spare: int) -> bool:
        found.append((request.request_id, draft, spare))
        return True

    monkeypatch.setattr(drafts_module, "add_draft", add_draft)
    step = SimpleNamespace(
        num_scheduled_tokens=dict.fromkeys(drafts._requests, 1),
        total_num_scheduled_tokens=scheduled,
    )
    drafts.plan(step)
    return found


def decided(request: Any, code: int, is_early: bool, told: list[Any]) -> Step:
    """A step that has decided the object of a request."""
    note = StepNote(None, None, objects={"b": DecidedObject("policy", code, is_early)})
    return Step(
        rows={"b": 4 + len(GUESS)},
        requests={},
        note=note,
        choosing=lambda **_: [(request, [*GUESS, END])],
        append=lambda *_: None,
        scores=lambda _: None,
        replace=lambda *one: told.append(one),
        drafted={"b": [*GUESS]},
    )


def test_guesses_come_first_and_whole_and_take_blocks_that_their_answers_need_anyway(monkeypatch):
    """The other request has written what the heads expect, and gets the rest of it."""
    written = {"output_token_ids": [*GUESS[:3]], "num_output_tokens": 3}
    other, own = waiting("a", guess=(), **written), waiting("b")
    objects = objects_of_policy()
    objects._probable["a"] = GUESS
    drafts = drafts_of(objects, other, own)
    room = 100 - len(GUESS) - 2
    assert planned(drafts, monkeypatch, room) == [
        ("b", [*GUESS], 0),
        ("a", [*GUESS[3:5]], 2),
    ]
    assert planned(drafts, monkeypatch, 100 - len(GUESS) + 1) == [
        ("a", [*GUESS[3:]], 2),
    ], "a part of a guess decides nothing"


def test_the_log_says_that_a_grammar_does_not_allow_the_guess(monkeypatch):
    """As where it was calibrated with white space, and is served without."""
    said: list[str] = []
    monkeypatch.setattr(drafts_module.logger, "warning_once", said.append)
    drafts = drafts_of(objects_of_policy(), waiting("b"))
    assert planned(drafts, monkeypatch, 0) == [("b", [*GUESS], 0)]
    assert not said
    drafts._manager.validate_tokens = lambda _, draft: draft[:2]
    assert planned(drafts, monkeypatch, 0) == [("b", [*GUESS[:2]], 0)]
    [line] = said
    assert "disable_any_whitespace" in line


def test_an_early_object_is_written_in_place_of_what_was_sampled_and_teaches_no_draft():
    own, objects = waiting("b"), objects_of_policy()
    drafts = drafts_of(objects, own)
    told: list[Any] = []
    step = decided(own.request, OBJECTS.link.code_of([0, 0, 0]), True, told)
    for observer in (objects, drafts):
        observer.stepped(step)
    assert told == [(own.request, [*GUESS, END], [*OBJECTS.written([0, 0, 0]), END], None)]
    assert objects.written == {"b"}
    assert own.grammar.answers.draft(own.before, 0.0, 1, END) == []


def test_an_object_that_is_not_settled_is_drafted_and_its_answer_is_learnt():
    own, objects = waiting("b"), objects_of_policy()
    drafts, told = drafts_of(objects, own), []
    step = decided(own.request, OBJECTS.link.code_of([2, 0, 0]), False, told)
    for observer in (objects, drafts):
        observer.stepped(step)
    assert not told
    assert not objects.written
    assert own.grammar.answers.draft(own.before, 0.0, 1, END) == [GUESS[0]]
    own.request.output_token_ids = [*GUESS[:7]]
    assert objects.rest(own.request) == [*OBJECTS.written([2, 0, 0])[7:]]
    own.request.output_token_ids = [*GUESS]  # not as the heads expected
    assert objects.rest(own.request) == []
    objects.ended(own.request, "abort")
    own.request.output_token_ids = []
    assert objects.rest(own.request) == []


def test_a_grammar_that_is_known_to_come_again_is_recorded_at_once():
    grammars = Grammars()
    known = grammars.arrived("", "json", "a", is_known=True)
    assert known is not None
    assert grammars.arrived("", "json", "a") is known
    assert grammars.arrived("", "json", "b") is None
    assert grammars.arrived("", "json", "b", is_known=True) is not None
