"""The trainer: looks for rows, tries to certify policies from them, and hands these over.

A try is written down before it begins. A trainer that is killed at any moment leaves files from
which the next one goes on: it makes the same try again, from the same rows.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.tensors import UNREADABLE
from vllm_adainfer.auto.directory import AutoDirectory, read_json, write_json
from vllm_adainfer.auto.kinds import Kind
from vllm_adainfer.auto.tries import CERTIFIED, GIVEN_UP, RECORDING, TRIES, State, Try
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.files import PRIVATE, whole_directory
from vllm_adainfer.offline.auto.fit import Served, policy_of
from vllm_adainfer.offline.calibration.fit_policy import FittedPolicy
from vllm_adainfer.offline.calibration.record.rows import (
    Shard,
    load_shards,
    only_finite,
    read_shards,
)
from vllm_adainfer.offline.calibration.write.policy_artifact import write_artifact
from vllm_adainfer.offline.progress import say

MOST_BEGINNINGS = 3  # a try that ends so many trainers, perhaps for want of memory, has failed
WORTH = 0.05  # a policy that saves a smaller share of the layers changes answers for nothing
SECONDS, MOST_SECONDS = 2.0, 600.0  # between two looks, and after several that failed


@dataclass(frozen=True)
class Due:
    """A try to make now.

    Attributes:
        state: the state; its latest try is the one to make.
        number: how many tries there are for these weights, this one included.
        since: rows of files up to this number were there at the try before; -1 for the first.
        last: whether there will be no other try.

    """

    state: State
    number: int
    since: int
    last: bool

    @property
    def latest(self) -> Try:
        """The try to make."""
        return self.state.tries[-1]

    @property
    def share_of_delta(self) -> float:
        """Its share; those of all tries add up to less than 1."""
        return 1 / (self.number * (self.number + 1))


class Trainer:
    """Looks after the kinds in a directory."""

    def __init__(self, directory: AutoDirectory, tries: Sequence[int] = TRIES) -> None:
        """Begin at `tries` rows; what a killed trainer left half-written is deleted."""
        self.directory, self.tries = directory, tries
        self._begun: set[tuple[str, int]] = set()  # by this trainer
        self._waits: dict[str, tuple[float, float]] = {}  # until when, after how many seconds
        self._model: tuple[Mapping[str, Any], Served] | None = None
        root = directory.root
        for folder in root.glob("*/.policy-*"):
            shutil.rmtree(folder, ignore_errors=True)
        for file in root.glob("*/.trainer.json.*"):
            file.unlink(missing_ok=True)

    def look(self) -> None:
        """Look at each kind once. One whose files cannot be read or written is left for later."""
        facts, described = read_json(self.directory.model), read_json(self.directory.kinds)
        if not isinstance(facts, dict) or not isinstance(described, dict):
            return  # the server has not said yet
        for name, content in described.get("kinds", {}).items():
            until, waited = self._waits.get(name, (0.0, SECONDS))
            if time.monotonic() < until:
                continue
            try:
                self._look_at(name, Kind.of_dict(content["kind"]), facts)
                self._waits.pop(name, None)
            except (*UNREADABLE, LookupError, TypeError, ValueError) as error:
                wait = min(2 * waited, MOST_SECONDS)
                self._waits[name] = time.monotonic() + wait, wait
                say(f"{name}: {type(error).__name__}: {error}; once more in {wait:.0f} seconds")

    def _look_at(self, name: str, kind: Kind, facts: Mapping[str, Any]) -> None:
        """Make or repeat a try, if the kind has rows enough for it."""
        state = State.of(read_json(self.directory.trainer(name)))
        if state.status != RECORDING and state.tries[-1].fingerprint == facts["fingerprint"]:
            self._delete_rows(name)
            return
        shards = read_shards(self.directory.rows(name))
        due = self._due(name, state, shards, facts["fingerprint"])
        if due is None:
            return
        begun = due.latest.begun
        if (name, due.latest.number) not in self._begun:
            if begun == MOST_BEGINNINGS:
                self._end(name, due, f"{begun} trainers have ended while they fitted a policy")
                return
            due = replace(due, state=state.with_latest(replace(due.latest, begun=begun + 1)))
            write_json(self.directory.trainer(name), asdict(due.state))
            self._begun.add((name, due.latest.number))
        shards = [one for one in shards if one.number <= due.latest.newest]
        if not shards:  # too old, or deleted by hand
            self._end(name, due, "its rows were deleted before it ended")
            return
        self._try(name, kind, due, shards)

    def _due(
        self, name: str, state: State, shards: Sequence[Shard], fingerprint: str
    ) -> Due | None:
        """The try to make, perhaps once more; None if there are too few rows for another one."""
        own = [one for one in state.tries if one.fingerprint == fingerprint]
        if not own or own[-1].outcome is not None:
            rows = sum(shard.rows for shard in shards)
            if len(own) == len(self.tries) or rows < self.tries[len(own)]:
                return None
            taken = [0, *(one.number for one in state.tries)]
            own.append(Try(max(taken) + 1, fingerprint, rows, shards[-1].number))
        since = own[-2].newest if len(own) > 1 else -1
        state = state.with_latest(own[-1])
        return Due(state, len(own), since, len(own) == len(self.tries))

    def _try(self, name: str, kind: Kind, due: Due, shards: Sequence[Shard]) -> None:
        """Fit on older rows of `shards` and certify on newer ones; hand the policy over if it is.

        Rows that were there at the try before certify nothing.
        """
        served, rows = self._served(), only_finite(load_shards(shards))
        held_out = int((rows["shards"] > due.since).sum()) // 2
        epsilon, delta = served.facts["epsilon"], served.facts["delta"] * due.share_of_delta
        try:
            served.answers(kind)
        except AdaInferError as error:  # no number of rows would help
            self._end(name, replace(due, last=True), str(error))
            return
        try:
            policy = policy_of(served, kind, rows, held_out, epsilon, delta)
        except (ArithmeticError, RuntimeError, ValueError) as error:  # AdaInferError is one
            self._end(name, due, str(error))
            return
        saved = policy.points[epsilon].layers_saved if epsilon in policy.points else 0.0
        if saved < WORTH:
            why = (
                f"within {epsilon:.1%} changed answers, {held_out} held-out rows allow a policy to "
                f"save {saved:.1%} of the layers, which is less than {WORTH:.0%}"
            )
            self._end(name, due, why)
            return
        number = due.latest.number
        config = write(policy, served, self.directory.policy(name, number))
        [level] = [one for one in config.levels if one.epsilon == epsilon]
        facts = {"layers_saved": level.layers_saved, "bound": level.bound}
        self._end(name, due, CERTIFIED, **facts)

    def _served(self) -> Served:
        """The served model, read once unless it changes."""
        facts = read_json(self.directory.model)
        if self._model is None or self._model[0] != facts:
            self._model = facts, Served.read(self.directory)
        return self._model[1]

    def _end(self, name: str, due: Due, outcome: str, **facts: float) -> None:
        """Write down how a try ended, and delete rows that no other one will need."""
        state = due.state.ended(outcome, due.last)
        write_json(self.directory.trainer(name), asdict(state))
        if state.status != RECORDING:
            self._delete_rows(name)
        number, rows = due.latest.number, due.latest.rows
        if outcome == CERTIFIED:
            self.directory.tell(name, CERTIFIED, number=number, rows=rows, **facts)
            return
        self.directory.tell(name, "tried", number=number, rows=rows, why=outcome)
        if due.last:
            self.directory.tell(name, GIVEN_UP, rows=rows)

    def _delete_rows(self, name: str) -> None:
        """Delete the states of a kind, which count as prompts."""
        shutil.rmtree(self.directory.rows(name), ignore_errors=True)


def write(policy: FittedPolicy, served: Served, target: Path) -> ArtifactConfig:
    """Write an artifact that only this user may read, all of it or nothing.

    Raises:
        AdaInferError, OSError: it cannot be written.

    """
    with whole_directory(target, 0o700) as draft:
        config = write_artifact(policy, served.facts["model"], served.hf_config, None, draft)
        for file in draft.iterdir():
            file.chmod(PRIVATE)
    return config
