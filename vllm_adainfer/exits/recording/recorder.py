"""The recorder: keeps, while the layers run, what calibration learns from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.loop.loop import StateKeeper
from vllm_adainfer.exits.loop.step import RecordedRequests
from vllm_adainfer.exits.recording.moments import TunedLensSums
from vllm_adainfer.transfers import HostCopy

GIB = 1 << 30


def check_room(directory: str, tokens: int, hidden_size: int, layers: Sequence[int]) -> None:
    """Check that `directory` has room for the states of so many tokens after `layers`."""
    needed = 2 * tokens * hidden_size * len(layers)  # bytes, in bfloat16
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise AdaInferError(
            f"branches learn from the states of all tokens after layers "
            f"{', '.join(map(str, layers))}, which take {needed / GIB:.1f} GiB, and the disk of "
            f"{directory} has {free / GIB:.1f} GiB free: set TMPDIR to a folder with room, or give "
            "fewer --exit-points, or --probe pooled-label-head, which needs no files"
        )


class StateFiles:
    """Writes the states of each prompt's tokens after `layers`, a file for each layer."""

    def __init__(self, directory: str, layers: Sequence[int]) -> None:
        """Write to `directory`, which exists."""
        self.layers = layers
        self._directory = directory
        self._tags: list[Tensor] = []
        self._lens: list[Tensor] = []

    @property
    def by_layer(self) -> dict[int, str]:
        """The file of each layer: the bytes of its states, row after row."""
        return {layer: f"{self._directory}/layer.{layer}" for layer in self.layers}

    def add(self, layer: int, states: Tensor) -> None:
        """Add the states [tokens, hidden size] of some prompts after `layer`, in their dtype."""
        with open(self.by_layer[layer], "ab") as file:
            states.cpu().contiguous().view(torch.uint8).numpy().tofile(file)

    def added(self, tags: Ints, lens: Ints) -> None:
        """Note which prompts were added at all layers, by record row, and the tokens of each."""
        self._tags.append(torch.from_numpy(tags))
        self._lens.append(torch.from_numpy(lens))

    def take(self) -> dict[str, Tensor]:
        """Return int64 [prompts] ``states.tags`` and ``states.lens`` of all so far, in order."""
        return {"states.tags": torch.cat(self._tags), "states.lens": torch.cat(self._lens)}


MEAN = "mean."  # what the mean at a layer is named by
CHUNK = 64  # rows, in which states of served requests go to the host


class RowRecorder:
    """Collects rows: named tensors with a row for each request.

    ``layer.<n>`` [rows, hidden size] is the state after a layer, and ``final`` what the model's
    `logit_lens` reads of the last one. Others say which row it is.
    """

    def __init__(self) -> None:
        """Begin without rows."""
        self._parts: dict[str, list[Tensor]] = {}

    def add(self, layers: Sequence[int], states: Sequence[Tensor], **others: Tensor) -> None:
        """Add rows with their `states`: after each of `layers`, and last the final ones."""
        names = [*(f"layer.{layer}" for layer in layers), "final"]
        for name, part in {**dict(zip(names, states, strict=True)), **others}.items():
            self._parts.setdefault(name, []).append(part)

    def take(self) -> dict[str, Tensor]:
        """Return all rows in order, where they were added, and start over."""
        taken = {name: torch.cat(parts) for name, parts in self._parts.items()}
        self._parts = {}
        return taken


# Gets the names of the rows' kinds and the rows, which have int64 columns ``computed``, the token
# rows that the layers ran for each, and ``subset``, see `RecordedRequests`.
ChunkReader = Callable[[Sequence[str], Mapping[str, HostCopy]], None]


def served_recorder(layers: Sequence[int], put: ChunkReader) -> StateKeeper:
    """What keeps the states of some requests beside serving, a chunk at a time.

    `put` gets each chunk, in the thread of the step: it must not block. Means are kept in fp16.
    """
    kinds: list[str] = []
    rows = RowRecorder()

    def keep(requests: RecordedRequests, states: Sequence[Tensor], means: Sequence[Tensor]) -> None:
        nonlocal kinds
        kinds += requests.kinds
        named = {f"{MEAN}{layer}": m.half() for layer, m in zip(layers, means, strict=True)}
        computed, subset = map(torch.from_numpy, (requests.computed, requests.subsets))
        rows.add(layers, states, computed=computed, subset=subset, **named)
        if len(kinds) >= CHUNK:
            put(kinds, {name: HostCopy(one) for name, one in rows.take().items()})
            kinds = []

    return keep


class Recorder:
    """Keeps the states of decision rows after `layers`, of which the last is the model's.

    Also sums for a tuned lens if there is one to fit, and files of the states of whole prompts.
    """

    def __init__(
        self, layers: tuple[int, ...], lens: TunedLensSums | None, files: StateFiles | None = None
    ) -> None:
        """Record after each of `layers`, which end with the model's last."""
        self.layers = layers
        self.files = files
        self._lens = lens
        self._rows = RowRecorder()

    def record(
        self,
        states: Sequence[Tensor],
        record_rows: Tensor,
        positions: Tensor,
        last: Tensor,
        means: Mapping[int, Tensor] = MappingProxyType({}),
    ) -> None:
        """Record a step at full depth.

        Args:
            states: [rows, hidden size] after each of the recorded layers.
            record_rows: int64 [rows], the line of the calibration data that the row's request
                belongs to; a negative one is not recorded.
            positions: int64 [rows], the position of the row in its prompt.
            last: bool [rows], whether the row decides its request's answer.
            means: layer -> fp32 [decision rows, hidden size], the mean of the prompt's normed
                states; NaN where some of them never ran. Empty if no means are recorded.

        """
        decisions = last & (record_rows >= 0)
        self._rows.add(
            self.layers[:-1],
            [state[decisions] for state in states],
            tags=record_rows[decisions],
            positions=positions[decisions],
            **{f"{MEAN}{layer}": mean for layer, mean in means.items()},
        )
        if self._lens is not None:
            self._lens.add(states, record_rows, positions, last)

    def take(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return everything kept, and start over: decision rows, and sums.

        Rows are as in `RowRecorder`, with their ``tags`` (the record rows) and ``positions``, int64
        [rows], and ``mean.<n>`` [rows, hidden size] if means are recorded; sums those of
        `TunedLensSums.take` and `StateFiles.take`.
        """
        sums = {} if self._lens is None else self._lens.take()
        if self.files is not None:
            sums |= self.files.take()
        return {name: rows.cpu() for name, rows in self._rows.take().items()}, sums
