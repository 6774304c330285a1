"""What `gpu_model.py` assumes of an H100, of vLLM and of our own code, each with its source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.offline.llama_shapes import VOCABULARY

MICRO = 1e-6
SHEET = "data sheet of the H100 SXM"
CHECK = "desk check of vLLM 0.32's source, an estimate"
PART = "the same; of 1.0 to 1.5 ms for 64 requests, split here"
GUESS = "guessed"
ASSUMED: dict[str, tuple[float, str]] = {
    "TFLOP/s in bf16": (989.4, SHEET),
    "TB/s of the memory": (3.35, SHEET),
    "GB/s of NVLink each way": (450, SHEET),
    "share of the peak of products": (0.65, GUESS),
    "share of the peak of memory": (0.80, GUESS),
    "kernels of a layer": (10, "norms, products, rotary, cache, attention, activation"),
    "us of a kernel inside a graph, beside its work": (1.5, GUESS),
    "us of a kernel outside a graph": (3.0, GUESS),
    "us from a launch to its start": (4.0, GUESS),
    "us of a small upload": (5.0, GUESS),
    "us of a collective of ranks": (9.0, GUESS),
    "us of the device's work on inputs and samples": (80.0, GUESS),
    "launches of an attention builder": (3, CHECK),
    "us of a read, once the device has come there": (15.0, GUESS),
    "us of the same if the host polls pinned memory": (3.0, GUESS),
    "us of a branch in a graph, decided on the device": (3.0, GUESS),
    "host us of the scheduler and of outputs": (200.0, PART),
    "the same for each request": (4.0, PART),
    "host us of a message to ranks": (50.0, GUESS),
    "host us of inputs": (350.0, PART),
    "inputs, for each request": (2.0, PART),
    "host us of logits and samples": (150.0, PART),
    "host us of describing a step": (20.0, CHECK),
    "describing, for each request": (1.1, CHECK),
    "host us of a decode batch put into the graphs' buffers": (60.0, CHECK),
    "host us of a graph's launch": (8.0, CHECK),
    "host us of a layer between piecewise graphs": (35.0, GUESS),
    "host us of a layer outside graphs": (75.0, CHECK),
    "host us of a cut of a decode batch": (175.0, CHECK),
    "host us of a cut of prompts": (200.0, CHECK),
    "the same for 1000 rows": (10.0, CHECK),
    "host us of answers after a cut": (30.0, CHECK),
    "rows of the largest captured graph": (512, "vLLM's default"),
    "rows between captured sizes": (16, "vLLM's default, for the larger ones"),
}


def us(name: str) -> float:
    """Seconds of an assumption in microseconds."""
    return MICRO * ASSUMED[name][0]


def number(name: str) -> float:
    """An assumption."""
    return ASSUMED[name][0]


def outside_graphs(asked: dict[str, int], launches: float = 0) -> float:
    """Seconds on the device of what `Launches.asked` counts, and of some more launches.

    Reads are no work of the device.
    """
    kernels = (asked["launches"] + launches) * us("us of a kernel outside a graph")
    return kernels + asked["uploads"] * us("us of a small upload")


@dataclass(frozen=True)
class Llama:
    """One rank's part of a model, which is spread over so many."""

    shape: dict[str, Any]
    ranks: int

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(self.shape["num_hidden_layers"])

    @property
    def kv_width(self) -> int:
        """Numbers that a token has in the cache of a layer."""
        return 2 * int(self.shape["num_key_value_heads"] * self.shape["head_dim"]) // self.ranks

    @property
    def layer_weights(self) -> int:
        """Numbers in the products of a layer."""
        hidden, inner = self.shape["hidden_size"], self.shape["intermediate_size"]
        heads = self.shape["num_attention_heads"] * self.shape["head_dim"]
        attention = hidden * (2 * heads) + hidden * self.kv_width * self.ranks
        return int((attention + 3 * hidden * inner) // self.ranks)

    def layer(self, rows: float, attended: float, requests: float) -> float:
        """Seconds of a layer for so many rows of requests, which attend to so many tokens each."""
        weights, hidden = self.layer_weights, self.shape["hidden_size"]
        heads = self.shape["num_attention_heads"] * self.shape["head_dim"] // self.ranks
        cache = requests * attended * self.kv_width  # rows of a prompt share their reads
        seconds = self._products(
            2 * rows * weights + 4 * rows * attended * heads, weights + cache + 8 * rows * hidden
        )
        gaps = number("kernels of a layer") * us("us of a kernel inside a graph, beside its work")
        return seconds + gaps + self.collectives(2, rows)

    def collectives(self, count: int, rows: float) -> float:
        """Seconds of `count` sums over ranks."""
        if self.ranks == 1:
            return 0.0
        sent = 2 * rows * self.shape["hidden_size"] * 2 * (self.ranks - 1) / self.ranks
        wire = sent / (1e9 * number("GB/s of NVLink each way"))
        return count * (us("us of a collective of ranks") + wire)

    def head(self, rows: float) -> float:
        """Seconds of the LM head."""
        weights = VOCABULARY * self.shape["hidden_size"] // self.ranks
        return self._products(2 * rows * weights, weights)

    def _products(self, operations: float, numbers: float) -> float:
        """Seconds of so many operations on so many numbers of two bytes."""
        flops = 1e12 * number("TFLOP/s in bf16") * number("share of the peak of products")
        bandwidth = 1e12 * number("TB/s of the memory") * number("share of the peak of memory")
        return max(operations / flops, 2 * numbers / bandwidth)


@dataclass(frozen=True)
class Counted:
    """Of our own code: counted by `benchmarks/common/budgets.py`, and timed here.

    Attributes:
        staging: device seconds to put a decode batch into the graphs' buffers.
        question: device seconds of the readout at an exit point.
        cut: device seconds of picking rows and states where some leave, without attention.
        tables: device seconds of a compacted batch's attention metadata.
        ask: host seconds of Python at an exit point, before the read.
        decide: host seconds of Python after it.

    """

    staging: float
    question: float
    cut: float
    tables: float
    ask: float
    decide: float
