"""The guess of an object behind its prompt: who gets one, what it takes, and what follows."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams

from tests.admitted import admitted, resolved
from tests.calibrations import OBJECTS
from tests.running import new_request, running_requests
from tests.tiny import tiny_config, tiny_tensors
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.drafts.grammars import Grammars
from vllm_adainfer.drafts.schemas import digest_of
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.compat.scheduler import fewer_tokens, replace_tokens
from vllm_adainfer.engine.scheduler.drafts import Drafting, Drafts
from vllm_adainfer.engine.scheduler.objects import RecordedGuesses
from vllm_adainfer.exits.loop.step import CPU, FULL_DEPTH
from vllm_adainfer.settings.engine import Settings

SCHEMA = {"type": "object", "properties": {"mood": {"enum": ["bad", "fine", "good"]}}}
GUESS, PROMPT = OBJECTS.guess, [5] * 4


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
def test_requests_for_the_schema_have_a_guess_if_nothing_else_is_asked(source, params, exits):
    admission = Admission(Settings(artifact=source))
    assert resolved(admission, params).may_exit == exits
    assert admitted(admission, params).guessed == (len(GUESS) if exits else 0)
    assert (admitted(admission, params).threshold_row != FULL_DEPTH) == exits


@pytest.mark.parametrize(
    ("drafted", "computed", "rows", "why"),
    [
        ([len(GUESS)], 0, 4 + len(GUESS), None),
        ([len(GUESS)], 3, 1 + len(GUESS), None),
        ([len(GUESS) - 1], 0, 4 + len(GUESS) - 1, "not_guessed"),
        ([0], 0, 4, "not_guessed"),
        (None, 0, 4, "not_guessed"),
        ([len(GUESS)], 4, 1 + len(GUESS), "beyond_bound"),
    ],
    ids=["whole", "prefix cached", "a part", "no room", "no drafts", "a later token"],
)
def test_an_object_may_be_early_only_in_the_step_with_its_whole_guess(
    source, tmp_path, drafted, computed, rows, why
):
    running = running_requests({"artifact": source, "audit": {"directory": str(tmp_path)}})
    running.add(new_request(asking(), PROMPT))
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


def waiting(name: str, **changes: Any) -> Drafting:
    """A request whose prompt of 40 tokens has not begun."""
    values = {
        "request_id": name,
        "num_tokens": 40,
        "num_computed_tokens": 0,
        "num_output_tokens": 0,
        "num_output_placeholders": 0,
        **changes,
    }
    request: Any = SimpleNamespace(**values)
    grammar: Any = None
    return Drafting(request, grammar, 2, guess=GUESS)


@pytest.mark.parametrize(
    ("requests", "guesses"),
    [
        ([], 0),
        ([{}, {}], 2),
        ([{}, {}, {}, {}], 2),  # 49 tokens each, of 100
        ([{"num_computed_tokens": 32}] * 4, 4),
        ([{"num_tokens": 300}, {}], 0),  # the first takes all of the step
        ([{"num_output_tokens": 1}, {}], 1),
        ([{"num_output_placeholders": 1}, {}], 1),
    ],
)
def test_a_step_leaves_room_for_the_guesses_of_the_prompts_that_end_in_it(requests, guesses):
    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 100))
    scheduler = SimpleNamespace(
        structured_output_manager=None, vllm_config=config, max_num_scheduled_tokens=100
    )
    for objects, expected in ((RecordedGuesses(), guesses), (None, 0)):
        drafts = Drafts(scheduler, False, objects)
        drafts._requests = {str(n): waiting(str(n), **one) for n, one in enumerate(requests)}
        assert drafts.tokens_of_guesses() == expected * len(GUESS)


def test_vllm_schedules_with_fewer_tokens_for_that_step_alone():
    def schedule() -> None:
        with fewer_tokens(scheduler, 18):
            assert scheduler.max_num_scheduled_tokens == 82
            raise KeyError

    scheduler = SimpleNamespace(max_num_scheduled_tokens=100)
    with pytest.raises(KeyError):
        schedule()
    assert scheduler.max_num_scheduled_tokens == 100


@pytest.mark.parametrize("length", [1, 5, len(GUESS), len(GUESS) + 1, len(GUESS) + 6])
def test_an_object_in_place_of_what_was_sampled_counts_no_row_that_never_ran(length):
    """vLLM takes back the drafted rows beyond the kept ones: it expects a token more than those."""
    request: Any = SimpleNamespace(request_id="a", num_computed_tokens=4 + len(GUESS))
    scheduled = SimpleNamespace(scheduled_spec_decode_tokens={"a": list(GUESS)})
    sampled, written = [7, 8], list(range(length))
    replace_tokens(scheduled, request, sampled, written)
    assert sampled == written
    accepted = len(sampled) - 1
    request.num_computed_tokens -= len(GUESS) - accepted  # `Scheduler.update_from_output`
    assert request.num_computed_tokens == 4 + min(len(GUESS), accepted)


def test_a_grammar_that_is_known_to_come_again_is_recorded_at_once():
    grammars = Grammars()
    known = grammars.arrived("", "json", "a", is_known=True)
    assert known is not None
    assert grammars.arrived("", "json", "a") is known
    assert grammars.arrived("", "json", "b") is None
    assert grammars.arrived("", "json", "b", is_known=True) is not None
