"""Artifacts from elsewhere: nothing is run, read or allocated for what does not belong there."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModel

from tests import student
from tests.tiny import tiny_artifact, tiny_config, tiny_tensors
from vllm_adainfer.artifact.files import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    MAX_JSON,
    POLICY_FILE,
    load_artifact,
    load_artifact_config,
    load_details,
    save_artifact,
)
from vllm_adainfer.artifact.source import (
    FILES,
    STUDENT_CONFIG,
    STUDENT_FILES,
    STUDENT_TOKENIZER,
)
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.policy import Policy


@pytest.fixture
def artifact(tiny_policy, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_policy, tmp_path / "policy"))


def header(entries: dict[str, Any]) -> bytes:
    """A safetensors file without its tensors."""
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


def huge_tensor(directory: Path) -> None:
    """Claims a terabyte, in a file that has it only by name."""
    path, size = directory / POLICY_FILE, 1 << 40
    entry = {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [0, size]}
    content = header({"exit.2.head_weight": entry})
    with path.open("wb") as file:
        file.write(content)
        file.truncate(len(content) + size)


def with_config(**changes: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / CONFIG_FILE
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def large_config(directory: Path) -> None:
    with (directory / CONFIG_FILE).open("wb") as file:
        file.truncate(MAX_JSON + 1)


def pickled(directory: Path) -> None:
    (directory / POLICY_FILE).write_bytes(pickle.dumps({"thresholds": [0.0]}))


def labels_of(token: int) -> dict[str, Any]:
    return {"kind": "labels", "labels": [{"name": "a", "token_id": token}] * 2}


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (huge_tensor, "cannot be read|must have shape"),
        (pickled, "cannot be read"),
        (large_config, "is larger than 64 MiB"),
        (with_config(hidden_size=1 << 40), "must have shape"),
        (with_config(hidden_size=10**400), "must have shape"),
        (with_config(output=labels_of(1 << 40)), "below vocab_size"),
        (with_config(output=labels_of(5)), "token id of its own"),
        (with_config(code="print()"), "not a valid artifact config"),
    ],
)
def test_what_does_not_belong_there_is_refused_before_a_tensor_is_read(
    artifact, damage, sentence, monkeypatch
):
    damage(artifact)
    monkeypatch.setattr("vllm_adainfer.artifact.files.load_file", None)
    with pytest.raises(AdaInferError, match=sentence):
        load_artifact(str(artifact))


def test_a_shortlist_names_tokens_that_there_are(tiny_model, tmp_path):
    config = tiny_config(tiny_model, probe="lens", candidates="shortlist", labels=())
    tensors = {name: t for name, t in tiny_tensors(config).items() if ".head_" not in name}
    tensors |= {"shortlist": torch.tensor([1, 1 << 40]), "head_rows": torch.zeros(2, 64)}
    for layer in config.exit_points:
        tensors[f"exit.{layer}.lens_weight"] = torch.zeros(64, 64)
        tensors[f"exit.{layer}.lens_bias"] = torch.zeros(64)
    save_artifact(tmp_path / "policy", config, tensors, {}, "card\n")
    with pytest.raises(AdaInferError, match="token ids outside the vocabulary"):
        load_artifact(str(tmp_path / "policy"))


@pytest.mark.parametrize("name", [CONFIG_FILE, POLICY_FILE])
@pytest.mark.parametrize("where", ["outside", "/dev/zero", "a pipe"])
def test_links_that_lead_out_of_an_artifact_are_not_followed(artifact, tmp_path, name, where):
    path = artifact / name
    target = tmp_path / "elsewhere"
    if where == "outside":
        path.rename(target)
    elif where == "a pipe":
        os.mkfifo(target)
    else:
        target = Path(where)
    path.unlink(missing_ok=True)
    path.symlink_to(target)
    with pytest.raises(AdaInferError, match=r"leads out of the artifact|has no "):
        load_artifact_config(str(artifact))


def test_details_are_not_read_through_such_links_either(artifact, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text('{"password": "x"}')
    (artifact / CALIBRATION_FILE).unlink()
    (artifact / CALIBRATION_FILE).symlink_to(secret)
    with pytest.raises(AdaInferError, match="leads out of the artifact"):
        load_details(str(artifact))


def test_details_nested_beyond_reason_are_an_error(artifact):
    (artifact / CALIBRATION_FILE).write_text("[" * 100_000)
    with pytest.raises(AdaInferError, match="cannot be read"):
        load_details(str(artifact))


@pytest.mark.parametrize("layout", ["the hub's cache", "a mounted volume", "a link to it"])
def test_links_of_the_hub_and_of_mounted_volumes_are_followed(artifact, tmp_path, layout):
    served = tmp_path / "models--a--b" / "snapshots" / "0123"
    files = [path for path in artifact.iterdir() if path.is_file()]
    if layout == "the hub's cache":
        blobs = tmp_path / "models--a--b" / "blobs"
        blobs.mkdir(parents=True)
        served.mkdir(parents=True)
        for number, path in enumerate(files):
            path.rename(blobs / str(number))
            (served / path.name).symlink_to(Path("..", "..", "blobs", str(number)))
    elif layout == "a mounted volume":
        served.parent.mkdir(parents=True)
        served.mkdir()
        artifact.rename(served / "..data")
        for path in files:
            (served / path.name).symlink_to(Path("..data", path.name))
    else:
        served.parent.mkdir(parents=True)
        served.symlink_to(artifact)
    assert load_artifact(str(served)).config.layers == 6


def test_from_the_hub_only_our_files_are_fetched(artifact, monkeypatch):
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(artifact)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    patterns = [*FILES, *STUDENT_FILES]
    for source, revision in (("someone/policy", None), ("someone/policy@v2", "v2")):
        load_artifact_config(source)
        assert asked == {"repo": "someone/policy", "revision": revision, "allow_patterns": patterns}


@pytest.mark.parametrize("source", ["../policy", "./policy", "/policy", "/etc", "no/such/policy"])
def test_no_path_is_taken_for_a_hub_id(source, monkeypatch):
    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo, **_: asked.append(repo))
    with pytest.raises(AdaInferError, match=f"artifact '{source}' has no config.json"):
        load_artifact_config(source)
    assert asked == []


@pytest.mark.parametrize("source", ["a/..", "~root/x", "a\0b/c"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(source):
    with pytest.raises(AdaInferError, match=r"nor a hub id .* \(HFValidationError\)"):
        load_artifact_config(source)


def test_overwriting_the_file_of_a_served_artifact_changes_nothing_that_is_loaded(artifact):
    loaded = load_artifact(str(artifact)).tensors
    before = {name: tensor.clone() for name, tensor in loaded.items()}
    content = (artifact / POLICY_FILE).read_bytes()
    with (artifact / POLICY_FILE).open("r+b") as file:
        file.write(b"\xff" * len(content))
    assert all(torch.equal(loaded[name], before[name]) for name in before)


def test_a_shortlist_of_one_token_leaves_nothing_to_decide(tiny_model, tmp_path):
    config = tiny_config(tiny_model, probe="logit-lens", candidates="shortlist", labels=())
    tensors = {name: t for name, t in tiny_tensors(config).items() if ".head_" not in name}
    tensors |= {"shortlist": torch.tensor([1]), "head_rows": torch.zeros(1, 64)}
    save_artifact(tmp_path / "policy", config, tensors, {}, "card\n")
    with pytest.raises(AdaInferError, match="shortlist of fewer than two tokens: calibrate again"):
        load_artifact_config(str(tmp_path / "policy"))


@pytest.mark.parametrize("read", [load_artifact, load_artifact_config])
@pytest.mark.parametrize("how", ["renamed", "in place", "damaged"])
def test_an_artifact_that_is_overwritten_while_it_is_read_is_not_served(
    tiny_model, artifact, monkeypatch, how, read
):
    """Its config and its tensors would be of two writes."""

    def overwrite(*_: Any) -> None:
        config = tiny_config(tiny_model, epsilon=0.02)
        if how == "renamed":
            save_artifact(artifact, config, tiny_tensors(config), {}, "card\n")
            return
        (artifact / CONFIG_FILE).write_text(config.model_dump_json())
        if how == "damaged":
            raise AdaInferError("thresholds must have another shape")

    monkeypatch.setattr("vllm_adainfer.artifact.files.check_tensors", overwrite)
    with pytest.raises(AdaInferError, match=r"' was overwritten while it was read: try again"):
        read(str(artifact))


# Students: an encoder and a tokenizer in the files of transformers


@pytest.fixture
def with_student(tiny_model, tmp_path) -> Path:
    return tiny_artifact(
        tiny_model, tmp_path / "policy", exit_points=(0, 3), **student.asked_with()
    )


def changed_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def built(directory: Path) -> Any:
    """What a worker does at start."""
    return Policy(load_artifact(str(directory)), torch.device("cpu"))


@pytest.mark.parametrize(
    "named",
    [
        {"attn_implementation": "kernels-community/flash-attn"},
        {"_attn_implementation": "flash_attention_2"},
        {"_attn_implementation_internal": "flash_attention_2"},
        {"experts_implementation": "someone/experts"},
        {"quantization_config": {"quant_method": "someone's"}},
        {"auto_map": {"AutoModel": "modeling.Code"}},
        {"per_layer_config": {"0": {"attn_implementation": "kernels-community/flash-attn"}}},
    ],
    ids=lambda named: next(iter(named)),
)
def test_no_setting_of_a_student_that_names_code_or_a_kernel_reaches_transformers(
    with_student, monkeypatch, named
):
    asked: list[str] = []
    for_model = AutoConfig.for_model

    def noting(**settings: Any) -> Any:
        asked.append(json.dumps(settings))
        return for_model(**settings)

    monkeypatch.setattr(AutoConfig, "for_model", noting)
    changed_json(with_student / STUDENT_CONFIG, **named)
    built(with_student)
    assert asked
    assert not re.search("_implementation|flash|kernels|someone|quantization|auto_map", asked[0])


def test_whatever_transformers_raises_about_a_student_is_damage(with_student, monkeypatch):
    def from_config(*_: Any, **__: Any) -> None:
        raise ImportError("a package that is not installed")

    monkeypatch.setattr(AutoModel, "from_config", from_config)
    with pytest.raises(AdaInferError, match=r"student cannot be built \(a package .* calibrate"):
        built(with_student)


def with_tokenizer(directory: Path, **changes: Any) -> None:
    """Change a student's tokenizer, and the digest that the config has of it."""
    path = directory / STUDENT_TOKENIZER
    changed_json(path, **changes)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config = json.loads((directory / CONFIG_FILE).read_text())
    changed_json(directory / CONFIG_FILE, student={**config["student"], "tokenizer": digest})


ROWS = student.bert().config.vocab_size


def larger_vocabulary(directory: Path) -> None:
    model = json.loads((directory / STUDENT_TOKENIZER).read_text())["model"]
    with_tokenizer(directory, model={**model, "vocab": {**model["vocab"], "more": ROWS}})


def framed(*tokens: int) -> Callable[[Path], None]:
    """These tokens, of no vocabulary, come before every text."""

    def change(directory: Path) -> None:
        special = {str(one): {"id": str(one), "ids": [one], "tokens": ["?"]} for one in tokens}
        pieces = [{"SpecialToken": {"id": str(one), "type_id": 0}} for one in tokens]
        own = {"Sequence": {"id": "A", "type_id": 0}}
        template = {"single": [*pieces, own], "pair": [*pieces, own], "special_tokens": special}
        with_tokenizer(directory, post_processor={"type": "TemplateProcessing", **template})

    return change


def longer_texts(directory: Path) -> None:
    config = json.loads((directory / CONFIG_FILE).read_text())
    changed_json(directory / CONFIG_FILE, student={**config["student"], "most_tokens": 65})


def another_padding(directory: Path) -> None:
    changed_json(directory / STUDENT_CONFIG, pad_token_id=ROWS)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (larger_vocabulary, f"its tokenizer has tokens up to {ROWS}, and its embedding {ROWS} ro"),
        (framed(ROWS + 7), f"its tokenizer has tokens up to {ROWS + 7}, and its embedding {ROWS}"),
        (another_padding, "the student cannot .* calibrate again"),
        (
            longer_texts,
            "cannot read the longest text of its artifact, 65 tokens .* calibrate",
        ),
        (framed(*[1] * student.LONGEST), f"puts {student.LONGEST} tokens around every text, and"),
        (lambda path: with_tokenizer(path, model={}), "tokenizer.json cannot be read .* calibrate"),
    ],
    ids=["vocabulary", "frame", "padding", "positions", "no room", "no tokenizer"],
)
def test_a_student_whose_parts_do_not_fit_is_refused_before_a_text_comes(
    with_student, damage, sentence
):
    """In a step, an id or a position without a row would end the engine."""
    built(with_student)
    damage(with_student)
    with pytest.raises(AdaInferError, match=sentence):
        built(with_student)
