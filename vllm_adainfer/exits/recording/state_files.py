"""Files of the states of whole prompts, which memory has no room for."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_adainfer.arrays import Ints
from vllm_adainfer.errors import AdaInferError

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
    """Writes the states of each prompt's tokens as they come, a file for each layer.

    Attributes:
        layers: those after which states are kept.

    """

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
