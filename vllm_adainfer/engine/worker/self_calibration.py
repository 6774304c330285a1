"""The thread beside the steps of a server that calibrates itself: files, policies, the trainer."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from queue import Empty, SimpleQueue
from threading import Event, Thread

from torch import Tensor

from vllm_adainfer.artifact.config import policy_of
from vllm_adainfer.auto.admitted_kind import AdmittedKind
from vllm_adainfer.auto.all_kinds import Counted, note_lost
from vllm_adainfer.auto.directory import AutoDirectory, read_json
from vllm_adainfer.auto.tries import GIVEN_UP, MOST_ROWS, RECORDING, TRIES, State
from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.engine.runner.admitted_kinds import AdmittedKinds
from vllm_adainfer.engine.worker.kind_policies import KindPolicies
from vllm_adainfer.engine.worker.model_facts import forget_others, write_facts
from vllm_adainfer.engine.worker.probe_times import label_head_seconds
from vllm_adainfer.engine.worker.row_files import RowFiles
from vllm_adainfer.engine.worker.served_policies import Built, ServedPolicies
from vllm_adainfer.engine.worker.trainer_process import TrainerProcess
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.settings.engine import Auto
from vllm_adainfer.transfers import HostCopy

logger = get_logger(__name__)

TIMED_ROWS = TRIES[0] // 2  # of a kind, after which the layers' speed is known
TIMED_STEPS = 16  # likewise: after a restart, the rows are there before any step
MOST_WAITING = 4096  # rows that may wait for the disk; further ones are lost
TICK_SECONDS = 1.0
STATUS_SECONDS = 60.0  # between the lines about a kind among the events
LOCK_SECONDS = 60.0  # in which a killed server's worker ends, see `compat/processes.py`
CLOSE_SECONDS = 10.0
# A policy whose savings over so many requests are below this share of those on its held-out rows is
# made anew.
SHRUNK_REQUESTS, SHRUNK = 2_000, 0.6

Chunk = tuple[Sequence[str], Mapping[str, HostCopy]]


class SelfCalibration:
    """The tasks of a worker beside its steps, on one thread.

    It writes recorded rows and ledgers, starts the trainer, and reads the policies that this has
    certified. Whatever fails here, serving goes on.

    Attributes:
        kinds: those that the worker knows.

    """

    def __init__(self, auto: Auto, served: ServedPolicies, head: Tensor) -> None:
        """`served` are the worker's policies; its model's weights are loaded, its loop is built.

        `head` is the whole LM head, on the host.

        An AdaInferError if this process cannot write to the directory, or another server has it.
        """
        self._model = model = served.model
        self._head: Tensor | None = head  # until it is written
        self._directory = directory = AutoDirectory(auto.directory)
        directory.create()
        self._held = ExitStack()
        self._hold()
        directory.delete_drafts()
        self._config = served.vllm_config.model_config
        forget_others(directory, auto, model)
        self.kinds = AdmittedKinds(auto, directory)
        self._rows = RowFiles(directory)
        self._policies = KindPolicies(directory, served, self.kinds.kinds)
        self._courses: dict[str, int] = {}  # by kind, as last seen
        self._note_states()
        self._trainer = TrainerProcess(directory)
        self._chunks: SimpleQueue[Chunk | None] = SimpleQueue()
        self._put_rows = self._written_rows = 0  # one thread counts each
        self._built: SimpleQueue[Built] = SimpleQueue()
        self._lost: SimpleQueue[AdmittedKind] = SimpleQueue()  # kinds whose files are to be deleted
        self._told: dict[str, int] = {}  # by kind, the requests at its last status
        self._saved: dict[str, tuple[int, int, int]] = {}  # by kind, see `_look_at_savings`
        self._next_tick, self._next_status = 0.0, time.monotonic() + STATUS_SECONDS
        self._failed: set[str] = set()
        self._serving = Event()
        self._label_head_seconds: dict[str, float] = {}
        self._thread = Thread(target=self._run, name="adainfer-auto", daemon=True)
        self._thread.start()

    def put(self, kinds: Sequence[str], rows: Mapping[str, HostCopy]) -> None:
        """Queue a chunk of rows, or lose it if the disk is too slow; a `ChunkReader`."""
        if self._put_rows - self._written_rows > MOST_WAITING:
            logger.warning_once("rows come faster than they can be written: some are lost")
            return
        self._put_rows += len(kinds)
        self._chunks.put((kinds, rows))

    def serving_begins(self) -> None:
        """Everything is warmed up and captured; what comes now are requests of clients.

        Until then, nothing beside the steps may touch the device: vLLM's warm-up on GPUs runs real
        requests before it captures graphs, and a capture fails if another thread uses the device.
        """
        self._label_head_seconds = label_head_seconds(self._model)
        self._model.loop.times.reset()
        self._serving.set()

    def take_built(self) -> Built:
        """Policies that are ready to be served; empty in nearly all steps."""
        built = {} if self._built.empty() else self._built.get_nowait()
        return {kind: one for kind, one in built.items() if kind in self.kinds.kinds}

    def folders_of(self, built: Built) -> dict[str, str]:
        """Where the artifacts of policies that were taken lie, by name."""
        folders = {name: self._policies.folder(name) for name in built}
        return {name: folder for name, folder in folders.items() if folder is not None}

    def forget(self, kinds: Iterable[AdmittedKind]) -> None:
        """Delete the files of kinds that have lost their place, and whose policies do not serve."""
        for kind in kinds:
            self._lost.put(kind)

    def quarantine(self, kinds: Iterable[str], error: Exception) -> None:
        """Policies of these kinds that were taken cannot be served after all."""
        for kind in kinds:
            self._policies.quarantine(kind, error)

    def close(self) -> None:
        """Write what is queued, and end the trainer."""
        self._chunks.put(None)
        self._thread.join(CLOSE_SECONDS)

    def _hold(self) -> None:
        """Hold the directory: two servers would overwrite each other's ledgers."""
        place, hold = self._directory, self._held.enter_context
        if hold(place.held("server")):
            return
        logger.info(
            "waiting up to %g s for %s to leave %s",
            LOCK_SECONDS,
            place.holder("server"),
            place.root,
        )
        if not hold(place.held("server", LOCK_SECONDS)):
            raise AdaInferError(
                f"{place.holder('server')} is another server's worker, which calibrates itself in "
                f'{place.root}: give each server an "auto" directory of its own, or end the other '
                "one"
            )

    def _run(self) -> None:
        is_open = True
        while is_open:
            with suppress(Empty):
                chunk = self._chunks.get(timeout=TICK_SECONDS)
                if chunk is None:
                    is_open = False
                else:
                    self._written_rows += len(chunk[0])
                    self._tried("rows cannot be written", partial(self._write, *chunk))
            if time.monotonic() >= self._next_tick or not is_open:
                self._next_tick = time.monotonic() + TICK_SECONDS
                self._tick()
        self._tried("ledgers cannot be written", partial(self.kinds.save, is_last=True))
        self._trainer.close()
        self._held.close()

    def _tick(self) -> None:
        self._forget_lost()
        self._tried("ledgers cannot be written", self.kinds.save)
        self._tried("policies cannot be read", self._read_policies)
        self._tried("the trainer cannot be started", self._trainer.keep_running)
        self._tried("the model cannot be described to the trainer", self._describe_model)
        if time.monotonic() >= self._next_status:
            self._next_status = time.monotonic() + STATUS_SECONDS
            self._tried("the state cannot be written", self._status)

    def _tried(self, what: str, task: Callable[[], None]) -> None:
        """Run a task. On failure, warn once and retry later."""
        try:
            task()
        except Exception as error:  # whatever it was, serving goes on
            if what not in self._failed:
                logger.warning("%s (%s); this is tried again, without more warnings", what, error)
            self._failed.add(what)

    def _forget_lost(self) -> None:
        while not self._lost.empty():
            kind = self._lost.get()
            try:
                note_lost(self._directory, Counted.of_ledger(kind.content))
            except OSError:  # its files stay until that can be written
                self._lost.put(kind)
                break
            self._directory.forget_kind(kind.name)
            self._policies.forget(kind.name)
            for noted in self._told, self._saved, self._courses:
                noted.pop(kind.name, None)
        self._rows.note_deleted()

    def _write(self, kinds: Sequence[str], copies: Mapping[str, HostCopy]) -> None:
        rows = {name: copy.tensor() for name, copy in copies.items()}
        wanted = [name for name, kind in list(self.kinds.kinds.items()) if kind.records]
        self._rows.put(kinds, rows, wanted)

    def _read_policies(self) -> None:
        self._note_states()
        if self._serving.is_set() and (built := self._policies.read()):
            self._built.put(built)

    def _describe_model(self) -> None:
        rows, timed = max(self._rows.counts.values(), default=0), self._model.loop.times.layers
        known = self._serving.is_set() and timed.steps >= TIMED_STEPS
        if self._head is not None and known and rows >= TIMED_ROWS:
            seconds = self._label_head_seconds
            write_facts(self._directory, self._model, self._head, self._config, seconds)
            self._head = None

    def _note_states(self) -> None:
        """Note what each kind is at: its policy, and whether more rows of it are recorded."""
        for name, kind in list(self.kinds.kinds.items()):
            kind.look_at_prompts()
            tried = State.of(read_json(self._directory.trainer(name)))
            is_new, rows = tried.course < kind.course, self._rows.counts.get(name, 0)
            # A policy of an earlier course serves on, unless it was what closed the kind.
            best = tried.best(kind.course if kind.ledger.is_closed else None)
            kind.certified = None if best is None else best.number
            has_ended = tried.status != RECORDING and not is_new
            waits = kind.ledger.requests < kind.begins_at
            kind.records = not (has_ended or waits or kind.has_grown or rows >= MOST_ROWS)
            if best is not None:
                kind.state = "served"
            elif has_ended:
                kind.state = GIVEN_UP
            elif waits:
                kind.state = "closed"
            else:
                kind.state = "recording" if kind.records else "recorded"
            is_over = self._courses.get(name, kind.course) != kind.course
            if name in self._rows.counts and (kind.has_grown or is_over):
                self._rows.forget(name)
            self._courses[name] = kind.course

    def _status(self) -> None:
        """A line about each kind that got requests since the last one."""
        self._rows.forget_old()
        work = dict(self._model.loop.stats.by_policy)
        for name, kind in list(self.kinds.kinds.items()):
            facts = kind.reading
            if self._told.get(name) == kind.ledger.requests:
                continue
            self._told[name] = kind.ledger.requests
            own = [counted for part, counted in work.items() if policy_of(part) == name]
            if own:
                skipped = sum(one.layers_skipped for one in own)
                possible = skipped + sum(one.layers_run for one in own)
                decided = sum(one.exit_histogram.total() for one in own)
                facts["layers_saved"] = skipped / max(possible, 1)
                self._look_at_savings(kind, skipped, possible, decided)
            rows = self._rows.counts.get(name, 0)
            self._directory.tell(name, "status", state=kind.state, rows=rows, **facts)

    def _look_at_savings(
        self, kind: AdmittedKind, skipped: int, possible: int, decided: int
    ) -> None:
        """Record a kind anew whose policy is within its bound but saves far less than it did.

        Given are its token-layers and its requests under a policy so far.
        """
        before = self._saved.setdefault(kind.name, (skipped, possible, decided))
        if decided - before[2] < SHRUNK_REQUESTS:
            return
        self._saved[kind.name] = skipped, possible, decided
        saved = (skipped - before[0]) / max(possible - before[1], 1)
        tried = State.of(read_json(self._directory.trainer(kind.name)))
        best, has_ended = tried.best(), tried.status != RECORDING
        if best is None or not has_ended or tried.course < kind.course or kind.ledger.is_closed:
            return
        expected = best.layers_saved * (1 - kind.ledger.rate)  # of those that are not compared
        if saved < SHRUNK * expected:
            kind.wants_course = True
            self._directory.tell(kind.name, "savings have shrunk", saved=saved, expected=expected)
