"""Rows: what the full model did with some prompts, the model that did it, and files of rows.

A folder of files, see `RowRecorder`, is what policies are made from.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adainfer_kernels import Head, normed
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.artifact.tensors import UNREADABLE
from vllm_adainfer.exits.recording.moments import Moments
from vllm_adainfer.exits.recording.recorder import MEAN
from vllm_adainfer.offline.progress import say
from vllm_adainfer.policy.probe import Probe

FOLDS = 5
LAYER = "layer."
WHOLE = 0.9  # of the rows have means, or whole prompts are not read


@dataclass(frozen=True)
class ServedModel:
    """The model that has answered: its head, and how fast it is on this machine.

    Attributes:
        depth: the number of layers.
        own_kv_layers: how many of them write keys and values.
        logit_lens: what reads the last states: the final norm, unless they are normed, and the
            whole LM head.
        fingerprint: the fingerprint of the weights.
        layer_seconds: time of one layer for one token.
        cut_seconds: time of cutting the batch, for one token of it.
        pool_seconds: time to take the mean over a prompt at one layer, for one token.
        fewer: times of layers with fewer rows, see `Timings` of the recording loop.
        between_seconds: time of the host between the layers of two steps.
        label_head_seconds: time of a label head for one prompt, see `label_head_seconds` of the
            worker; empty where the process that fits can time its probes itself.
        device: the type of the device that runs it.
        threads: the number of threads in the process that runs it.
        engine_options: how vLLM runs it.
        soft_cap: the soft cap of the logits, after the head; None for none.
        scale: the scale of the logits, after the cap.

    """

    depth: int
    own_kv_layers: int
    logit_lens: Probe
    fingerprint: str
    layer_seconds: float
    cut_seconds: float
    pool_seconds: float = 0.0
    fewer: Sequence[Sequence[tuple[float, float]]] = ()
    between_seconds: float = 0.0
    label_head_seconds: Mapping[str, float] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    soft_cap: float | None = None
    scale: float = 1.0

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any], logit_lens: Probe) -> ServedModel:
        """The model that its worker has described; see `model_facts` of the worker.

        A LookupError, TypeError or ValueError if the facts are not those of a model.
        """
        own = {one.name: facts[one.name] for one in fields(cls) if one.name in facts}
        options = EngineOptions.model_validate(facts["engine_options"])
        return cls(**{**own, "engine_options": options, "logit_lens": logit_lens})

    def as_served(self, probe: Probe) -> Probe:
        """A probe of the model's own head with the soft cap and the scale that vLLM applies."""
        head: Head = replace(probe.head, soft_cap=self.soft_cap, scale=self.scale)
        return replace(probe, head=head)


@dataclass(frozen=True)
class OwnStates:
    """The states that branches read, see `PooledPrompts.read_states`.

    Attributes:
        rows: layer -> [tokens of all prompts, hidden size], the residual stream.
        starts: [prompts], the first row of each.
        ends: [prompts], the row after its last.

    """

    rows: Mapping[int, Tensor]
    starts: Ints
    ends: Ints

    def of(self, layer: int, prompts: Ints) -> list[Tensor]:
        """The states after `layer` [tokens, hidden size] of each of `prompts`, not yet read."""
        spans = zip(self.starts[prompts].tolist(), self.ends[prompts].tolist(), strict=True)
        return [self.rows[layer][start:end] for start, end in spans]


@dataclass(frozen=True)
class Rows:
    """The full model's states and answers on some prompts.

    Attributes:
        model: the model.
        states: layer -> [rows, hidden size], the residual stream of the decision rows: the rows
            that yield a token, sorted by prompt and by position. Of objects [rows, fields, hidden
            size], those at which each field is decided.
        final: [rows, head size], or of objects [rows, fields, head size], after the last layer:
            what the model's `logit_lens` reads.
        tokens: int64 [rows], the full model's answers; of objects their numbers, see `ByField`.
        prompts: int64 [rows], the prompt of each row.
        computed: [rows], the tokens that the layers ran for each: for a text's first token, those
            of its prompt that were not in the prefix cache; one for each later token.
        means: layer -> fp32 [rows, hidden size], the mean of the normed states of each row's
            prompt; empty if none are recorded.
        moments: layer -> for each fold, sums over all rows of the prompts that a tuned lens may
            learn from (see `TunedLensSums`); the target is the change until the last layer.
        own_states: the states of all tokens of each prompt; None if they are not recorded.
        values: of objects, fp32 [rows, values of all fields], how probable full depth finds each
            value of a field as it writes the object, see `values_of_answers`; None for others.

    """

    model: ServedModel
    states: Mapping[int, Tensor]
    final: Tensor
    tokens: Ints
    prompts: Ints
    computed: Floats
    means: Mapping[int, Tensor] = field(default_factory=dict)
    moments: Mapping[int, Sequence[Moments]] = field(default_factory=dict)
    own_states: OwnStates | None = None
    values: Tensor | None = None

    def read_by_probe(self, layer: int, rows: Ints, pooled: bool) -> Tensor:
        """What a probe after `layer` reads of decision `rows`, see `UndecidedRows.hidden`."""
        states = self.states[layer][rows]
        if not pooled:
            return states
        means, own = self.means[layer][rows], normed(states.flatten(0, -2)).view(states.shape)
        if own.dim() == 3:  # of each field, and of the prompt that all of them are about
            means = means.unsqueeze(1).expand_as(own)
        return torch.cat([own, means], dim=-1)

    def of(self, prompts: Ints) -> Ints:
        """The decision rows of `prompts`, in the order of `prompts`."""
        order = np.full(self.prompts.max() + 1, -1)
        order[prompts] = np.arange(len(prompts))
        place = order[self.prompts]
        rows = np.flatnonzero(place >= 0)
        sorted_rows: Ints = rows[np.argsort(place[rows], kind="stable")]
        return sorted_rows


def own_states_of(
    files: Mapping[int, str], sums: Mapping[str, Tensor], like: Tensor, prompts: int
) -> OwnStates | None:
    """Those in `files`, by layer, of so many prompts; None if there are no files.

    A prompt without tokens of its own has none. Files that are deleted then live on until these
    states are dropped. `sums` are from `StateFiles.take`; a state has the width and dtype of `like`
    [rows, hidden size].
    """
    if not files:
        return None
    tags, lens = sums["states.tags"].numpy(), sums["states.lens"].numpy()
    starts, ends = np.zeros((2, prompts), dtype=np.int64)
    ends[tags] = np.cumsum(lens)
    starts[tags] = ends[tags] - lens
    rows, tokens = {}, int(lens.sum())
    for layer, file in files.items():
        width, flat = like.shape[1], like.new_empty(0)
        if tokens:  # an empty file cannot be mapped
            flat = torch.from_file(file, size=tokens * width, dtype=like.dtype)
        rows[layer] = flat.view(tokens, width)
    return OwnStates(rows, starts, ends)


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

    An OSError, RuntimeError or SafetensorError if a file cannot be read.
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


def of_one_input(rows: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
    """The rows that have means, and that they do; or all rows without means, if fewer have some.

    Those are missing where earlier requests have left a part of a prompt in the prefix cache.
    """
    means = [name for name in rows if name.startswith(MEAN)]
    whole = torch.ones(len(rows["final"]), dtype=torch.bool)
    for name in means:
        whole &= rows[name].isfinite().all(1)
    if means and whole.float().mean() >= WHOLE:
        return {name: one[whole] for name, one in rows.items()}, True
    return {name: one for name, one in rows.items() if name not in means}, False


def by_layer(rows: Mapping[str, Tensor], prefix: str = LAYER) -> dict[int, Tensor]:
    """The tensors whose names are `prefix` and a layer, by layer, ascending."""
    found = {int(n.removeprefix(prefix)): one for n, one in rows.items() if n.startswith(prefix)}
    return dict(sorted(found.items()))
