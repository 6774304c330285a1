"""A policy is for weights as an engine runs them: with which options they were calibrated."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest

from tests.families import FAMILIES, SHAPE
from tests.tiny import tiny_artifact, tiny_config
from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.artifact.files import load_artifact_config
from vllm_adainfer.auto.directory import read_json, write_json
from vllm_adainfer.engine.compat.config import _changed_values
from vllm_adainfer.engine.worker.model_facts import forget_others
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.engine import start_engine
from vllm_adainfer.offline.pretrained import engine_settings
from vllm_adainfer.settings.engine import Auto

ROPE = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
PLAIN = EngineOptions(hf_config={"hidden_size": 64})
LONG = EngineOptions(hf_overrides=ROPE, hf_config={"hidden_size": 64, **ROPE})
OLD = EngineOptions()


@pytest.mark.parametrize(
    ("own", "served", "sentence"),
    [
        (
            PLAIN,
            {"quantization": "fp8"},
            "without --quantization; the server has --quantization fp8: calibrate with it, or "
            "serve without",
        ),
        (
            OLD,
            {"kv_cache_dtype": "fp8"},
            "without --kv-cache-dtype; the server has --kv-cache-dtype fp8: calibrate with it",
        ),
        (
            EngineOptions(quantization="fp8"),
            {},
            "with --quantization fp8; the server has none: serve with it, or calibrate again",
        ),
        (
            EngineOptions(quantization="fp8"),
            {"quantization": "fp8_per_block"},
            "with --quantization fp8; the server has --quantization fp8_per_block: serve with fp8",
        ),
        (
            EngineOptions(quantization="online"),
            {"quantization": "online", "quantization_config": '{"ignore": ["a"]}'},
            'without --quantization-config; the server has --quantization-config {"ignore": ["a"]}'
            ": serve without",
        ),
        (
            PLAIN,
            LONG.model_dump(),
            "with rope_parameters = null in the model's config; the server's has rope_parameters "
            '= {"rope_type": "yarn", "factor": 4.0}: calibrate with the --hf-overrides and the '
            "config.json that you serve with",
        ),
        (
            PLAIN,
            {"hf_config": {"hidden_size": 64, **ROPE}},  # written into config.json
            "with rope_parameters = null in the model's config; the server's has rope_parameters",
        ),
        (
            OLD,
            LONG.model_dump(),
            'without --hf-overrides; the server has --hf-overrides \'{"rope_parameters": ',
        ),
        (OLD, {"hf_overrides": {"head_dtype": "float32"}}, '{"head_dtype": "float32"}\''),
    ],
)
def test_a_server_that_computes_something_else_is_told_by_which_option(
    tiny_model, own, served, sentence
):
    config = tiny_config(tiny_model, engine_options=own)
    with pytest.raises(AdaInferError) as caught:
        config.check_options(EngineOptions(**{"hf_config": PLAIN.hf_config, **served}))
    assert f"the artifact for {config.base_model} was calibrated " in str(caught.value)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("own", "served"),
    [
        (PLAIN, PLAIN),
        (LONG, LONG),
        (LONG, LONG.model_copy(update={"hf_overrides": {}})),  # written into config.json
        (OLD, PLAIN),
        (
            OLD,
            EngineOptions(hf_overrides={"classifier_from_token": ["no", "yes"]}),
        ),
        (EngineOptions(quantization="fp8"), EngineOptions(quantization="fp8", hf_config={})),
        (EngineOptions(dtype="float32"), OLD),  # the fingerprint of the weights tells
    ],
)
def test_a_server_that_computes_the_same_is_served(tiny_model, own, served):
    tiny_config(tiny_model, engine_options=own).check_options(served)


def test_an_engine_gets_the_options_that_calibration_was_asked_for():
    asked = EngineOptions(dtype="float32", kv_cache_dtype="fp8")
    settings = {"dtype": "float32", "kv_cache_dtype": "fp8", "hf_overrides": ROPE}
    assert engine_settings(None, ROPE, asked) == settings


def test_an_artifact_keeps_them_and_one_without_has_vllms_defaults(tiny_model, tmp_path):
    options = LONG.model_copy(update={"quantization": "fp8", "kv_cache_dtype": "fp8"})
    kept = tiny_artifact(tiny_model, tmp_path / "kept", engine_options=options)
    assert load_artifact_config(str(kept)).engine_options == options
    assert options.in_words.startswith("--quantization fp8 --kv-cache-dtype fp8 --hf-overrides {")
    path = kept / "config.json"
    before = load_artifact_config(str(kept)).model_dump(mode="json", exclude={"engine_options"})
    write_json(path, before)
    assert load_artifact_config(str(kept)).engine_options == OLD


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_the_computation_is_kept_for_every_family_and_nothing_else(family):
    def kept(**changes: Any) -> dict[str, Any]:
        config = FAMILIES[family](**SHAPE)
        for key, value in changes.items():
            setattr(config.get_text_config(), key, value)
        return _changed_values(config)

    assert kept() == kept(architectures=["Other"], eos_token_id=7, transformers_version="9")
    changed = kept(**ROPE, head_dtype="float32")
    assert changed == {**kept(), **ROPE, "head_dtype": "float32"}
    assert EngineOptions.model_validate_json(
        EngineOptions(hf_config=changed).model_dump_json()
    ) == EngineOptions(hf_config=changed)


@pytest.mark.parametrize(
    ("before", "now", "starts_anew"),
    [
        (PLAIN, PLAIN, False),
        (None, PLAIN, False),  # by a version that did not keep them
        (None, PLAIN.model_copy(update={"quantization": "fp8"}), True),
        (PLAIN, PLAIN.model_copy(update={"kv_cache_dtype": "fp8"}), True),
        (PLAIN, LONG, True),
        (LONG, PLAIN, True),
    ],
)
def test_rows_of_a_server_that_calibrates_itself_are_not_mixed_with_those_of_other_options(
    directory, before, now, starts_anew
):
    def start(options: EngineOptions) -> None:
        policies = SimpleNamespace(exit_points=(2, 3))
        model = SimpleNamespace(
            fingerprint="0123", engine_options=options, loop=SimpleNamespace(policies=policies)
        )
        forget_others(directory, Auto(directory=str(directory.root)), model)

    start(PLAIN if before is None else before)
    if before is None:
        identity = read_json(directory.identity)
        del identity["engine_options"]
        write_json(directory.identity, identity)
    (directory.root / "kind-1" / "rows").mkdir(parents=True)
    start(now)
    assert (directory.root / "kind-1").exists() != starts_anew


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ({"dtype": "float99"}, "dtype is 'float99', and should be 'auto', 'half', 'float16', "),
        ({"kv_cache_dtype": "fp99"}, "cache_dtype is 'fp99', and should be 'auto', 'float16', "),
        ({"quantization": "x99"}, "Unknown quantization method: x99. Must be one of ['awq', "),
    ],
    ids=str,
)
def test_a_value_that_vllm_does_not_have_is_one_sentence(tiny_model, option, sentence):
    # Other tests run in this process, without what an engine sets for those it starts.
    with patch.dict(os.environ), pytest.raises(AdaInferError) as raised:
        start_engine(str(tiny_model), [Example("line 1", "good", [1], None)], **option)
    [line] = str(raised.value).splitlines()
    assert line.startswith(f"vLLM could not start {tiny_model}: {sentence}")
