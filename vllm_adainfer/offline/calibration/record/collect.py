"""Collect: run prompts at full depth in vLLM and record the states that probes are fitted on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import adainfer_kernels
import numpy as np
import torch
from adainfer_kernels import Head, Norm
from adainfer_kernels.pooling import EPS
from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.arrays import Floats, Ints
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.recording.moments import Moments
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.asking import best_column, greedy, scores_of
from vllm_adainfer.offline.calibration.record.engine import start_engine, stop_engine
from vllm_adainfer.offline.calibration.record.own_states import OwnStates, own_states_of
from vllm_adainfer.offline.progress import progress
from vllm_adainfer.policy.probe import Probe, logit_lens_of
from vllm_adainfer.settings.instruments import ROW_ARG

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest


FOLDS = 5
# Tensors with a row for each decision row, or for each prompt of which all states are kept.
RECORDED = ("layer.", "mean.", "tags", "positions", "states.")


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


@contextmanager
def recording_engine(
    model: str,
    hf_config: Any,
    examples: Sequence[Example],
    layers: Sequence[int],
    lens_prompts: int = 0,
    max_tokens: int = 1,
    pooled_from: int | None = None,
    branches: Sequence[int] = (),
    **settings: Any,
) -> Iterator[LLM]:
    """An engine for `record` that keeps the states after `layers`; see `start_engine`.

    With `pooled_from` also the mean of each prompt's states from that position on, or after
    `branches` each of these states. The rows of the
    first `lens_prompts` prompts are summed for tuned lenses. Rows in the prefix cache are not run
    again, so a shared prefix counts once.
    """
    switch: dict[str, Any] = {"record": [*layers, hf_config.num_hidden_layers]}
    if lens_prompts:
        switch["record_lens"] = {"folds": FOLDS, "prompts": lens_prompts}
    if pooled_from is not None:
        switch["record_pooled_from"] = pooled_from
    with tempfile.TemporaryDirectory() as directory:
        if branches:
            switch["record_states"] = {"layers": [*branches], "directory": directory}
        engine = start_engine(model, examples, switch, max_tokens, **settings)
        try:
            yield engine
        finally:
            stop_engine(engine)


def _recorded(prompts: Iterable[Any] | None = None, **options: Any) -> Any:
    """The progress bar of vLLM, which calls this to render prompts and again to run them."""
    return progress(**{**options, "desc": "record"}) if prompts is None else prompts


def record(
    engine: LLM,
    examples: Sequence[Example],
    labels: Sequence[int],
    layers: Sequence[int],
    max_tokens: int = 1,
    adapter: LoRARequest | None = None,
) -> Recording:
    """Run `examples` through an engine of `recording_engine`; each token is a decision row.

    Args:
        engine: an engine from `recording_engine`.
        examples: the prompts.
        labels: the token ids that answers are restricted to, if any; an example's own come first.
        layers: the candidate exit points of the engine.
        max_tokens: tokens to generate after a prompt, unless the text ends earlier.
        adapter: the LoRA adapter of all prompts; None for the base model.

    Raises:
        AdaInferError: a token was not recorded.

    """
    engine.reset_prefix_cache()

    classifies = engine.llm_engine.model_config.runner_type == "pooling"

    def run(rows: Sequence[int], reuse_prefixes: bool) -> list[Any]:
        prompts = [{"prompt_token_ids": examples[row].token_ids} for row in rows]
        if classifies:
            scored = [scores_of({ROW_ARG: row}, reuse_prefixes) for row in rows]
            return engine.encode(prompts, scored, pooling_task="classify", use_tqdm=_recorded)
        return engine.generate(
            prompts,
            [
                greedy(examples[row].labels or labels, {ROW_ARG: row}, max_tokens, reuse_prefixes)
                for row in rows
            ],
            lora_request=adapter,
            use_tqdm=_recorded,
        )

    outputs = run(range(len(examples)), reuse_prefixes=True)
    tensors, facts = _take(engine)
    if again := _not_seen_whole(tensors):
        # They share more than all prompts do, so some of their states were in the prefix cache.
        run(again, reuse_prefixes=False)
        more, _ = _take(engine)
        tensors |= {
            name: torch.cat([tensors[name], more[name]])
            for name in more
            if name.startswith(RECORDED)
        }
    depth = max(map(int, _named(tensors, "layer.")))
    has_lens = bool(_named(tensors, "lens."))
    texts = [
        [best_column(output.outputs.data)] if classifies else list(output.outputs[0].token_ids)
        for output in outputs
    ]
    rows = torch.from_numpy(
        rows_of_tokens(
            tensors["tags"].numpy(),
            tensors["positions"].numpy(),
            [len(example.token_ids) for example in examples],
            [len(text) for text in texts],
        )
    )
    return Recording(
        states={layer: tensors[f"layer.{layer}"][rows] for layer in layers},
        depth=depth,
        final=tensors[f"layer.{depth}"][rows],
        tokens=np.concatenate(texts),
        prompts=np.repeat(np.arange(len(examples)), [len(text) for text in texts]),
        computed=np.concatenate(
            [
                [len(example.token_ids) - (output.num_cached_tokens or 0)] + [1] * (len(text) - 1)
                for example, output, text in zip(examples, outputs, texts, strict=True)
            ]
        ).astype(np.float64),
        moments={layer: _folds(tensors, layer) for layer in layers} if has_lens else {},
        means={int(layer): mean[rows] for layer, mean in _named(tensors, "mean.").items()},
        own_states=own_states_of(facts["states"], tensors, len(examples)),
        pool_seconds=facts["pool_seconds"] / max(1, facts["pooled_rows"]),
        logit_lens=logit_lens_of(_named(tensors, "logit_lens."), facts["norm"]),
        fingerprint=facts["fingerprint"],
        layer_seconds=facts["layer_seconds"] / facts["layers_run"],
        cut_seconds=facts["cut_seconds"] / max(1, facts["rows"]),
        fewer=facts["fewer"],
        own_kv_layers=facts["own_kv_layers"],
        threads=facts["threads"],
        soft_cap=facts["soft_cap"],
        scale=facts["scale"],
    )


def _take(engine: LLM) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the engine has recorded since it was last asked; see `adainfer_take_record`."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "record.safetensors"
        [facts] = engine.collective_rpc("adainfer_take_record", args=(str(path),))
        return load_file(path), facts


def _not_seen_whole(record: Mapping[str, Tensor]) -> list[int]:
    """Record rows of prompts of which some states never ran, though all are to be read."""
    tags, whole = record["tags"], record.get("states.tags")
    if whole is not None:
        return tags[~torch.isin(tags, whole)].tolist()
    means = [record[name] for name in record if name.startswith("mean.")]
    return tags[means[0].isnan().any(dim=1)].tolist() if means else []


def rows_of_tokens(
    tags: Ints, positions: Ints, prompt_lens: Sequence[int], text_lens: Sequence[int]
) -> Ints:
    """The recorded row that decided each token, sorted by text and by position.

    The last row of the prompt decides a text's first token. A text may have rows beyond its end: if
    steps are scheduled ahead, one more has begun when the last token is known. Of a row that ran
    twice, because of a preemption, the second run counts.

    Args:
        tags: [rows], the text (an index) of each recorded row, in the order they were run.
        positions: [rows], the position of each row in its sequence.
        prompt_lens: [texts], tokens of each prompt.
        text_lens: [texts], tokens generated after it.

    Raises:
        AdaInferError: a token has no row.

    """
    row_at = {
        place: row for row, place in enumerate(zip(tags.tolist(), positions.tolist(), strict=True))
    }
    wanted = [
        (text, prompt + number - 1)
        for text, (prompt, tokens) in enumerate(zip(prompt_lens, text_lens, strict=True))
        for number in range(tokens)
    ]
    missing = [place for place in wanted if place not in row_at]
    if missing:
        text, position = missing[0]
        raise AdaInferError(
            f"{len(missing)} of {len(wanted)} generated tokens were not recorded, the first is "
            f"token {position - prompt_lens[text] + 2} after prompt {text + 1}: this is a bug in "
            "vllm-adainfer or in vLLM's scheduling; please report it with the command"
        )
    return np.array([row_at[place] for place in wanted], dtype=np.int64)


def normed(states: Tensor) -> Tensor:
    """fp32 [rows, hidden size], the states as `adainfer_kernels.pool` norms them."""
    return adainfer_kernels.readout(states, Norm("rms", eps=EPS), dtype=torch.float32)


def _named(record: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `prefix`, without it."""
    return {name.removeprefix(prefix): t for name, t in record.items() if name.startswith(prefix)}


def _folds(record: dict[str, Tensor], layer: int) -> list[Moments]:
    """The moments of one layer by fold; `TunedLensSums.take` names their parts."""
    names = [field.name for field in fields(Moments)]
    return [
        Moments(**{name: record[f"lens.{layer}.{fold}.{name}"] for name in names})
        for fold in range(FOLDS)
    ]
