"""What the full model did with some prompts: its states, answers and times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import adainfer_kernels
import numpy as np
import torch
from adainfer_kernels import Head, Norm
from adainfer_kernels.pooling import EPS
from torch import Tensor

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.artifact.engine_options import EngineOptions
from vllm_adainfer.exits.recording.moments import Moments
from vllm_adainfer.offline.calibration.record.own_states import OwnStates
from vllm_adainfer.policy.probe import Probe

FOLDS = 5


@dataclass(frozen=True)
class Recording:
    """The full model's states and answers on some prompts, and its times.

    Attributes:
        states: layer -> [rows, hidden size], the residual stream of the decision rows: the rows
            that yield a token, sorted by prompt and by position.
        depth: the number of layers of the model.
        final: [rows, hidden size], the residual stream after the last layer, before the final norm.
        tokens: int64 [rows], the full model's answers.
        prompts: int64 [rows], the prompt of each row.
        computed: [rows], the tokens that the layers ran for each: for a text's first token, those
            of its prompt that were not in the prefix cache; one for each later token.
        moments: layer -> for each fold, sums over all rows of the prompts that a tuned lens may
            learn from (see `TunedLensSums`); the target is the change until the last layer.
        logit_lens: the model's final norm and its whole LM head.
        fingerprint: the fingerprint of the weights.
        engine_options: how vLLM ran them.
        layer_seconds: time of one layer for one token.
        means: layer -> fp32 [rows, hidden size], the mean of the normed states of each row's
            prompt; empty if none are recorded.
        own_states: the states of all tokens of each prompt; None if they are not recorded.
        pool_seconds: time to take that mean at one layer, for one token.
        cut_seconds: time of cutting the batch, for one token of it.
        threads: the number of threads in the process that ran the model.
        own_kv_layers: the number of layers that write keys and values.
        fewer: times of layers with fewer rows, see `Timings` of the recording loop.
        soft_cap: the soft cap of the logits, after the head; None for none.
        scale: the scale of the logits, after the cap.
        folds: int64 [prompts], in 0 to `FOLDS`; None: prompt i is in fold i % FOLDS, as its rows
            in `moments` are.

    """

    states: dict[int, Tensor]
    depth: int
    final: Tensor
    tokens: Ints
    prompts: Ints
    computed: Floats
    moments: dict[int, list[Moments]]
    logit_lens: Probe
    fingerprint: str
    layer_seconds: float
    cut_seconds: float
    threads: int
    own_kv_layers: int
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    soft_cap: float | None = None
    scale: float = 1.0
    means: Mapping[int, Tensor] = field(default_factory=dict)
    own_states: OwnStates | None = None
    pool_seconds: float = 0.0
    fewer: Sequence[Sequence[tuple[float, float]]] = ()
    folds: Ints | None = None

    def read_by_probe(self, layer: int, rows: Ints, pooled: bool) -> Tensor:
        """What a probe after `layer` reads of decision `rows`, see `UndecidedRows.hidden`."""
        states = self.states[layer][rows]
        if not pooled:
            return states
        return torch.cat([normed(states), self.means[layer][rows]], dim=1)

    def as_served(self, head: Head) -> Head:
        """Rows of the model's own head with the soft cap and the scale that vLLM applies."""
        return replace(head, soft_cap=self.soft_cap, scale=self.scale)

    def folds_of(self, rows: Ints) -> Ints:
        """The fold of each of decision `rows`."""
        prompts = self.prompts[rows]
        return prompts % FOLDS if self.folds is None else self.folds[prompts]

    def rows_of(self, prompts: Ints) -> Ints:
        """The decision rows of `prompts`, in the order of `prompts`."""
        order = np.full(self.prompts.max() + 1, -1)
        order[prompts] = np.arange(len(prompts))
        place = order[self.prompts]
        rows = np.flatnonzero(place >= 0)
        sorted_rows: Ints = rows[np.argsort(place[rows], kind="stable")]
        return sorted_rows


def normed(states: Tensor) -> Tensor:
    """fp32 [rows, hidden size], the states as `adainfer_kernels.pool` norms them."""
    return adainfer_kernels.readout(states, Norm("rms", eps=EPS), dtype=torch.float32)
