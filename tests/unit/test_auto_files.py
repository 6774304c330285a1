"""What lies in the directory of a server that calibrates itself: limits, damage, full disks."""

from __future__ import annotations

import shutil
from collections import namedtuple
from itertools import pairwise
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.auto import directory as directories
from vllm_adainfer.auto.admitted_kind import AdmittedKind
from vllm_adainfer.auto.directory import FREE_BYTES, AutoDirectory, read_json
from vllm_adainfer.auto.tries import MOST_ROWS
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.runner.admitted_kinds import MOST_RECORDED
from vllm_adainfer.engine.worker import kind_policies, row_files, served_policies
from vllm_adainfer.engine.worker.kind_policies import KindPolicies
from vllm_adainfer.engine.worker.model_facts import forget_others
from vllm_adainfer.engine.worker.row_files import MOST_KEPT_ROWS, RowFiles
from vllm_adainfer.engine.worker.served_policies import ServedPolicies
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Auto
from vllm_adainfer.watch.ledger import Ledger

Usage = namedtuple("Usage", "total used free")


def put(rows: RowFiles, *kinds: str) -> None:
    state = torch.zeros(len(kinds), 4)
    columns = {"layer.1": state, "final": state, "computed": torch.zeros(len(kinds))}
    rows.put(kinds, columns, set(kinds))


def test_no_kind_has_more_rows_than_the_trainer_wants(directory):
    rows = RowFiles(directory)
    rows.counts["kind-1"] = MOST_ROWS - 3
    put(rows, *["kind-1"] * 8)
    assert rows.counts["kind-1"] == MOST_ROWS
    assert RowFiles(directory).counts == {"kind-1": 3}


def test_all_kinds_together_have_no_more_rows_than_those_with_a_place(directory):
    rows = RowFiles(directory)
    rows.counts |= {f"kind-{number}": MOST_ROWS for number in range(MOST_RECORDED)}
    assert sum(rows.counts.values()) == MOST_KEPT_ROWS
    with pytest.raises(OSError, match="keeps at most 32,000 of them"):
        put(rows, "kind-9")
    assert directory.known() == []


def test_rows_count_until_the_trainer_has_deleted_them(directory):
    rows = RowFiles(directory)
    put(rows, "kind-1", "kind-2", "kind-1")
    shutil.rmtree(directory.rows("kind-1"))
    rows.note_deleted()
    assert rows.counts == {"kind-2": 1}
    put(rows, "kind-1")
    assert [path.stem for path in directory.rows("kind-1").iterdir()] == ["000002"]


@pytest.mark.parametrize("free", [FREE_BYTES - 1, FREE_BYTES])
def test_rows_leave_room_on_the_disk_for_others(directory, monkeypatch, free):
    rows = RowFiles(directory)
    monkeypatch.setattr(row_files.shutil, "disk_usage", lambda _: Usage(0, 0, free))
    if free < FREE_BYTES:
        with pytest.raises(OSError, match=f"less than 1 GiB is free for {directory.root}"):
            put(rows, "kind-1")
    else:
        put(rows, "kind-1")
    assert len(list(directory.root.rglob("*.safetensors"))) == (free >= FREE_BYTES)


def test_a_salt_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    """A process that is killed while it makes one leaves none behind."""
    directory = AutoDirectory(tmp_path / "auto")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(directories.os, "link", killed)
        with pytest.raises(KeyboardInterrupt):
            directory.create()
    assert not (directory.root / "salt").exists()
    directory.create()
    salt = directory.salt
    assert len(salt) == directories.SALT_BYTES
    directory.create()
    assert directory.salt == salt
    assert (directory.root / "salt").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in directory.root.iterdir()] == ["salt"]


def test_of_several_processes_that_make_the_salt_at_once_all_have_the_same(tmp_path):
    directory = AutoDirectory(tmp_path / "auto")
    salts: list[bytes] = []

    def make() -> None:
        directory.create()
        salts.append(directory.salt)

    threads = [Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(salts) == 8
    assert len(set(salts)) == 1


@pytest.mark.parametrize("damage", [b"", b"abc", b"\xff" * 64])
def test_a_damaged_salt_is_refused_because_names_depend_on_it(directory, damage):
    (directory.root / "salt").write_bytes(damage)
    with pytest.raises(AdaInferError, match=r"salt is damaged.*delete the directory"):
        directory.create()


def test_an_event_that_finds_no_room_is_lost_and_nothing_else(directory, monkeypatch):
    with monkeypatch.context() as full:
        full.setattr(directory, "events", Path("/dev/full"))
        directory.tell("kind-1", "recording")
    directory.tell("kind-1", "served")
    [line] = directory.events.read_text().splitlines()
    assert '"event": "served"' in line


def model(**facts: Any) -> Any:
    loop = SimpleNamespace(policies=SimpleNamespace(exit_points=(2, 4)))
    options = EngineOptions()
    return SimpleNamespace(fingerprint="f" * 16, engine_options=options, loop=loop, **facts)


@pytest.mark.parametrize(
    ("identity", "is_kept"),
    [
        pytest.param("same", True, id="the same"),
        pytest.param('{"fingerprint": "another"}', False, id="another"),
        pytest.param("not JSON", False, id="damaged"),
        pytest.param(None, False, id="missing"),
    ],
)
def test_rows_and_policies_stay_only_if_they_are_surely_for_what_is_served(
    directory, identity, is_kept, caplog_vllm
):
    auto = Auto(directory=str(directory.root))
    forget_others(directory, auto, model())
    assert not caplog_vllm.text, "there was nothing to forget"
    directory.policy("kind-1", 1).mkdir(parents=True)
    if identity is None:
        directory.identity.unlink()
    elif identity != "same":
        directory.identity.write_text(identity)
    forget_others(directory, auto, model())
    assert (directory.known() == ["kind-1"]) == is_kept
    assert ("all kinds start anew" in caplog_vllm.text) != is_kept
    assert read_json(directory.identity)["fingerprint"] == "f" * 16


class Builder:
    """Builds policies, except those of the kinds that `failures` names."""

    def __init__(self) -> None:
        self.failures: dict[str, Exception] = {}

    def build(self, artifacts: dict[str, str]) -> dict[str, str]:
        for kind in artifacts:
            if kind in self.failures:
                raise self.failures[kind]
        return artifacts


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(kind_policies.time, "monotonic", lambda: clock.now)
    return clock


def certified(directory: AutoDirectory, **numbers: int) -> tuple[KindPolicies, Builder, Any]:
    """Policies of kinds that have places, what builds them, and these kinds."""
    kinds = {}
    for name, number in numbers.items():
        kinds[name] = AdmittedKind(name, Ledger(0.02, 0.1, 0.25), certified=number)
        directory.policy(name, number).mkdir(parents=True)
    builder: Any = Builder()
    return KindPolicies(directory, builder, kinds), builder, kinds


@pytest.fixture(autouse=True)
def names_for_artifacts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kind_policies, "load_artifact", lambda path: Path(path).name)


def test_a_policy_that_failed_to_load_is_tried_again_ever_later(directory, clock, caplog_vllm):
    policies, builder, kinds = certified(directory, a=1)
    builder.failures["a"] = OSError(24, "Too many open files")
    tried = []
    for _ in range(1000):
        policies.read()
        clock.now += 30
        if policies._waits["a", 1][0] not in tried:
            tried.append(policies._waits["a", 1][0])
    waits = [later - sooner for sooner, later in pairwise(tried)]
    assert waits[:3] == [120, 240, 480]
    assert set(waits[6:]) == {kind_policies.MOST_SECONDS}
    assert caplog_vllm.text.count("is quarantined") == 1
    ledger = directory.ledger("a")
    kinds["a"].save(ledger)
    assert read_json(ledger)["quarantined"]["policy"] == 1
    builder.failures.clear()
    clock.now += kind_policies.MOST_SECONDS
    assert policies.read().keys() == {"a"}
    assert policies.read() == {}
    kinds["a"].save(ledger)
    assert not read_json(ledger)["quarantined"]


def test_a_full_disk_delays_no_policy_that_is_ready(directory, clock, monkeypatch):
    policies, builder, _ = certified(directory, a=1, b=3)
    monkeypatch.setattr(directory, "events", Path("/dev/full"))
    builder.failures["b"] = OSError(28, "No space left on device")
    assert policies.read().keys() == {"a"}
    policies.quarantine("a", ValueError("they do not go together"))  # as a step does


def test_the_policy_of_a_kind_that_begins_anew_is_read_anew(directory, clock):
    policies, _, kinds = certified(directory, a=1)
    assert policies.read().keys() == {"a"}
    kinds["a"].certified = None
    policies.forget("a")
    assert policies.read() == {}
    kinds["a"].certified = 1
    assert policies.read().keys() == {"a"}


def test_a_policy_is_checked_beside_those_of_before_or_after_a_step_that_replaces_them(monkeypatch):
    """The thread that builds policies must not see half of what a step puts into service."""

    def policies_of(policies: dict[str, str], cuts: Any) -> SimpleNamespace:
        return SimpleNamespace(names=[*policies], policies=[*policies.values()], exit_points=cuts)

    def built(name: str) -> Any:
        config = SimpleNamespace(parts=lambda name: {name: None})
        return {name: (SimpleNamespace(config=config, digest=""), {name: f"policy {name}"})}

    monkeypatch.setattr(Admission, "from_config", lambda *_: None)
    monkeypatch.setattr(served_policies, "PolicySet", policies_of)
    found: list[Any] = []
    loop = SimpleNamespace(policies=policies_of({}, (1, 2)), monitors={})
    model = SimpleNamespace(artifacts={}, loop=loop, settings=SimpleNamespace(compares=False))
    running: Any = SimpleNamespace(use_admission=lambda _: None)
    served = ServedPolicies(model, None, running)  # type: ignore[arg-type]

    def use_policies(policies: Any, monitors: Any) -> None:
        builds.start()
        builds.join(0.1)
        loop.policies, loop.monitors = policies, monitors

    builds = Thread(target=lambda: found.append(served._composed(built("b"))))
    loop.use_policies = use_policies
    served.replace(built("a"))
    builds.join()
    assert [list(artifacts) for artifacts, *_ in found] == [["a", "b"]]
