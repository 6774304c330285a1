"""What is guessed of an object before the model has read the prompt."""

from __future__ import annotations

import numpy as np
import pytest

from tests.objects import BAD, BAD_SEEN, FAIR_SEEN, GOOD, GOOD_SEEN, object_config, two_fields
from tests.tiny import tiny_tensors
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.fields import SharedTokens
from vllm_adainfer.artifact.files import load_artifact, save_artifact
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.fit.guesser import fit_guesser, guesses_by_fold
from vllm_adainfer.policy.guesser import MOST_TOKENS, Guesser

OBJECTS, SHARED = two_fields(), SharedTokens(start=(1, 2), end=(3,))
DULL, FINE, WATCHED, FILLER = 50, 60, 70, range(80, 90)


def prompt(*tokens: int) -> list[int]:
    return [1, 2, *tokens, 3]


def taught(prompts: int = 60) -> tuple[list[list[int]], np.ndarray]:
    """Prompts of which one token tells the mood and another whether it was seen; and answers."""
    random = np.random.default_rng(0)
    found, answers = [], []
    for mood, seen in random.integers(0, 2, (prompts, 2)).tolist():
        tokens = [(DULL, FINE)[mood], *[WATCHED] * seen, *random.choice(FILLER, 4)]
        found.append(prompt(*random.permutation(tokens).tolist()))
        answers.append([2 * mood, seen])  # nothing is fair
    return found, np.array(answers)


@pytest.fixture(scope="module")
def guesser() -> Guesser:
    return fit_guesser(OBJECTS, SHARED, *taught())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([DULL, 81, 82], BAD),
        ([82, 81, 81, DULL], BAD),
        ([DULL, WATCHED], BAD_SEEN),
        ([FINE, 84, 84, 85], GOOD),
        ([FINE, WATCHED, 9999, 0, -1], GOOD_SEEN),
        ([FINE] * MOST_TOKENS + [WATCHED], GOOD),
    ],
    ids=["a text", "in any order", "both", "repeated", "unknown tokens", "beyond the cap"],
)
def test_a_guess_is_learnt_from_the_tokens_of_texts(guesser, text, expected):
    assert OBJECTS.link.code_of(guesser.places(prompt(*text))) == expected


@pytest.mark.parametrize(("written", "rows"), [(BAD_SEEN, 0), (BAD, 2), (GOOD_SEEN, 4), (GOOD, 4)])
def test_full_depth_discards_a_guess_from_its_first_wrong_value_on(guesser, written, rows):
    """Each value has two tokens, and two stand before the first."""
    assert guesser.wasted(prompt(DULL, WATCHED), written) == rows


def test_what_all_prompts_share_and_values_that_were_never_written_tell_nothing(guesser):
    assert not {1, 2, 3} & set(guesser.tokens.tolist())
    assert OBJECTS.link.code_of(guesser.places([])) != FAIR_SEEN
    fair = np.array([guesser.places(one)[0] for one in taught(200)[0]]) == 1
    assert not fair.any()


def test_a_text_is_guessed_by_what_has_not_seen_its_fold():
    """Each prompt has one token, which no other has."""
    _, answers = taught()
    prompts = [prompt(200 + place) for place in range(len(answers))]
    folds = np.arange(len(prompts)) % 5
    known = fit_guesser(OBJECTS, SHARED, prompts, answers)
    assert len({tuple(known.places(one)) for one in prompts}) == 4
    unseen = np.array(guesses_by_fold(OBJECTS, SHARED, prompts, answers, folds))
    for fold in range(5):
        assert len(np.unique(unseen[folds == fold], axis=0)) == 1, "the commonest of the others"


def test_an_artifact_keeps_what_guesses_and_without_it_the_commonest_object_is_guessed(
    guesser, tiny_model, tmp_path
):
    config = object_config(tiny_model).model_copy(update={"shared": SHARED})
    tensors = tiny_tensors(config)
    plain = Guesser.of(Artifact(config, tensors))
    assert plain.places(prompt(DULL)) == OBJECTS.commonest
    assert plain.tensors == {}
    config = config.model_copy(update={"output": guesser.objects})
    assert config.objects != OBJECTS, "a reload must not change what guesses"
    save_artifact(tmp_path / "policy", config, tensors | guesser.tensors, {}, "card\n")
    loaded = Guesser.of(load_artifact(str(tmp_path / "policy")))
    for one in taught()[0]:
        assert loaded.places(one) == guesser.places(one)


@pytest.mark.parametrize("name", ["guess.tokens", "guess.weight"])
def test_an_artifact_with_half_of_a_guesser_is_refused(guesser, tiny_model, tmp_path, name):
    config = object_config(tiny_model, output=guesser.objects)
    half = {one: tensor for one, tensor in guesser.tensors.items() if one != name}
    save_artifact(tmp_path / "policy", config, tiny_tensors(config) | half, {}, "card\n")
    with pytest.raises(AdaInferError, match=r"tensor guess\."):
        load_artifact(str(tmp_path / "policy"))
