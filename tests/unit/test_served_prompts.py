"""A policy serves the prompts that it was calibrated for: those with the tokens that all share."""

from __future__ import annotations

from typing import Any

import pytest
from vllm import SamplingParams

from tests import student
from tests.admitted import admitted
from tests.tiny import tiny_config, word_tokenizer
from tests.unit.test_pooled_policy import POOLED, QUESTIONS
from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.artifact.scope import served_prompts
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.startup.banner import policy_banner
from vllm_adainfer.exits.loop.step import FULL_DEPTH
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.shared import shared_tokens
from vllm_adainfer.settings.engine import Settings

SHARED = SharedTokens(start=(7, 8), end=(9, 10, 11))
OWN = [20, 21, 22]


def examples(*prompts: list[int]) -> list[Example]:
    return [Example("a.jsonl, line 1", "", prompt, None) for prompt in prompts]


class Merging:
    """A tokenizer that begins with 1, and makes one token of a dot and the line break after it."""

    def encode(self, text: str) -> list[int]:
        return [1, *map(ord, text.replace(".\n", "\0"))]


def prompts_of(template: str, *texts: str) -> list[Example]:
    return examples(*(Merging().encode(template.format(text=text)) for text in texts))


@pytest.mark.parametrize(
    ("prompts", "start", "end"),
    [
        ([[1, 2, 3, 9], [1, 2, 4, 5, 9]], (1, 2), (9,)),
        ([[1, 2, 3], [4, 2, 3]], (), (2, 3)),
        ([[1, 2], [1, 3]], (1,), ()),
        ([[1, 2, 3], [1, 2, 2, 3]], (1, 2), (3,)),  # the two never overlap
        ([[1, 2], [1, 5, 2], [1, 2, 2]], (1,), (2,)),
        ([[5], [6]], (), ()),
    ],
)
def test_they_are_what_all_prompts_begin_and_end_with(prompts, start, end):
    found = shared_tokens(examples(*prompts), Merging())
    assert (found.start, found.end) == (start, end)
    assert all(found.are_in(prompt) for prompt in prompts)


@pytest.mark.parametrize(
    ("template", "texts", "start", "end"),
    [
        ("Read: {text}\nGood?", ["ab", "cd"], "Read: ", "\nGood?"),
        ("Read: {text}\nGood?", ["xab", "xcd"], "Read: ", "\nGood?"),
        ("Read: {text}\nGood?", ["a.", "b."], "Read: ", "Good?"),
        ("{text} Good?", ["a", "b"], "", " Good?"),
        ("Good? {text}", ["a", "b"], "Good? ", ""),
        ("{{}} {text}{text} ok", ["a", "b"], "{} ", " ok"),
    ],
)
def test_of_a_template_only_its_own_text_counts_as_it_is_tokenised_alone(
    template, texts, start, end
):
    """So they are also in a prompt that a client joins of parts, as /generative_scoring does."""
    found = shared_tokens(prompts_of(template, *texts), Merging(), template)
    assert found == SharedTokens(start=(1, *map(ord, start)), end=tuple(map(ord, end)))
    joined = [*found.start, *map(ord, "own text"), *map(ord, template.rpartition("}")[2])]
    assert found.are_in(joined)


DATED = "Today : {{ strftime_now('%d') }} , {% for m in messages %}{{ m['content'] }}{% endfor %} :"


@pytest.mark.parametrize(
    ("chat_template", "prompt", "start"),
    [
        (DATED, "Today : 5 , {} Sentiment :", "Today :"),
        (DATED, "Review : 5 , {} Sentiment :", "Review : 5 ,"),
        (DATED.replace("strftime_now('%d')", "'5'"), "Today : 5 , {} Sentiment :", "Today : 5 ,"),
        ("{{ raise_exception('no') }}", "Today : 5 , {} Sentiment :", "Today : 5 ,"),
    ],
    ids=["dated", "not by the chat template", "without a date", "template that rejects"],
)
def test_a_date_that_the_chat_template_writes_is_another_tomorrow(chat_template, prompt, start):
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["Today", "5", "02", "23", ","])
    tokenizer.chat_template = chat_template
    encoded = [tokenizer.encode(prompt.format(text)) for text in ("clever", "a")]
    found = shared_tokens(examples(*encoded), tokenizer)
    assert tokenizer.decode(found.start) == start
    assert tokenizer.decode(found.end) == "Sentiment :"


def admission_of(tiny_model: Any, prompts: str = "calibrated", **changes: Any) -> Any:
    config = tiny_config(tiny_model, **{"shared": SHARED, **changes})
    params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=list(config.label_ids))
    requests = "known" if config.questions else "greedy"
    settings = Settings(artifact={"a": ""}, prompts=prompts, requests=requests)
    admission = Admission(settings, {"a": config})
    return lambda prompt, **more: admitted(admission, params.clone(), prompt, **more)


OTHERS = {
    "other end": [7, 8, *OWN, 9, 10, 12],
    "other start": [7, 6, *OWN, 9, 10, 11],
    "a token more": [5, 7, 8, *OWN, 9, 10, 11],
    "a token less": [7, 8, *OWN, 9, 10],
    "overlapping": [7, 8, 10, 11],
    "none": OWN,
    "empty": [],
}


@pytest.mark.parametrize("prompt", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("changes", [{}, POOLED], ids=["last token", "whole prompt"])
def test_another_prompt_runs_all_layers_for_the_reason_that_is_counted(tiny_model, prompt, changes):
    admit = admission_of(tiny_model, **changes)
    for one, covered in (([7, 8, *OWN, 9, 10, 11], True), (prompt, False)):
        found = admit(one)
        assert (found.threshold_row != FULL_DEPTH) == covered
        assert (found.last_token_row != FULL_DEPTH) == (covered and bool(changes))
        assert found.policy == "a"
        assert found.not_covered == (None if covered else "other_prompt")


@pytest.mark.parametrize("prompt", OTHERS.values(), ids=OTHERS)
def test_the_switch_lifts_it_for_heads(tiny_model, prompt):
    found = admission_of(tiny_model, "any")(prompt)
    assert (found.threshold_row, found.not_covered) == (1, None)


def test_without_shared_tokens_any_prompt_is_served(tiny_model):
    """Of artifacts made before, and of policies that a ledger watches."""
    admit = admission_of(tiny_model, shared=SharedTokens())
    assert all(admit(prompt).threshold_row == 1 for prompt in OTHERS.values())


def test_a_question_that_is_not_known_is_another_reason(tiny_model):
    questions = tuple(one.model_copy(update={"certified": ()}) for one in QUESTIONS)
    admit = admission_of(tiny_model, questions=questions, shared=SharedTokens(start=(7,)))
    known, unknown = admit([7, *OWN, 20, 30]), admit([7, *OWN, 1])
    assert (known.threshold_row, known.not_covered) == (1, None)
    assert (unknown.threshold_row, unknown.not_covered) == (FULL_DEPTH, "unknown_question")


def test_a_request_that_may_not_exit_anyway_has_no_reason(tiny_model):
    config = tiny_config(tiny_model, shared=SHARED)
    params = SamplingParams(temperature=0, max_tokens=1, allowed_token_ids=list(config.label_ids))
    admission = Admission(Settings(artifact={"a": ""}, epsilon=0), {"a": config})
    assert admitted(admission, params, OWN).not_covered is None


@pytest.mark.parametrize(
    ("shared", "text", "words"),
    [
        (SharedTokens(), None, "of any kind"),
        (SHARED, None, "that begin with the same 2 tokens and end with the same 3 tokens"),
        (SharedTokens(end=(3,)), "Sentiment :", "that end with 'Sentiment :', as all those"),
        (SharedTokens(start=(3,)), "a" * 70 + "b", f"with the text that has '{'a' * 59}b'"),
    ],
    ids=["none", "numbers", "text", "long text"],
)
def test_they_are_told_in_words_with_the_part_next_to_the_text(shared, text, words):
    decode = None if text is None else (lambda tokens: text)
    assert words in served_prompts(shared, decode)


@pytest.mark.parametrize("student_asked", [False, True])
def test_the_start_up_line_says_which_prompts_may_exit_and_what_lifting_that_means(
    tiny_model, student_asked
):
    more = {"exit_points": (0, 3), **student.asked_with(SHARED)} if student_asked else {}
    config = tiny_config(tiny_model, **{"shared": SHARED, **more})
    tokens = "the 2 first and 3 last tokens that all prompts of the calibration share"
    kept, lifted = (
        policy_banner("mood", config, Settings(artifact="policy", prompts=prompts))
        for prompts in ("calibrated", "any")
    )
    assert f"among bad, good, whose prompts have {tokens}" in kept
    assert f'with any prompt ("prompts": "any"): of those without {tokens}, nothing is' in lifted
    assert ("and its student is not asked" in lifted) == student_asked


def test_a_tokenizer_says_what_they_are():
    tokenizer = word_tokenizer()
    shared = SharedTokens(start=tokenizer.encode("Review :"), end=tokenizer.encode("Sentiment :"))
    assert served_prompts(shared, tokenizer.decode) == (
        "that begin with 'Review :' and end with 'Sentiment :', as all those of the calibration do"
    )
