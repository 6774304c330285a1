from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Settings, Switch
from vllm_adainfer.settings.instruments import RequestInstruments, SwitchInstruments
from vllm_adainfer.settings.request import (
    NO_REQUEST_SETTINGS,
    RequestKeys,
    RequestSettings,
    read_request,
)

KEYS = tuple(RequestSettings.model_fields)


def nested(depth: int) -> list[Any]:
    """A list in a list in a list."""
    found: list[Any] = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (True, True), (1, True), (1.0, True), ("1", True), ("true", True), ("True", True),
        ("yes", True), ("on", True),
        (False, False), (0, False), (0.0, False), ("0", False), ("false", False),
        ("False", False), ("no", False), ("off", False),
        (None, None),
    ],
    ids=repr,
)  # fmt: skip
def test_yes_and_no_are_understood_in_every_spelling_of_json(given, meant):
    assert read_request({"adainfer": given}).adainfer is meant


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("adainfer_policy", "reviews"),
        ("adainfer_epsilon", 0),
        ("adainfer_epsilon", 0.02),
        ("adainfer_epsilon", 0.999),
        ("adainfer_exit", 12),
        ("adainfer_row", 0),
    ],
)
def test_every_key_is_read_and_leaves_the_others_alone(key, value):
    assert read_request({key: value}) == RequestSettings.model_validate({key: value})
    read = read_request({key: value}).model_dump()
    assert {name: read[name] for name in KEYS if read[name] is not None} == {key: value}


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("adainfer", 2, "adainfer = 2: Input should be a valid boolean"),
        ("adainfer", 0.5, "adainfer = 0.5: Input should be a valid boolean"),
        ("adainfer", "maybe", "adainfer = 'maybe': Input should be a valid boolean"),
        ("adainfer", "", "adainfer = '': Input should be a valid boolean"),
        ("adainfer", [1], "adainfer = [1]: Input should be a valid boolean"),
        ("adainfer", {}, "adainfer = {}: Input should be a valid boolean"),
        ("adainfer_policy", 3, "adainfer_policy = 3: Input should be a valid string"),
        ("adainfer_policy", ["a"], "adainfer_policy = ['a']: Input should be a valid string"),
        ("adainfer_epsilon", "0.02", "adainfer_epsilon = '0.02': Input should be a valid number"),
        ("adainfer_epsilon", True, "adainfer_epsilon = True: Input should be a valid number"),
        ("adainfer_epsilon", -0.1, "adainfer_epsilon = -0.1: Input should be greater than or"),
        ("adainfer_epsilon", 1, "adainfer_epsilon = 1: Input should be less than 1"),
        ("adainfer_epsilon", math.nan, "adainfer_epsilon = nan: Input should be"),
        ("adainfer_epsilon", math.inf, "adainfer_epsilon = inf: Input should be less than 1"),
        ("adainfer_epsilon", [0.02], "adainfer_epsilon = [0.02]: Input should be a valid number"),
        ("adainfer_exit", "12", "adainfer_exit = '12': Input should be a valid integer"),
        ("adainfer_exit", 12.0, "adainfer_exit = 12.0: Input should be a valid integer"),
        ("adainfer_exit", True, "adainfer_exit = True: Input should be a valid integer"),
        ("adainfer_row", 0.5, "adainfer_row = 0.5: Input should be a valid integer"),
        ("adainfer_row", {}, "adainfer_row = {}: Input should be a valid integer"),
    ],
)
def test_an_invalid_value_is_named_with_what_would_be_valid(key, value, sentence):
    with pytest.raises(AdaInferError) as caught:
        read_request({key: value})
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("documented", [Switch, RequestKeys])
def test_instruments_of_benchmarks_and_tests_are_accepted_but_not_documented(documented):
    instruments = {*SwitchInstruments.model_fields, *RequestInstruments.model_fields}
    assert instruments.isdisjoint(documented.model_fields)
    assert instruments <= {*Settings.model_fields, *RequestSettings.model_fields}


@pytest.mark.parametrize("key", ["adainfer_epsilons", "adainfer-epsilon", "adainferEpsilon"])
def test_an_unknown_key_with_our_prefix_is_answered_with_the_known_keys(key):
    with pytest.raises(AdaInferError) as caught:
        read_request({"adainfer": 1, key: 0.02})
    assert str(caught.value) == (
        f"{key!r} is not a key that vllm-adainfer knows; its keys are adainfer, adainfer_policy, "
        "adainfer_epsilon"
    )


@pytest.mark.parametrize(
    "arguments",
    [None, {}, {"top": 1}, {"_adainfer": 1}, {"AdaInfer": 7}, {"my_adainfer": []}],
)
def test_keys_without_our_prefix_are_ignored(arguments):
    assert read_request(arguments) is NO_REQUEST_SETTINGS
    read = read_request({**(arguments or {}), "adainfer": 0})
    assert read == RequestSettings.model_validate({"adainfer": 0})


@pytest.mark.parametrize(
    "arguments",
    [
        {"adainfer": "x" * 10_000},
        {"adainfer_exit": list(range(10_000))},
        {"adainfer_policy": {"x" * 10_000: 1}},
        {"adainfer_epsilon": 10**1000},
        {"adainfer_" + "x" * 10_000: 1},
    ],
    ids=["text", "list", "object", "number", "key"],
)
def test_a_long_value_is_cut_in_the_message(arguments):
    with pytest.raises(AdaInferError) as caught:
        read_request(arguments)
    assert len(str(caught.value)) < 220


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda parts: st.lists(parts) | st.dictionaries(st.text(), parts),
    max_leaves=8,
)
keys = st.sampled_from(KEYS) | st.text() | st.text().map("adainfer{}".format)


@given(st.dictionaries(keys, json_values, max_size=4))
def test_any_json_in_a_request_is_understood_or_refused(arguments: dict[str, Any]):
    try:
        read = read_request(arguments)
    except AdaInferError:
        return
    assert read.adainfer in (None, False, True)
    assert read.adainfer_epsilon is None or 0 <= read.adainfer_epsilon < 1
    given = {key: arguments[key] for key in KEYS if arguments.get(key) is not None}
    given.pop("adainfer", None)
    assert read.model_dump(mode="json", exclude={"adainfer"}, exclude_none=True) == given


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"adainfer\ud800": 1}, "a key of extra_args"),
        ({"adainfer": 10**5000}, "a value of type int"),
        ({"adainfer": nested(5000)}, "a value of type list"),
    ],
    ids=["a lone surrogate", "thousands of digits", "thousands of levels"],
)
def test_a_value_that_cannot_be_shown_is_refused_all_the_same(given, sentence):
    with pytest.raises(AdaInferError, match=sentence):
        read_request(given)
