"""Files of recorded rows: one folder for each kind, for its user alone."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from vllm_adainfer.auto.directory import FREE_BYTES, KEPT_SECONDS, AutoDirectory
from vllm_adainfer.auto.tries import MOST_ROWS
from vllm_adainfer.engine.runner.admitted_kinds import MOST_RECORDED
from vllm_adainfer.files import replace_file

MOST_KEPT_ROWS = MOST_RECORDED * MOST_ROWS


class RowFiles:
    """Writes rows of served requests, with ``computed``; a file for each chunk of a kind.

    Attributes:
        counts: the rows of each kind that lie on disk.

    """

    def __init__(self, directory: AutoDirectory) -> None:
        """Count the rows that earlier runs left."""
        self._directory = directory
        self.counts: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        for path in sorted(directory.root.glob("*/rows/[0-9]*.safetensors")):
            kind = path.parent.parent.name
            self._numbers[kind] = int(path.stem)
            self.counts[kind] = self.counts.get(kind, 0) + _rows_of(path)

    def put(
        self, kinds: Sequence[str], rows: Mapping[str, Tensor], wanted: Collection[str]
    ) -> None:
        """Write the rows of a chunk that are of `wanted` kinds; arguments as for `ChunkReader`.

        An OSError if they cannot be written, or would be too many, or would leave too little of the
        disk; the chunk is lost.
        """
        root = self._directory.root
        if shutil.disk_usage(root).free < FREE_BYTES:
            raise OSError(errno.ENOSPC, f"less than {FREE_BYTES >> 30} GiB is free for {root}")
        for kind in dict.fromkeys(kinds):
            count = self.counts.get(kind, 0)
            if kind not in wanted or count >= MOST_ROWS:
                continue
            places = [place for place, one in enumerate(kinds) if one == kind]
            own = torch.tensor(places[: MOST_ROWS - count])
            if sum(self.counts.values()) + len(own) > MOST_KEPT_ROWS:
                raise OSError(errno.EDQUOT, f"{root} keeps at most {MOST_KEPT_ROWS:,} of them")
            number = self._numbers.get(kind, 0) + 1
            folder = self._directory.rows(kind)
            for each in folder.parent, folder:
                each.mkdir(mode=0o700, exist_ok=True)
            chosen = {name: part[own] for name, part in rows.items()}
            replace_file(folder / f"{number:06}.safetensors", save(chosen))
            self._numbers[kind], self.counts[kind] = number, count + len(own)

    def note_deleted(self) -> None:
        """Note which rows have been deleted, as the trainer does once it needs them no more."""
        for kind in list(self.counts):
            if not self._directory.rows(kind).exists():
                del self.counts[kind]

    def forget(self, kind: str) -> None:
        """Delete the rows of a kind."""
        shutil.rmtree(self._directory.rows(kind), ignore_errors=True)
        self.counts.pop(kind, None)

    def forget_old(self) -> None:
        """Delete rows that are older than `KEPT_SECONDS`."""
        oldest = time.time() - KEPT_SECONDS
        for path in self._directory.root.glob("*/rows/*.safetensors"):
            try:
                if path.stat().st_mtime < oldest:
                    kind = path.parent.parent.name
                    self.counts[kind] = max(0, self.counts.get(kind, 0) - _rows_of(path))
                    path.unlink()
            except OSError:  # the trainer has just deleted it
                continue


def _rows_of(path: Path) -> int:
    """The rows of a file; 0 if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            rows: int = file.get_slice("computed").get_shape()[0]
            return rows
    except Exception:  # safetensors has its own errors, and the trainer deletes files
        return 0
