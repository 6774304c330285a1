"""Questions are named by their wording, recognised by the end of a prompt, certified alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams

from tests.admitted import resolved, row_of
from tests.calibrations import EPSILON, HF_CONFIG, SPLIT, of_pool
from tests.tiny import tiny_artifact, tiny_config
from vllm_adainfer.artifact.fields import Label, Question
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.startup.banner import policy_banner
from vllm_adainfer.engine.startup.refusals import refuse_policy
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.questions import (
    SEEN,
    common_end,
    ends_of,
    with_questions,
)
from vllm_adainfer.offline.calibration.enough_rows import check_questions
from vllm_adainfer.offline.calibration.fit_policy import make_policy
from vllm_adainfer.offline.calibration.options import PolicyOptions
from vllm_adainfer.offline.calibration.write.policy_artifact import (
    policy_config,
    question_rows,
)
from vllm_adainfer.offline.facts.artifact import artifact_facts
from vllm_adainfer.offline.facts.document import as_text
from vllm_adainfer.policy.questions import asked_among
from vllm_adainfer.settings.engine import Settings
from vllm_adainfer.watch.watch import Watch


class Characters:
    """A tokenizer whose tokens are characters; `~` and `^` are special ones."""

    all_special_tokens = ("^", "~")


def asked(
    *texts: str, question: str | None = None, end: str = "", prompts: int = SEEN
) -> list[Example]:
    """Prompts of each text with states of their own, written `*`."""
    filled = [text.replace("*", chr(200 + place)) for place in range(prompts) for text in texts]
    return [
        Example("", text + end, list(map(ord, text + end)), None, (1, 2), question=question)
        for text in filled
    ]


def named(examples: Sequence[Example]) -> list[str | None]:
    return list(dict.fromkeys(example.question for example in with_questions(examples, Characters)))


# Chat templates whose prompts end in a turn of the assistant, one with blank lines in it.
TURNS = "", "~^assistant", "~^assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["*\n\nGood?\nyes", "*.\n\nBad?\nyes"], ["Good?\nyes", "Bad?\nyes"]),
        (["*\n\nGood?\nyes"], ["Good?\nyes"]),
        (["*\n\nMood of *:", "*\nMood:", "*\nSide:"], ["other questions", "Mood:", "Side:"]),
        (["Review: *\nMood:"], ["Mood:"]),
    ],
)  # fmt: skip
def test_a_question_is_the_last_paragraph_or_line_that_many_prompts_have(texts, names, turn):
    found = named(asked(*texts, end=turn))
    assert [name and name.splitlines()[-1] for name in found] == [n.splitlines()[-1] for n in names]


def test_a_wording_that_few_prompts_have_is_among_the_others():
    examples = asked("*\n\nGood?", "*\n\nBad?") + asked("*\n\nFunny?", prompts=SEEN - 1)
    assert named(examples) == ["Good?", "Bad?", "other questions"]


def test_a_name_in_the_line_goes_before_the_wording():
    examples = asked("*\n\nGood?", "*\n\nFine?", question="mood") + asked("*\n\nLong?")
    assert named(examples) == ["mood", "Long?"]


def found_ends(*examples: list[Example]) -> dict[str, set[str]]:
    found = ends_of(with_questions([one for part in examples for one in part], Characters))
    return {name: {"".join(map(chr, end)) for end in ends} for name, ends in found.items()}


@pytest.mark.parametrize("turn", TURNS)
def test_a_question_is_recognised_by_the_longest_end_of_its_prompts_for_each_wording(turn):
    mood = asked("*\n\nGood?\nyes", "*.\n\nFine?\nyes", question="mood", end=turn)
    assert found_ends(mood, asked("*\n\nLong?\nyes", end=turn)) == {
        "mood": {f"\n\nGood?\nyes{turn}", f".\n\nFine?\nyes{turn}"},
        f"Long?\nyes{turn}" if turn == "" else "Long?\nyes": {f"\n\nLong?\nyes{turn}"},
    }


def test_a_question_whose_end_others_have_too_is_not_recognised():
    assert found_ends(asked("*\n\nIs it good?"), asked("*\n\nGood?")).keys() == {
        "Is it good?",
        "Good?",
    }
    same = asked("*\n\nGood?", question="a") + asked("*\n\nGood?", question="b")
    assert found_ends(same, asked("*\n\nLong?")).keys() == {"Long?"}
    rare = asked("*\n\nFunny?", prompts=SEEN - 1) + asked("*\n\nSad?", prompts=SEEN - 1)
    assert found_ends(asked("*\n\nGood?"), rare).keys() == {"Good?"}, "not by the mark of all"


def test_prompts_that_end_alike_in_nothing_ask_no_question():
    assert common_end([[1, 2, 3], [3], [2, 3]]) == (3,)
    assert common_end([[1, 2], [3]]) == ()
    assert ends_of(with_questions(asked("*", "Is *"), Characters)) == {}


def test_a_prompt_asks_the_question_with_the_longest_end():
    known = asked_among([[(3,), (1, 2)], [(9, 3)]])
    prompts = [4, 3], [1, 2], [9, 3], [2], [3, 4], []
    assert [known(prompt) for prompt in prompts] == [0, 0, 1, None, None, None]


ENDS = {f"question {place}": ((place,),) for place in range(2)}  # the third cannot be recognised


@pytest.fixture(scope="module")
def policy():
    """Each question certified on its own."""
    return make_policy(replace(of_pool(by_question=True), ends=ENDS))


def test_each_question_keeps_the_bound_on_its_own_and_others_run_to_the_end(policy):
    names = np.array(policy.calibration.questions)[SPLIT.certify]
    bound, point = policy.terms.bound, policy.points[EPSILON]
    assert policy.questions.keys() == ENDS.keys()
    for name, points in policy.questions.items():
        own = names == name
        assert np.array_equal(point.exits[own], points[EPSILON].exits)
        assert bound.of_rows(own).holds(point.losses[own], EPSILON)
        assert points[EPSILON].layers_saved > 0
    others = names == "question 2"
    assert (point.exits[others] == len(policy.exits)).all()
    layers = np.array([*(one.layer for one in policy.exits), policy.costs.depth])
    saved = 1 - layers[point.exits].mean() / policy.costs.depth
    assert point.layers_saved == pytest.approx(saved)


def test_the_report_says_what_each_question_promises(policy):
    config, rows = (
        policy_config(policy, "tiny", HF_CONFIG),
        question_rows(policy, policy.points[0.05]),
    )
    assert [(row["question"], row["known"], row["bound"] is None) for row in rows] == [
        ("question 0", True, False),
        ("question 1", True, False),
        ("question 2", False, True),
    ]
    level = config.levels[config.level_of(EPSILON)]
    assert level.bound == max(row["bound"] for row in rows if row["bound"] is not None) <= EPSILON
    details = {
        "rows": 1, "prompts": 1, "rows_held_out": 1, "seed": 0, "majority_share": 0.5,
        "exit_points": [], "questions": rows,
    }  # fmt: skip
    text = as_text(artifact_facts(config, details))
    assert "The bound holds for each question separately" in text
    assert "question 2 *" in text
    assert "for each of 2 questions, others run all layers" in policy_banner(
        "default", config, Settings(artifact="x")
    )


QUESTIONS = (
    Question(name="mood", ends=((7, 8), (5, 8)), certified=(0.02, 0.05)),
    Question(name="side", ends=((8,),), certified=(0.05,)),
)
PAIR = tuple(Label(name=name, token_id=token) for token, name in enumerate(("bad", "good"), 10))


def admission(tiny_model, tmp_path, by_question: bool, requests: str = "greedy") -> Admission:
    changes = {"labels": PAIR, "label_pool": True, "by_question": by_question}
    questions = [replace_certified(one, one.certified if by_question else ()) for one in QUESTIONS]
    config = {**changes, "questions": tuple(questions)}
    artifact = tiny_artifact(tiny_model, tmp_path / "policy", **config)
    first = tiny_artifact(tiny_model, tmp_path / "first")
    return Admission(
        Settings(artifact={"first": str(first), "second": str(artifact)}, requests=requests)
    )


def replace_certified(question: Question, certified: tuple[float, ...]) -> Question:
    return question.model_copy(update={"certified": certified})


@pytest.mark.parametrize(
    ("prompt", "epsilon", "by_question", "known"),
    [
        ([1, 7, 8], None, 1, 1),
        ([5, 8], None, 1, 1),
        ([1, 7, 8], 0.02, 0, 0),
        ([6, 8], None, 3, 1),
        ([6, 8], 0.02, FULL_DEPTH, 0),
        ([8, 6], None, FULL_DEPTH, FULL_DEPTH),
        ([7, 8], 0.0, FULL_DEPTH, FULL_DEPTH),
    ],
)
def test_a_question_that_is_not_known_or_not_certified_runs_at_full_depth(
    tiny_model, tmp_path, prompt, epsilon, by_question, known
):
    asked = {} if epsilon is None else {"adainfer_epsilon": epsilon}
    params = SamplingParams(
        temperature=0, max_tokens=1, allowed_token_ids=[10, 11], extra_args=asked
    )
    first = 2  # the tags of the policy before
    alone = admission(tiny_model, tmp_path / "a", True)
    assert row_of(alone, params, prompt) == (
        by_question + first if by_question >= 0 else FULL_DEPTH
    )
    mixture = admission(tiny_model, tmp_path / "b", False, "known")
    assert row_of(mixture, params, prompt) == (known + first if known >= 0 else FULL_DEPTH)
    for one in alone, mixture:
        assert resolved(one, params).may_exit == (epsilon != 0), (
            "the prefix cache asks before the prompt"
        )
    opted_out = SamplingParams(
        temperature=0, max_tokens=1, allowed_token_ids=[10, 11], extra_args={"adainfer": 0}
    )
    assert row_of(mixture, opted_out, prompt) == FULL_DEPTH


def test_a_monitor_watches_each_bound_over_all_questions():
    monitor = Watch([0.02, 0.05], 0.1)
    monitor.tightened[1] = True
    assert monitor.tightened_rows(4).tolist() == [False, True, False, True]
    assert monitor.levels_of(np.array([3, 0, 2])).tolist() == [1, 0, 0]


def test_known_is_refused_for_a_policy_that_knows_no_question(tiny_model):
    config = tiny_config(tiny_model)
    settings = Settings(artifact="x", requests="known")
    vllm_config: Any = SimpleNamespace(model_config=SimpleNamespace(runner_type="generate"))
    with pytest.raises(AdaInferError, match="policy default knows no question: calibrate it on"):
        refuse_policy("default", config, vllm_config, settings)
    refuse_policy("default", config, vllm_config, Settings(artifact="x"))


@pytest.mark.parametrize(
    ("texts", "epsilon", "sentence"),
    [
        (["*", "Is *"], 0.5, r"no question of rows can be recognised .* one needs 20 prompts"),
        (
            ["*\n\nGood?", "*\n\nBad?"],
            0.01,
            r"about 460 prompts of each .* commonest in rows has 20",
        ),
    ],
)
def test_data_that_certifies_no_question_alone_is_refused_before_the_model_runs(
    texts, epsilon, sentence
):
    examples = with_questions(asked(*texts), Characters)
    with pytest.raises(AdaInferError, match=sentence):
        check_questions(examples, PolicyOptions(epsilon=epsilon, by_question=True), "rows")
