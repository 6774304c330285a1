"""The directory of a server that calibrates itself: its files, readable by its user alone.

DIR/salt                      the key of the kinds' names
DIR/kinds.json                the content of each kind, and its number of requests (scheduler)
DIR/model.json, model.safetensors      facts and LM head of the served model (worker)
DIR/KIND/rows/NUMBER.safetensors       recorded rows (worker), deleted after the last try (trainer)
DIR/KIND/trainer.json         the tries to certify a policy; the latest certified serves (trainer)
DIR/KIND/policy-NUMBER/       a certified artifact (trainer)
DIR/KIND/ledger.json          the ledger, and the policy that is quarantined (worker)
DIR/lost.json                 what the ledgers of kinds without a place had counted (worker)
DIR/index.html                a page of all this (`vllm-adainfer kinds --page`)
DIR/identity.json             identity of the server: weights, exit points, promise. Everything else
                              here is valid for it alone (worker)
DIR/events.jsonl              dated events, for the page (anyone appends a line)
DIR/events-before.jsonl       earlier events
DIR/server.lock, trainer.lock, counts.lock    held by worker, trainer and scheduler: their ids
DIR/trainer.log               output of the trainer
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.files import private, replace_file

SALT_BYTES = 32
LOOK_SECONDS = 0.25  # between two looks at a lock that another process holds
DRAFT_SECONDS = 60.0  # a file that is being written is no older
KEPT_SECONDS = 7 * 24 * 3600.0  # that rows without a policy stay
FREE_BYTES = 1 << 30  # of the disk, which rows leave to ledgers, policies and everybody else
MOST_EVENTS = 8 << 20  # bytes of a file of events; the one before is kept


class AutoDirectory:
    """Paths in the directory, and files that are written whole or not at all.

    Attributes:
        root: the directory.
        kinds, identity, model, head, lost, page, events, events_before: see above.

    """

    def __init__(self, root: str | Path) -> None:
        """Name the files in `root`, which `create` creates."""
        self.root = Path(root)
        self.kinds = self.root / "kinds.json"
        self.identity = self.root / "identity.json"
        self.model = self.root / "model.json"
        self.head = self.root / "model.safetensors"
        self.lost = self.root / "lost.json"
        self.page = self.root / "index.html"
        self.events = self.root / "events.jsonl"
        self.events_before = self.root / "events-before.jsonl"

    def create(self) -> None:
        """Create the directory and its salt if they are missing.

        An AdaInferError if this process cannot write there, others may read it, or its salt is
        damaged.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.root.stat().st_mode & 0o077:
                raise AdaInferError(
                    f"additional_config: adainfer.auto.directory: others may read {self.root}, and "
                    f"states of prompts count as prompts: chmod 700 {self.root}"
                )
            salt = self.root / "salt"
            if not salt.exists():
                with tempfile.NamedTemporaryFile("w", dir=self.root, prefix=".salt.") as draft:
                    draft.write(secrets.token_hex(SALT_BYTES))
                    draft.flush()
                    with suppress(FileExistsError):  # another process was faster
                        os.link(draft.name, salt)
            if not re.fullmatch(f"[0-9a-f]{{{2 * SALT_BYTES}}}", salt.read_text(errors="replace")):
                raise AdaInferError(
                    f"additional_config: adainfer.auto.directory: {salt} is damaged, and without "
                    f"it nothing in {self.root} has a name: delete the directory to begin anew"
                )
        except OSError as error:
            raise AdaInferError(
                f"additional_config: adainfer.auto.directory: cannot write to {self.root} "
                f"({error.strerror}): name a directory that the user of this server may write to"
            ) from None

    @property
    def salt(self) -> bytes:
        """The key of the kinds' names."""
        return bytes.fromhex((self.root / "salt").read_text())

    def rows(self, kind: str) -> Path:
        """The folder of a kind's recorded rows."""
        return self.root / kind / "rows"

    def trainer(self, kind: str) -> Path:
        """The trainer's notes on a kind."""
        return self.root / kind / "trainer.json"

    def policy(self, kind: str, number: int) -> Path:
        """The artifact of a kind's policy."""
        return self.root / kind / f"policy-{number}"

    def ledger(self, kind: str) -> Path:
        """The ledger of a kind."""
        return self.root / kind / "ledger.json"

    @contextmanager
    def held(self, name: str, seconds: float = 0.0) -> Iterator[bool]:
        """Hold one of the directory's locks; False if another holds it for so many `seconds`.

        The system releases it whenever the process ends.
        """
        file = os.open(self.root / f"{name}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            end = time.monotonic() + seconds
            while not (is_held := _locked(file)) and time.monotonic() < end:
                time.sleep(LOOK_SECONDS)
            if is_held:
                os.truncate(file, 0)
                with suppress(OSError):  # the disk is full
                    os.write(file, str(os.getpid()).encode())
            yield is_held
        finally:
            os.close(file)

    def holder(self, name: str) -> str:
        """The process that holds one of the locks, in words."""
        return f"process {(self.root / f'{name}.lock').read_text() or 'unknown'}"

    def delete_drafts(self) -> None:
        """Delete what a killed process has left half-written."""
        oldest = time.time() - DRAFT_SECONDS
        for pattern in ".*", "*/.*", "*/rows/.*":
            for path in self.root.glob(pattern):
                with suppress(OSError):
                    if path.stat().st_mtime < oldest and path.is_file():
                        path.unlink()

    def forget(self) -> None:
        """Delete all rows, policies and ledgers, and what is known of the model."""
        for path in (self.model, self.head, self.lost):
            path.unlink(missing_ok=True)
        for kind in self.known():
            self.forget_kind(kind)

    def known(self) -> list[str]:
        """The kinds that have a folder."""
        return [folder.name for folder in self.root.glob("kind-*")]

    def forget_kind(self, kind: str) -> None:
        """Delete the rows, policies and ledger of a kind."""
        shutil.rmtree(self.root / kind, ignore_errors=True)

    def tell(self, kind: str, event: str, **facts: Any) -> None:
        """Append a line to the events; one write, so that several processes may do it.

        A line that cannot be written, for want of space, is lost: nothing but the page needs it.
        """
        with suppress(OSError):
            if self.events.stat().st_size > MOST_EVENTS:
                os.replace(self.events, self.events_before)
        line = {"time": round(time.time(), 3), "kind": kind, "event": event, **facts}
        with (
            suppress(OSError),
            open(self.events, "ab", buffering=0, opener=private) as events,
        ):
            events.write(json.dumps(line).encode() + b"\n")

    def told(self) -> Iterator[dict[str, Any]]:
        """All events, the oldest first, without lines that a kill has cut short."""
        for path in self.events_before, self.events:
            try:
                lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            except OSError:
                continue
            for line in lines:
                with suppress(KeyError, TypeError, ValueError):
                    event = json.loads(line)
                    names = {name: str(event[name]) for name in ("kind", "event")}
                    yield {**event, **names, "time": float(event["time"])}


def _locked(file: int) -> bool:
    """Lock an open file, unless it is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_json(path: Path, value: Any) -> None:
    """Replace a file that only this user may read; its folder is created if it is missing."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(path, json.dumps(value))


def read_json(path: Path) -> Any:
    """The content of a file; None if there is none, or if it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, RecursionError, ValueError):
        return None
