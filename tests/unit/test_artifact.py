from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import LlamaConfig

from tests.families import FAMILIES, SHAPE
from tests.tiny import tiny_config, tiny_tensors
from vllm_adainfer.artifact import files as module
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.artifact.files import (
    CALIBRATION_FILE,
    CARD_FILE,
    CONFIG_FILE,
    POLICY_FILE,
    load_artifact,
    save_artifact,
)
from vllm_adainfer.artifact.outputs import Labels, Tokens
from vllm_adainfer.errors import AdaInferError


@pytest.fixture(scope="module")
def config(tiny_model) -> ArtifactConfig:
    return tiny_config(tiny_model)


def changed(config: ArtifactConfig, **changes: Any) -> ArtifactConfig:
    return ArtifactConfig(**{**dict(config), **changes})


def save(directory: Path, config: ArtifactConfig, tensors: dict[str, Tensor] | None = None) -> Path:
    tensors = tensors_of(config) if tensors is None else tensors
    save_artifact(directory, config, tensors, {"rows": 3}, "card\n")
    return directory


def tensors_of(config: ArtifactConfig) -> dict[str, Tensor]:
    tensors = tiny_tensors(config)
    if config.probe == "label-head":
        return tensors
    hidden = config.hidden_size
    tensors = {name: t for name, t in tensors.items() if not name.endswith(("weight", "bias"))}
    if config.labels:
        tensors["head_rows"] = torch.rand(len(config.labels), hidden)
    for layer in config.exit_points if config.probe == "lens" else ():
        tensors[f"exit.{layer}.lens_weight"] = torch.rand(hidden, hidden)
        tensors[f"exit.{layer}.lens_bias"] = torch.rand(hidden)
    return tensors


SERVED_SHAPES = {
    "svm": (3,),
    "logreg": (3,),
    "threshold": (3,),
    "crf": (7,),
}


@pytest.mark.parametrize("kind", SERVED_SHAPES)
def test_a_classifier_is_saved_in_its_own_form_and_no_other(tmp_path, config, kind):
    config = changed(config, classifier=kind)
    for form in set(SERVED_SHAPES.values()):
        tensors = tensors_of(config)
        tensors |= {f"exit.{layer}.classifier": torch.rand(form) for layer in config.exit_points}
        directory = save(tmp_path / "policy", config, tensors)
        if form == SERVED_SHAPES[kind]:
            loaded = load_artifact(str(directory))
            assert torch.equal(loaded.tensors["exit.2.classifier"], tensors["exit.2.classifier"])
        else:
            with pytest.raises(AdaInferError, match=r"exit\.2\.classifier must have shape"):
                load_artifact(str(directory))


@pytest.mark.parametrize(
    ("key", "removed", "kept"),
    [
        ("classifier", "rbf", "'svm', 'logreg', 'threshold' or 'crf'"),
        ("classifier", "boosting", "'svm', 'logreg', 'threshold' or 'crf'"),
        ("bound", "naive", "'exact' or 'wsr'"),
        ("bound", "hoeffding-bentkus", "'exact' or 'wsr'"),
    ],
)
def test_an_artifact_of_a_removed_kind_is_refused_with_what_to_calibrate_with(
    tmp_path, config, key, removed, kept
):
    directory = save(tmp_path / "policy", config, tensors_of(config))
    written = json.loads((directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps({**written, key: removed}))
    sentence = rf"\({key}: Input should be {kept}\): calibrate again"
    with pytest.raises(AdaInferError, match=sentence):
        load_artifact(str(directory))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("probe", "candidates"),
    [
        ("label-head", "labels"),
        ("lens", "labels"),
        ("lens", "full"),
        ("logit-lens", "labels"),
        ("logit-lens", "full"),
    ],
)
def test_what_is_saved_is_what_is_loaded(tmp_path, config, probe, candidates):
    output = config.output if candidates == "labels" else Tokens(candidates=candidates)
    config = changed(config, probe=probe, output=output)
    tensors = tensors_of(config)
    loaded = load_artifact(str(save(tmp_path / "policy", config, tensors)))
    assert loaded.config == config
    assert loaded.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(loaded.tensors[name], tensor)
        assert loaded.tensors[name].dtype == tensor.dtype


@pytest.mark.parametrize("head_size", [None, 32], ids=["hidden size", "narrower"])
def test_rows_of_the_head_are_as_wide_as_what_it_reads(tmp_path, config, head_size):
    config = changed(config, probe="logit-lens", head_size=head_size)
    width = head_size or config.hidden_size
    for found in (32, 64):
        tensors = tensors_of(config) | {"head_rows": torch.rand(len(config.labels), found)}
        directory = save(tmp_path / "policy", config, tensors)
        if found == width:
            assert load_artifact(str(directory)).tensors["head_rows"].shape[1] == width
        else:
            with pytest.raises(AdaInferError, match="head_rows must have shape"):
                load_artifact(str(directory))


def lens_config(config: ArtifactConfig) -> ArtifactConfig:
    return changed(config, probe="lens", output=Tokens(candidates="full"))


def test_a_lens_of_low_rank_is_refused(tmp_path, config):
    """As earlier versions calibrated it for wide models."""
    config = lens_config(config)
    tensors = tensors_of(config)
    lens = f"exit.{config.exit_points[1]}.lens"
    del tensors[f"{lens}_weight"]
    tensors[f"{lens}_down"], tensors[f"{lens}_up"] = torch.rand(64, 4), torch.rand(4, 64)
    with pytest.raises(AdaInferError, match="is of low rank, which is served no more: calibrate"):
        load_artifact(str(save(tmp_path / "policy", config, tensors)))


def test_an_artifact_is_these_files_and_nothing_beside_it(tmp_path, config):
    directory = save(tmp_path / "deep" / "policy", config)
    assert set(content(directory)) == {
        CONFIG_FILE,
        POLICY_FILE,
        CALIBRATION_FILE,
        CARD_FILE,
    }
    assert json.loads((directory / CALIBRATION_FILE).read_text()) == {"rows": 3}
    assert list(directory.parent.iterdir()) == [directory]


@pytest.mark.parametrize("there", ["an artifact", "an empty directory"])
def test_an_artifact_or_an_empty_directory_is_replaced(tmp_path, config, there):
    directory = tmp_path / "policy"
    if there == "an artifact":
        save(directory, changed(config, epsilon=0.02))
        (directory / "stale").write_text("of the former one")
    else:
        directory.mkdir()
    save(directory, config)
    assert load_artifact(str(directory)).config == config
    assert not (directory / "stale").exists()


def test_a_link_to_an_artifact_stays_one(tmp_path, config):
    directory, link = save(tmp_path / "policy", changed(config, epsilon=0.02)), tmp_path / "link"
    link.symlink_to(directory)
    save(link, config)
    assert load_artifact(str(directory)).config == config
    assert link.readlink() == directory
    assert {*tmp_path.iterdir()} == {directory, link}


def make_file(path: Path) -> None:
    path.write_text("notes")


def make_other_directory(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("notes")


def make_checkpoint(path: Path) -> None:
    path.mkdir()
    (path / CONFIG_FILE).write_text('{"architectures": ["LlamaForCausalLM"]}')
    (path / "model.safetensors").write_bytes(b"weights")


@pytest.mark.parametrize(
    "make",
    [make_file, make_other_directory, make_checkpoint],
)
def test_what_is_no_artifact_is_not_overwritten(tmp_path, config, make):
    target = tmp_path / "policy"
    make(target)
    before = content(tmp_path) if target.is_file() else content(target)
    with pytest.raises(AdaInferError, match="was not written by vllm-adainfer"):
        save(target, config)
    assert before == (content(tmp_path) if target.is_file() else content(target))
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_in_place_of_the_parent_is_an_error(tmp_path, config):
    (tmp_path / "file").write_text("notes")
    with pytest.raises(AdaInferError, match=r"cannot write to .*file"):
        save(tmp_path / "file" / "policy", config)


@pytest.mark.parametrize("former", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        OSError("No space left on device"),
        SafetensorError("I/O error: No space left on device"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failing_save_leaves_things_as_they_were(tmp_path, config, monkeypatch, error, former):
    directory = tmp_path / "policy"
    if former:
        save(directory, config)
    before = content(directory) if former else None

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(module, "save_file", fail)
    with pytest.raises(AdaInferError, match=r"cannot write the artifact to .*No space left"):
        save(directory, changed(config, epsilon=0.02))
    assert list(tmp_path.iterdir()) == ([directory] if former else [])
    assert before == (content(directory) if former else None)


@pytest.mark.parametrize("step", ["replace", "rename"], ids=["moved away", "moved there"])
def test_an_artifact_whose_place_cannot_be_taken_stays_what_it_was(
    tmp_path, config, monkeypatch, step
):
    directory = tmp_path / "policy"
    save(directory, config)
    before = content(directory)
    move = getattr(Path, step)

    def fail_once(self: Path, target: Path) -> Any:
        monkeypatch.setattr(Path, step, move)
        raise OSError("Device or resource busy")

    monkeypatch.setattr(Path, step, fail_once)
    with pytest.raises(AdaInferError, match=r"cannot write the artifact to .*busy"):
        save(directory, changed(config, epsilon=0.02))
    assert list(tmp_path.iterdir()) == [directory]
    assert content(directory) == before


def test_an_artifact_that_cannot_be_put_back_is_kept_where_the_error_says(
    tmp_path, config, monkeypatch
):
    directory = tmp_path / "policy"
    save(directory, config)
    before = content(directory)
    replace = Path.replace

    def fail(self: Path, target: Path) -> Any:
        raise OSError("Device or resource busy")

    def replace_once(self: Path, target: Path) -> Any:
        monkeypatch.setattr(Path, "replace", fail)
        return replace(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    monkeypatch.setattr(Path, "replace", replace_once)
    with pytest.raises(AdaInferError, match="move it back") as caught:
        save(directory, changed(config, epsilon=0.02))
    [kept] = tmp_path.iterdir()
    assert f"is now {kept}: move it back" in str(caught.value)
    assert content(kept) == before


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def truncate(keep: float) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        whole = (directory / POLICY_FILE).read_bytes()
        (directory / POLICY_FILE).write_bytes(whole[: int(keep * len(whole))])

    return damage


def write_config(text: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / CONFIG_FILE).write_bytes(text)


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


NOTHING: dict[str, Any] = {"kind": "labels", "labels": []}
ONE_LABEL = {"kind": "labels", "labels": [{"name": "good", "token_id": 7}]}


@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (remove(CONFIG_FILE), CONFIG_FILE, "has no"),
        (remove(POLICY_FILE), POLICY_FILE, "has no"),
        (truncate(0.9), POLICY_FILE, "cannot be read"),
        (truncate(0), POLICY_FILE, "cannot be read"),
        (write_config(b'{"epsilon": '), CONFIG_FILE, "Invalid JSON"),
        (write_config(b""), CONFIG_FILE, "Invalid JSON"),
        (write_config(b"\xff\xfe"), CONFIG_FILE, ""),
        (edit_config(surprise=1), CONFIG_FILE, "surprise"),
        (edit_config(schema_version=3), CONFIG_FILE, "schema_version"),
        (edit_config(epsilon=0), CONFIG_FILE, "epsilon"),
        (edit_config(exit_points=[2, 3, 6]), CONFIG_FILE, "exit_points"),
        (edit_config(exit_points=[-1, 3, 5]), CONFIG_FILE, "exit_points"),
        (edit_config(exit_points=[3, 2, 5]), CONFIG_FILE, "exit_points"),
        (edit_config(output=NOTHING), CONFIG_FILE, "labels"),
        (edit_config(output=ONE_LABEL), CONFIG_FILE, "among fewer than two labels"),
        (edit_config(vocab_size=1), CONFIG_FILE, "vocab_size"),
        (edit_config(labels=[]), CONFIG_FILE, "must be those of output"),
    ],
)
def test_damage_is_an_error_that_names_the_file(tmp_path, config, damage, file, problem):
    directory = save(tmp_path / "policy", config)
    damage(directory)
    with pytest.raises(AdaInferError) as raised:
        load_artifact(str(directory))
    message = str(raised.value)
    assert file in message
    assert str(directory) in message
    assert problem in message
    assert "\n" not in message


@pytest.mark.parametrize("source", ["/no/such/policy", "./no-such-policy", "no-such/policy"])
def test_a_source_that_does_not_exist_is_an_error_that_names_it(source):
    with pytest.raises(AdaInferError, match=source):
        load_artifact(source)


@pytest.mark.parametrize(
    ("epsilon", "level"),
    [(None, 1), (0, -1), (0.02, 0), (0.03, 0), (0.0499, 0), (0.05, 1), (0.9, 1)],
)
def test_the_loosest_level_within_epsilon_is_served(config, epsilon, level):
    assert config.level_of(epsilon) == level


def test_the_order_of_levels_does_not_matter(config):
    backwards = changed(config, levels=tuple(reversed(config.levels)))
    assert [backwards.level_of(epsilon) for epsilon in (0.02, 0.03, 0.05)] == [1, 1, 0]


@pytest.mark.parametrize("epsilon", [0.001, 0.0199, -0.1, float("nan")])
def test_no_level_promises_more_than_was_certified(config, epsilon):
    with pytest.raises(AdaInferError, match=r"strictest certified bound 0\.02"):
        config.level_of(epsilon)


def served(**changes: Any) -> LlamaConfig:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 6,
        "hidden_size": 64,
        "vocab_size": 100,
    }
    return LlamaConfig(**{**values, **changes})


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"architectures": ["OPTForCausalLM"]}, "architecture"),
        ({"architectures": None}, "architecture"),
        ({"num_hidden_layers": 7}, "layers"),
        ({"hidden_size": 128}, "hidden_size"),
        ({"vocab_size": 99}, "vocab_size"),
    ],
)
def test_another_model_is_refused_by_the_field_that_differs(config, change, field):
    labels = tuple(Label(name=label.name, token_id=i) for i, label in enumerate(config.labels))
    config = changed(config, vocab_size=100, output=Labels(labels=labels))
    config.check_served_by(served())
    with pytest.raises(AdaInferError, match=f"the served model has {field} ="):
        config.check_served_by(served(**change))


def test_of_a_multimodal_model_the_language_model_is_compared(config):
    """Its architecture is that of the whole; depth, width and vocabulary are not."""
    multimodal = FAMILIES["gemma4-multimodal"](**SHAPE)
    multimodal.architectures = ["Gemma4ForConditionalGeneration"]
    size = multimodal.get_text_config().vocab_size
    config = changed(config, architecture="Gemma4ForConditionalGeneration", vocab_size=size)
    config.check_served_by(multimodal)
    multimodal.get_text_config().vocab_size = size - 1
    with pytest.raises(AdaInferError, match=f"the served model has vocab_size = {size - 1}"):
        config.check_served_by(multimodal)


def test_other_weights_are_refused_by_their_fingerprints(config):
    config.check_weights(config.weights_fingerprint)
    with pytest.raises(AdaInferError, match=f"{config.weights_fingerprint}.* 0123abcd.* dtype$"):
        config.check_weights("0123abcd")
    config = changed(config, engine_options=EngineOptions(dtype="float32"))
    with pytest.raises(AdaInferError, match=r"dtype, or serve with --dtype float32$"):
        config.check_weights("0123abcd")
