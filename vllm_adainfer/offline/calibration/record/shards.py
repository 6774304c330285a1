"""Files of recorded rows, see `RowRecorder`: a folder of them is what policies are made from."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.artifact.tensors import UNREADABLE
from vllm_adainfer.offline.progress import say

LAYER = "layer."


@dataclass(frozen=True)
class Shard:
    """A file of rows.

    Attributes:
        path: the file, ``NUMBER.safetensors``; numbers ascend as rows come.
        rows: how many it has.
        layout: the names and widths of its tensors.

    """

    path: Path
    rows: int
    layout: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def number(self) -> int:
        """The number in its name."""
        return int(self.path.stem)


def read_shards(folder: Path) -> list[Shard]:
    """The files that are whole, the oldest first; those with the cuts of the newest alone."""
    found = []
    for path in sorted(folder.glob("[0-9]*.safetensors")):
        try:
            stat = path.stat()
        except OSError:  # deleted since
            continue
        if (shard := _shard(path, stat.st_mtime_ns, stat.st_size)) is not None:
            found.append(shard)
    return [shard for shard in found if shard.layout == found[-1].layout]


@functools.lru_cache(maxsize=4096)
def _shard(path: Path, written: int, size: int) -> Shard | None:
    """What a file has by its head, which is read once for all; None if it is damaged."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except UNREADABLE as error:
        say(f"{path} is damaged and left out ({error})")
        return None
    counts = {shape[0] if shape else 0 for shape in shapes.values()}
    has_layers = any(name.startswith(LAYER) for name in shapes)
    if not has_layers or "final" not in shapes or len(counts) != 1:
        say(f"{path} does not hold rows and is left out")
        return None
    [rows] = counts
    return Shard(path, rows, tuple((name, shape[1:]) for name, shape in sorted(shapes.items())))


def load_shards(shards: Sequence[Shard]) -> dict[str, Tensor]:
    """The rows of at least one shard, by name; with `Shard.number` of each row as ``shards``.

    Raises:
        OSError, RuntimeError, SafetensorError: a file cannot be read.

    """
    parts = [load_file(shard.path) for shard in shards]
    [whole, *others] = parts
    if others:
        whole = {name: torch.cat([part[name] for part in parts]) for name in whole}
    numbers = torch.tensor([shard.number for shard in shards])
    counts = torch.tensor([shard.rows for shard in shards])
    return whole | {"shards": numbers.repeat_interleave(counts)}


def only_finite(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows without any that is not finite."""
    finite = torch.stack(
        [
            one.flatten(1).isfinite().all(1) if one.dim() > 1 else one.isfinite()
            for one in rows.values()
        ]
    ).all(0)
    if finite.all():
        return rows
    say(f"{int((~finite).sum())} rows are not finite and left out")
    return {name: one[finite] for name, one in rows.items()}


def by_layer(rows: Mapping[str, Tensor], prefix: str = LAYER) -> dict[int, Tensor]:
    """The tensors whose names are `prefix` and a layer, by layer, ascending."""
    found = {int(n.removeprefix(prefix)): one for n, one in rows.items() if n.startswith(prefix)}
    return dict(sorted(found.items()))
