"""Writes JSON lines to files, on a thread of its own: captured requests, and the audit."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BufferedRandom, FileIO
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

from vllm_adainfer.engine.compat.logs import get_logger
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.files import private
from vllm_adainfer.settings.engine import Audit, Capture

logger = get_logger(__name__)

FILES = 10  # files per engine: the oldest tenth of the lines is deleted at a time
CLOSE_SECONDS = 5.0  # how long a stopping engine waits for the disk


class LineFiles:
    """Keeps the latest lines of one engine in files ``KIND-ENGINE-NUMBER.jsonl``.

    Files left by earlier runs of the engine count towards its limit. Each line is a single write.
    A line cut short by a full disk is removed at once, one cut short by a kill at the next start.
    Several servers may write to one directory: each locks the file that it writes, and the others
    neither count, nor cut, nor delete a locked file.
    """

    def __init__(
        self,
        kind: str,
        settings: Audit | Capture,
        engine: int,
        queued: int,
        tells_lost: bool = False,
    ) -> None:
        """Enforce the limit on what earlier runs left, and start the thread.

        Args:
            kind: the key of the engine switch that asks for the lines.
            settings: where to write, and the most lines to keep there.
            engine: the number of this engine among those that write to the directory.
            queued: lines that may wait for the disk; further ones are lost.
            tells_lost: whether a line ``{"lost": n}`` stands where lines are lost.

        """
        self._kind, self._directory = kind, Path(settings.directory)
        self._prefix = f"{kind}-{engine}-"
        self._limit = settings.limit
        self._lines_per_file = max(1, settings.limit // FILES)
        self._tells_lost = tells_lost
        self._lost = self._told = 0  # one thread counts, the other tells
        self._file: FileIO | None = None
        self._lines = 0  # in that file
        check_directory(kind, settings.directory)
        found = _numbered(self._directory, self._prefix)
        self._next_number = max(found, default=0) + 1
        try:
            counted = ((found[n], whole_lines(found[n])) for n in sorted(found))
            self._full = deque((path, lines) for path, lines in counted if lines is not None)
            self._make_room(0)
        except OSError as error:
            raise _not_writable(kind, settings.directory, error) from None
        self._failed = False
        self._queue: Queue[dict[str, Any] | Callable[[], dict[str, Any]] | None] = Queue(queued)
        self._thread = Thread(target=self._write_all, name=f"adainfer-{kind}", daemon=True)
        self._thread.start()

    def put(self, line: dict[str, Any] | Callable[[], dict[str, Any]]) -> None:
        """Queue a line to be written, or lose it if the queue is full; never blocks.

        What takes time to make is made by the thread that writes.
        """
        try:
            self._queue.put_nowait(line)
        except Full:
            self._lost += 1
            logger.warning_once(
                "lines of the %s come faster than they can be written to %s: some are lost",
                self._kind,
                self._directory,
            )

    def close(self) -> None:
        """Write what is queued; give up on a disk that hangs."""
        try:
            self._queue.put(None, timeout=CLOSE_SECONDS)
        except Full:
            return
        self._thread.join(CLOSE_SECONDS)

    def _write_all(self) -> None:
        while (line := self._queue.get()) is not None:
            try:
                lost = self._lost - self._told
                if self._tells_lost and lost:
                    self._write({"lost": lost})
                    self._told += lost
                self._write(line() if callable(line) else line)
            except Exception as error:  # whatever it was, the next line may succeed
                self._told -= 1  # this line is lost, too
                if not self._failed:
                    logger.warning(
                        "a line of the %s could not be written to %s (%s); later lines are still "
                        "tried, and this warning is not repeated",
                        self._kind,
                        self._directory,
                        error,
                    )
                self._failed = True
        if self._file is not None:
            self._file.close()

    def _write(self, content: dict[str, Any]) -> None:
        line = json.dumps(content, separators=(",", ":")).encode() + b"\n"
        if self._file is None or self._lines == self._lines_per_file:
            self._file = self._new_file()
        written = self._file.write(line)
        if written != len(line):
            self._file.truncate(os.fstat(self._file.fileno()).st_size - (written or 0))
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._lines += 1

    def _new_file(self) -> FileIO:
        """Open the next file, which only this user may read and write."""
        if self._file is not None:
            self._file.close()
            self._full.append((Path(str(self._file.name)), self._lines))
            self._file, self._lines = None, 0
        self._make_room(self._lines_per_file)
        while True:
            path = self._directory / f"{self._prefix}{self._next_number:06}.jsonl"
            self._next_number += 1
            try:
                file = FileIO(path, "xb", opener=_appending)
            except FileExistsError:  # from another server that writes to the same directory
                continue
            fcntl.flock(file, fcntl.LOCK_EX)
            if os.fstat(file.fileno()).st_nlink:  # no other server was faster, and deleted it
                return file
            file.close()

    def _make_room(self, lines: int) -> None:
        """Delete the oldest files until `lines` more fit within the limit."""
        while self._full and sum(count for _, count in self._full) + lines > self._limit:
            path, _ = self._full[0]
            with _unused(path) as file:
                if file is not None:
                    path.unlink()
            self._full.popleft()


def check_directory(kind: str, directory: str) -> None:
    """Create the directory if it is missing, and check that files can be created in it."""
    try:
        Path(directory).mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
    except OSError as error:
        raise _not_writable(kind, directory, error) from None


def whole_lines(path: Path) -> int | None:
    """Remove an incomplete last line from a file, and count the lines that remain.

    None, and the file stays as it is, while a server writes it or if another has deleted it.
    """
    with _unused(path) as file:
        if file is None:
            return None
        lines = end = 0
        for line in file:
            if line.endswith(b"\n"):
                lines += 1
                end += len(line)
        file.truncate(end)
    return lines


@contextmanager
def _unused(path: Path) -> Iterator[BufferedRandom | None]:
    """A file, locked while the context lasts; None while a server writes it, or if it is gone."""
    try:
        file = path.open("rb+")
    except FileNotFoundError:
        yield None
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file


def _numbered(directory: Path, prefix: str) -> dict[int, Path]:
    """The files left by earlier runs, by number."""
    names = {
        path: re.fullmatch(rf"{prefix}(\d+)\.jsonl", path.name) for path in directory.iterdir()
    }
    return {int(name[1]): path for path, name in names.items() if name}


def _appending(path: str, flags: int) -> int:
    return private(path, flags | os.O_APPEND)


def _not_writable(kind: str, directory: str, error: OSError) -> AdaInferError:
    return AdaInferError(
        f"additional_config: adainfer.{kind}.directory: cannot write to {directory} "
        f"({error.strerror}): name a directory that the user of this server may write to"
    )
