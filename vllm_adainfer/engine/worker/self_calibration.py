"""The thread beside the steps of a server that calibrates itself: files, policies, the trainer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from queue import Empty, Full, Queue
from threading import Thread
from typing import Any

from torch import Tensor
from vllm.config import VllmConfig

from vllm_adainfer.auto.directory import AutoDirectory, read_json
from vllm_adainfer.auto.tries import MOST_ROWS, TRIES
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.runner.own_kinds import OwnKinds
from vllm_adainfer.engine.worker.model_facts import ModelFacts
from vllm_adainfer.engine.worker.own_policies import OwnPolicies
from vllm_adainfer.engine.worker.row_files import RowFiles
from vllm_adainfer.engine.worker.service import Built
from vllm_adainfer.engine.worker.trainer_process import TrainerProcess
from vllm_adainfer.settings.engine import Auto

logger = get_logger(__name__)

TIMED_ROWS = TRIES[0] // 2  # of a kind, after which the layers' speed is known
QUEUED = 32  # chunks of rows that may wait for the disk; further ones are lost
TICK_SECONDS = 1.0
STATUS_SECONDS = 60.0  # between the lines about a kind among the events
CLOSE_SECONDS = 10.0

Chunk = tuple[Sequence[str], Sequence[Tensor], Tensor]


class SelfCalibration:
    """What a worker does beside its steps, on one thread.

    It writes recorded rows and ledgers, starts the trainer, and reads the policies that this has
    certified. Whatever fails here, serving goes on.
    """

    def __init__(self, auto: Auto, model: Any, vllm_config: VllmConfig) -> None:
        """`model` is an `EarlyExit`, whose weights are loaded and whose loop is built.

        Raises:
            AdaInferError: this process cannot write to the directory.

        """
        self._model = model
        self._directory = AutoDirectory(auto.directory)
        self._directory.create()
        self._facts = ModelFacts(self._directory, auto, model, vllm_config)
        self.kinds = OwnKinds(auto, self._directory)
        self._rows = RowFiles(self._directory, model.loop.policies.exit_points)
        self._policies = OwnPolicies(self._directory, model, vllm_config)
        self._trainer = TrainerProcess(self._directory)
        self._chunks: Queue[Chunk | None] = Queue(QUEUED)
        self._built: Queue[Built] = Queue()
        self._told: dict[str, int] = {}  # by kind, the requests at its last status
        self._next_tick, self._failed = 0.0, False
        self._thread = Thread(target=self._run, name="adainfer-auto", daemon=True)
        self._thread.start()

    def put(self, kinds: Sequence[str], states: Sequence[Tensor], computed: Tensor) -> None:
        """Queue a chunk of rows, or lose it if the disk is too slow; a `ChunkReader`."""
        try:
            self._chunks.put_nowait((kinds, states, computed))
        except Full:
            logger.warning_once("rows come faster than they can be written: some are lost")

    def take_built(self) -> Built:
        """Policies that are ready to be served; empty in nearly all steps."""
        return {} if self._built.empty() else self._built.get_nowait()

    def close(self) -> None:
        """Write what is queued, and end the trainer."""
        try:
            self._chunks.put(None, timeout=CLOSE_SECONDS)
        except Full:
            return
        self._thread.join(CLOSE_SECONDS)

    def _run(self) -> None:
        next_status = time.monotonic() + STATUS_SECONDS
        while True:
            try:
                chunk = self._chunks.get(timeout=TICK_SECONDS)
                if chunk is None:
                    break
                self._rows.put(*chunk)
            except Empty:
                pass
            except Exception as error:  # the next chunk may succeed
                self._warn_once("rows cannot be written", error)
            try:
                self._tick()
                if time.monotonic() >= next_status:
                    next_status = time.monotonic() + STATUS_SECONDS
                    self._status()
            except Exception as error:
                self._warn_once("the state cannot be written", error)
        self._save_ledgers()
        self._trainer.close()

    def _tick(self) -> None:
        if time.monotonic() < self._next_tick:
            return
        self._next_tick = time.monotonic() + TICK_SECONDS
        counts, kinds = self._rows.counts, self.kinds
        enough = kinds.steps > 0 and max(counts.values(), default=0) >= TIMED_ROWS
        if enough and not self._facts.are_written:
            self._facts.write(kinds.step_seconds, kinds.steps)
        self._trainer.keep_running()
        if built := self._policies.read():
            self._built.put(built)
        self._note_states()
        self._save_ledgers()

    def _note_states(self) -> None:
        """Stop recording kinds that have had a policy, that never will, or with rows enough."""
        for name, own in list(self.kinds.kinds.items()):
            if name in self._policies.served:
                own.state = "served"
            elif name in self._policies.put_away:
                own.state = "put away"
            elif self._rows.counts.get(name, 0) >= MOST_ROWS:
                own.state = "recorded"
            elif own.state == "recording":
                said = read_json(self._directory.trainer(name))
                if isinstance(said, dict) and said.get("status") == "given up":
                    own.state = "given up"

    def _save_ledgers(self) -> None:
        for name in list(self.kinds.kinds):
            self.kinds.save(name)

    def _status(self) -> None:
        """A line about each kind that got requests since the last one."""
        self._rows.forget_old()
        work = self._model.loop.stats.by_policy
        for name, own in list(self.kinds.kinds.items()):
            facts = own.reading()
            if self._told.get(name) == facts["requests"]:
                continue
            self._told[name] = facts["requests"]
            if name in work:
                counts = work[name].work
                run, skipped = counts["layers_run"], counts["layers_skipped"]
                facts["layers_saved"] = skipped / max(run + skipped, 1)
            rows = self._rows.counts.get(name, 0)
            self._directory.tell(name, "status", state=own.state, rows=rows, **facts)

    def _warn_once(self, what: str, error: Exception) -> None:
        if not self._failed:
            logger.warning(
                "%s (%s); it is tried again, and this warning is not repeated", what, error
            )
        self._failed = True
