"""The trainer makes certified policies of recorded rows, and loses nothing however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adainfer_kernels import Head, Norm
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tests.byte_model import save_byte_model
from tests.families import SHAPE
from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.tries import State
from vllm_adainfer.cli import app
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.auto import trainer as training
from vllm_adainfer.offline.auto.trainer import Served, Trainer
from vllm_adainfer.offline.calibration.calibrate import fit_and_certify
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.data.split import Split
from vllm_adainfer.offline.calibration.options import CalibrationRequest, PolicyOptions
from vllm_adainfer.offline.calibration.prompts import Prompts
from vllm_adainfer.offline.calibration.record.rows import (
    Rows,
    ServedModel,
    load_shards,
    only_finite,
    read_shards,
)
from vllm_adainfer.policy.probe import Probe

HIDDEN, DEPTH, LAYERS, SHARD = SHAPE["hidden_size"], 6, (2, 3, 5), 60
TRIES = (600, 1200)
EPSILON, DELTA = 0.05, 0.1
NORM = Norm("rms", torch.ones(HIDDEN), eps=1e-5)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the trainer's process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model") / "bytes")


class Place:
    """What a server leaves for the trainer: easy rows that early layers answer, and hard ones."""

    def __init__(self, root: Path, model: Path) -> None:
        self.directory = AutoDirectory(root)
        self.directory.create()
        self.generator = torch.Generator().manual_seed(0)
        self.files: dict[str, int] = {}
        facts = {
            "model": str(model),
            "hf_overrides": None,
            "fingerprint": "f" * 16,
            "engine_options": {"kv_cache_dtype": "fp8"},
            "depth": DEPTH,
            "own_kv_layers": DEPTH,
            "threads": 2,
            "soft_cap": 30.0,
            "scale": 2.0,
            "layer_seconds": 1e-3,  # so slow that every probe is worth its time
            "cut_seconds": 1e-6,
            "epsilon": EPSILON,
            "delta": DELTA,
        }
        write_json(self.directory.model, facts)
        self.vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
        self.head = self.normal(self.vocabulary, HIDDEN)
        save_file({"head_weight": self.head}, self.directory.head)
        self.served = Served.read(self.directory)
        self.kinds: dict[str, Kind] = {}

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def kind(self, **fields: Any) -> str:
        kind = Kind(**fields)
        name = kind.name(self.directory.salt)
        self.kinds[name] = kind
        described = {name: {"kind": kind.as_dict()} for name, kind in self.kinds.items()}
        write_json(self.directory.kinds, {"kinds": described})
        return name

    def label_kind(self) -> str:
        tokens = [self.served.tokenizer.encode(text)[0] for text in ("x", "z")]
        return self.kind(reads="label", labels=tuple(sorted(tokens)))

    def states(self, rows: int, hard: float) -> dict[str, torch.Tensor]:
        """Residuals: of hard rows, layers say nothing of the last one."""
        final = self.normal(rows, HIDDEN)
        is_hard = torch.rand(rows, 1, generator=self.generator) < hard
        others = {
            f"layer.{layer}": torch.where(is_hard, 0.2, 3.0) * final
            + (DEPTH - layer) / DEPTH * self.normal(rows, HIDDEN)
            for layer in LAYERS
        }
        return {"residual": final, **others}

    def record(self, name: str, rows: int, hard: float = 0.3, noise: bool = False) -> None:
        for _ in range(rows // SHARD):
            states = self.states(SHARD, hard)
            final = states.pop("residual")
            if noise:
                final = self.normal(SHARD, HIDDEN)
            self.write(name, {**states, "final": final, "computed": torch.full((SHARD,), 20.0)})

    def write(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        number = self.files[name] = self.files.get(name, 0) + 1
        folder = self.directory.rows(name)
        folder.parent.mkdir(mode=0o700, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        save_file(tensors, folder / f"{number:06d}.safetensors")

    def state(self, name: str) -> Any:
        return read_json(self.directory.trainer(name))

    def certified(self, name: str) -> int | None:
        return State.of(self.state(name)).certified

    def events(self) -> list[tuple[str, str]]:
        lines = self.directory.events.read_text().splitlines()
        return [(one["kind"], one["event"]) for one in map(json.loads, lines)]

    def trainer(self) -> Trainer:
        return Trainer(self.directory, TRIES)


@pytest.fixture
def place(tmp_path: Path, model: Path) -> Place:
    return Place(tmp_path / "auto", model)


@pytest.mark.parametrize("reads", ["label", "choice"])
def test_rows_become_a_certified_policy_and_are_deleted(place, reads):
    texts = ("negative", "positive")
    name = place.label_kind() if reads == "label" else place.kind(reads="choice", choices=texts)
    trainer = place.trainer()
    place.record(name, TRIES[0] - SHARD)
    trainer.look()
    assert place.state(name) is None
    place.record(name, SHARD)
    trainer.look()
    artifact = load_artifact(str(place.directory.policy(name, 1)))
    assert artifact.config.layers == DEPTH
    assert artifact.config.weights_fingerprint == "f" * 16
    assert artifact.config.epsilon == EPSILON
    assert [choice.text for choice in artifact.config.choices] == [
        *(texts if reads == "choice" else ())
    ]
    [level] = [one for one in artifact.config.levels if one.epsilon == EPSILON]
    assert level.layers_saved > 0.1
    assert place.certified(name) == 1
    assert place.events() == [(name, "certified")]
    place.record(name, TRIES[1] - TRIES[0])
    trainer.look()
    assert place.state(name)["status"] == "certified"
    assert not place.directory.rows(name).exists()
    place.record(name, SHARD)  # what a writer had at hand
    trainer.look()
    assert not place.directory.rows(name).exists()


@pytest.mark.parametrize(("saved", "serves"), [(0.305, 1), (0.32, 2)])
def test_a_later_policy_takes_the_place_of_the_first_if_it_saves_more(
    place, monkeypatch, saved, serves
):
    name, savings = place.label_kind(), iter([0.3, saved])
    fit = training.policy_of

    def fitted(*arguments: Any) -> Any:
        policy = fit(*arguments)
        points = {
            epsilon: replace(point, layers_saved=next(savings) if epsilon == EPSILON else 0.0)
            for epsilon, point in policy.points.items()
        }
        return replace(policy, points=points)

    monkeypatch.setattr(training, "policy_of", fitted)
    trainer = place.trainer()
    for rows in (TRIES[0], TRIES[1] - TRIES[0]):
        place.record(name, rows)
        trainer.look()
    assert place.certified(name) == serves
    assert place.state(name)["status"] == "certified"
    if serves == 1:
        [_, second] = place.state(name)["tries"]
        assert "not 1% more than policy 1, which serves on" in second["outcome"]


def test_a_course_begins_with_its_own_rows_and_its_policy_needs_not_save_more(place):
    name = place.label_kind()
    trainer = place.trainer()
    for rows in (TRIES[0], TRIES[1] - TRIES[0]):
        place.record(name, rows, hard=0.05)
        trainer.look()
    before = State.of(place.state(name)).best()
    write_json(place.directory.ledger(name), {"course": 1})
    place.record(name, TRIES[0], hard=0.4)
    trainer.look()
    latest = State.of(place.state(name)).best(course=1)
    assert latest.number == 3
    assert latest.layers_saved < before.layers_saved
    config = load_artifact(str(place.directory.policy(name, 3))).config
    assert config.delta == pytest.approx(DELTA / 12), "the third try of all"
    assert place.directory.rows(name).exists(), "another try may come"


def test_of_a_pool_each_row_is_answered_by_a_label_that_its_request_names(place):
    tokens = sorted({place.served.tokenizer.encode(text)[0] for text in "wxyz"})
    name = place.kind(reads="label", labels=tuple(tokens), is_pool=True)
    for _ in range(TRIES[0] // SHARD):
        states = place.states(SHARD, hard=0.2)
        final, computed = states.pop("residual"), torch.full((SHARD,), 20.0)
        subset = torch.tensor([0b0011, 0b0111, 0b1111, 0b1010])[torch.arange(SHARD) % 4]
        place.write(name, {**states, "final": final, "computed": computed, "subset": subset})
    place.trainer().look()
    config = load_artifact(str(place.directory.policy(name, 1))).config
    assert config.label_pool
    assert list(config.label_ids) == tokens
    assert config.levels[0].layers_saved > 0.1


def test_probabilities_are_certified_within_the_tolerance_of_the_switch(place):
    tokens = [place.served.tokenizer.encode(text)[0] for text in ("x", "z")]
    name = place.kind(reads="probabilities", labels=tuple(sorted(tokens)))
    write_json(place.directory.model, {**read_json(place.directory.model), "tolerance": 0.3})
    place.record(name, TRIES[0], hard=0.1)
    place.trainer().look()
    config = load_artifact(str(place.directory.policy(name, 1))).config
    assert config.promise.kind == "tolerance"
    assert config.promise.tolerance == 0.3


def test_of_a_classifier_the_labels_are_the_columns_of_its_score_head(tmp_path, model):
    classifier = tmp_path / "classifier"
    shutil.copytree(model, classifier)
    config = json.loads((model / "config.json").read_text())
    names = {"0": "bad", "1": "fair", "2": "good"}
    config |= {"architectures": ["LlamaForSequenceClassification"], "id2label": names}
    config |= {"label2id": {name: int(column) for column, name in names.items()}}
    (classifier / "config.json").write_text(json.dumps(config))
    place = Place(tmp_path / "auto", classifier)
    write_json(place.directory.model, {**read_json(place.directory.model), "tolerance": 0.3})
    save_file({"head_weight": 0.2 * place.normal(3, HIDDEN)}, place.directory.head)
    name = place.kind(reads="scores")
    place.record(name, TRIES[0], hard=0.1)
    place.trainer().look()
    found = load_artifact(str(place.directory.policy(name, 1))).config
    assert found.score_head == "softmax"
    assert [(one.name, one.token_id) for one in found.labels] == [
        ("bad", 0),
        ("fair", 1),
        ("good", 2),
    ]
    assert found.promise.kind == "tolerance"


def test_a_policy_for_an_adapter_names_its_weights(place):
    tokens = [place.served.tokenizer.encode(text)[0] for text in ("x", "z")]
    name = place.kind(reads="label", labels=tuple(sorted(tokens)), adapter="mood")
    write_json(place.directory.ledger(name), {"weights": "a" * 16})
    place.record(name, TRIES[0])
    place.trainer().look()
    config = load_artifact(str(place.directory.policy(name, 1))).config
    assert (config.adapter.name, config.adapter.fingerprint) == ("mood", "a" * 16)


@pytest.mark.parametrize(("missing", "whole"), [(0.05, True), (0.15, False)])
def test_whole_prompts_are_read_if_the_means_of_nearly_all_are_known(place, missing, whole):
    """Here means alone tell the answer: the last tokens' states are noise."""
    name = place.label_kind()
    for _ in range(TRIES[0] // SHARD):
        final = place.normal(SHARD, HIDDEN)
        rows = {"final": final, "computed": torch.full((SHARD,), 20.0)}
        lost = torch.rand(SHARD, 1, generator=place.generator) < missing
        for layer in (0, *LAYERS):
            rows[f"layer.{layer}"] = place.normal(SHARD, HIDDEN)
            mean = final + 0.1 * place.normal(SHARD, HIDDEN)
            rows[f"mean.{layer}"] = torch.where(lost, torch.nan, mean).half()
        place.write(name, rows)
    write_json(place.directory.ledger(name), {"pooled_from": 3})
    place.trainer().look()
    if not whole:
        assert place.certified(name) is None
        return
    config = load_artifact(str(place.directory.policy(name, 1))).config
    assert config.pooled_from == 3
    assert config.exit_points[0] == 0
    assert config.levels[0].layers_saved > 0.5


def test_only_the_user_can_read_what_the_trainer_writes(place):
    name = place.label_kind()
    place.record(name, TRIES[0])
    place.trainer().look()
    for path in place.directory.root.rglob("*"):
        if path != place.directory.head:
            assert path.stat().st_mode & 0o777 == (0o700 if path.is_dir() else 0o600), path


def test_the_policy_is_the_one_that_calibrate_makes_of_these_rows(place, tmp_path):
    """Calibrate gets the states before the final norm, as the engine records them."""
    name, rows = place.label_kind(), 900
    states = place.states(rows, hard=0.3)
    residual = states.pop("residual")
    lens = Probe(Head(place.head), norm=NORM)
    recorded = {**states, "final": lens.readout(residual), "computed": torch.full((rows,), 20.0)}
    place.write(name, recorded)
    place.trainer().look()
    ours = load_artifact(str(place.directory.policy(name, 1)))

    output = place.served.output(place.kinds[name])
    labels = output.labels
    tokens = torch.tensor([label.token_id for label in labels])
    logits = 2 * 30 * (lens.readout(residual) @ place.head[tokens].T / 30).tanh()
    recording = Rows(
        ServedModel.of_facts({**place.served.facts, "threads": 1}, lens),
        states={int(layer.removeprefix("layer.")): state for layer, state in states.items()},
        final=residual,
        tokens=tokens[logits.argmax(1)].numpy(),
        prompts=np.arange(rows),
        computed=np.full(rows, 20.0),
    )
    examples = [Example("", "", [], None) for _ in range(rows)]
    request = CalibrationRequest(
        str(place.served.facts["model"]),
        Path(),
        tmp_path / "theirs",
        probe="label-head",
        options=PolicyOptions(epsilon=EPSILON, delta=DELTA / 2),
    )
    split, config = Split.halves(rows), place.served.hf_config
    fit_and_certify(
        request, Prompts(examples, output, split, config, "label-head", None), recording
    )
    theirs = load_artifact(str(tmp_path / "theirs"))
    assert ours.config == theirs.config
    assert ours.tensors.keys() == theirs.tensors.keys()
    for key, tensor in ours.tensors.items():
        assert torch.equal(tensor, theirs.tensors[key]), key


def test_a_kind_that_nothing_can_be_learned_of_is_given_up_after_the_last_try(place):
    name = place.label_kind()
    trainer = place.trainer()
    place.record(name, TRIES[0], noise=True)
    trainer.look()
    trainer.look()
    assert [one["outcome"] is None for one in place.state(name)["tries"]] == [False]
    assert place.state(name)["status"] == "recording"
    assert place.directory.rows(name).exists()
    place.record(name, TRIES[1] - TRIES[0], noise=True)
    trainer.look()
    assert place.state(name)["status"] == "given up"
    assert not place.directory.rows(name).exists()
    assert place.certified(name) is None
    assert [event for _, event in place.events()] == ["tried", "tried", "given up"]
    assert "of the layers, which is less than 5%" in place.state(name)["tries"][1]["outcome"]


def test_a_later_try_certifies_on_newer_rows_with_a_smaller_share_of_delta(place, monkeypatch):
    name, asked = place.label_kind(), []

    def fit(served, kind, rows, held_out, options, pooled_from):
        asked.append((len(rows["final"]), held_out, options.delta))
        raise AdaInferError("not yet")

    monkeypatch.setattr(training, "policy_of", fit)
    trainer = Trainer(place.directory, (300, 600, 1200))
    for rows in (300, 300, 600):
        place.record(name, rows)
        trainer.look()
    assert asked == [(300, 150, DELTA / 2), (600, 150, DELTA / 6), (1200, 300, DELTA / 12)]


def test_new_weights_are_tried_anew_under_another_number(place):
    name = place.label_kind()
    place.record(name, TRIES[0])
    place.trainer().look()
    write_json(place.directory.model, {**read_json(place.directory.model), "fingerprint": "e" * 16})
    place.record(name, TRIES[0])
    place.trainer().look()
    assert place.certified(name) == 2
    config = load_artifact(str(place.directory.policy(name, 2))).config
    assert config.weights_fingerprint == "e" * 16
    assert config.delta == DELTA / 2


@pytest.mark.parametrize("damage", [b"", b"nothing", None])
def test_a_damaged_file_is_left_out(place, damage, capsys):
    name = place.label_kind()
    place.record(name, TRIES[0] + SHARD)
    file = place.directory.rows(name) / "000003.safetensors"
    file.write_bytes(file.read_bytes()[:-8] if damage is None else damage)
    trainer = place.trainer()
    trainer.look()
    trainer.look()
    assert place.certified(name) == 1
    assert place.state(name)["tries"][0]["rows"] == TRIES[0]
    assert capsys.readouterr().err.count("000003.safetensors is damaged") == 1


def test_rows_that_are_not_finite_are_left_out(place):
    name = place.label_kind()
    place.record(name, 2 * SHARD)
    file = place.directory.rows(name) / "000002.safetensors"
    tensors = {key: one.clone() for key, one in load_file(file).items()}
    tensors["layer.3"][7, 3] = torch.nan
    save_file(tensors, file)
    rows = only_finite(load_shards(read_shards(place.directory.rows(name))))
    assert len(rows["final"]) == 2 * SHARD - 1
    assert all(column.isfinite().all() for column in rows.values())


def test_a_full_disk_keeps_the_old_state_and_is_tried_later(place, monkeypatch, capsys):
    name = place.label_kind()
    place.record(name, TRIES[0])
    trainer, full = place.trainer(), True
    write = training.write_artifact

    def fails(*arguments: Any) -> Any:
        if full:
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(training, "write_artifact", fails)
    now = time.monotonic()
    monkeypatch.setattr(training.time, "monotonic", lambda: now)
    for _ in range(8):
        trainer.look()
        now += 3
    assert capsys.readouterr().err.count("No space left") == 3  # each time twice as late
    assert place.certified(name) is None
    assert place.directory.rows(name).exists()
    full, now = False, now + 600
    trainer.look()
    assert place.certified(name) == 1


def test_a_second_trainer_is_refused_in_one_sentence(place):
    with place.directory.held("trainer"):
        result = CliRunner().invoke(app, ["autopilot", str(place.directory.root)])
    assert result.exit_code == 1
    assert "another trainer works on" in result.output
    with place.directory.held("trainer") as is_free:
        assert is_free


def test_a_try_that_ends_trainer_after_trainer_has_failed(place):
    name = place.label_kind()
    place.record(name, TRIES[0])
    for _ in range(training.MOST_BEGINNINGS):
        trainer = place.trainer()
        trainer._try = lambda *_: None  # type: ignore[method-assign]  # it is killed here
        trainer.look()
    place.trainer().look()
    assert "3 trainers have ended" in place.state(name)["tries"][0]["outcome"]


def test_a_try_whose_rows_were_deleted_has_failed_and_the_next_one_is_made(place):
    name = place.label_kind()
    place.record(name, TRIES[0])
    trainer = place.trainer()
    trainer._try = lambda *_: None  # type: ignore[method-assign]  # it is killed here
    trainer.look()
    for file in place.directory.rows(name).iterdir():
        file.unlink()
    place.record(name, TRIES[1])
    place.trainer().look()
    assert place.state(name)["tries"][0]["outcome"] == "its rows were deleted before it ended"
    place.trainer().look()
    assert place.certified(name) == 2


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        '{"status": "certified", "tries": []}',
        '{"status": "certified", "tries": {}}',
        '{"status": "given up"}',
        '{"status": "?", "tries": [{"number": 1}]}',
    ],
)
def test_a_damaged_state_ends_no_trainer_and_is_as_none(place, content):
    name = place.label_kind()
    place.record(name, TRIES[0])
    place.directory.trainer(name).write_text(content)
    place.trainer().look()
    assert place.certified(name) == 1


@pytest.mark.parametrize("error", [IndexError("list index out of range"), KeyError("x")])
def test_one_kind_that_fails_holds_up_no_other(place, monkeypatch, error, capsys):
    broken, sound = place.label_kind(), place.kind(reads="choice", choices=("a", "bcd"))
    place.record(sound, TRIES[0])
    look_at = Trainer._look_at

    def fails(self: Trainer, name: str, *rest: Any) -> None:
        if name == broken:
            raise error
        look_at(self, name, *rest)

    monkeypatch.setattr(Trainer, "_look_at", fails)
    place.trainer().look()
    assert place.certified(sound) == 1
    assert f"{broken}: {type(error).__name__}" in capsys.readouterr().err


FORKS = """
import os, sys
from pathlib import Path
from vllm_adainfer.auto.directory import AutoDirectory
from vllm_adainfer.offline.auto import trainer as training
training.MOST_BEGINNINGS = 1000
directory = AutoDirectory(Path(sys.argv[1]))
training.Served.read(directory)  # imports transformers, which takes longest
for line in sys.stdin:
    trainer = os.fork()
    if trainer == 0:
        training.Trainer(directory, (600, 1200)).look()
        os._exit(0)
    print(trainer, flush=True)
    print(os.waitpid(trainer, 0)[1], flush=True)
"""


def test_a_killed_trainer_leaves_files_from_which_the_next_goes_on(place):
    """Each trainer is given a little more time than the one before, until one ends by itself."""
    name = place.label_kind()
    place.record(name, TRIES[0])
    command = [sys.executable, "-c", FORKS, str(place.directory.root)]
    forks = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert forks.stdout is not None
    assert forks.stdin is not None
    killed, seconds = 0, 0.0
    while True:
        print("another", file=forks.stdin, flush=True)
        trainer = int(forks.stdout.readline())
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(trainer, signal.SIGKILL)
        if int(forks.stdout.readline()) == 0:
            break
        killed, seconds = killed + 1, seconds + 0.08
        number = place.certified(name)
        if number is None:
            assert len(read_shards(place.directory.rows(name))) == TRIES[0] // SHARD
        else:
            load_artifact(str(place.directory.policy(name, number)))
    forks.stdin.close()
    assert forks.wait() == 0
    assert killed
    assert place.certified(name) == 1
    load_artifact(str(place.directory.policy(name, 1)))
    assert [path.name for path in place.directory.root.rglob(".*")] == []
