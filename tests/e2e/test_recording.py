"""What is recorded inside vLLM is what transformers' hidden states give."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adainfer_kernels import normed
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import tiny_engine
from tests.e2e.asking import ask, greedy
from tests.e2e.oracle import hidden_states
from tests.tiny import LAYERS
from vllm_adainfer import stats
from vllm_adainfer.exits.recording.moments import DECISION_ROW_WEIGHT, STRIDE, Moments
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.calibration.record.collect import Plan, record
from vllm_adainfer.settings.instruments import ROW_ARG

RECORDED = (0, 5)
FOLDS, FITTED = 3, 9
# Longer than a step (128 rows), of one row, and all that lies between.
LENGTHS = (7, 1, 150, 23, 40, 64, 3, 90, 12, 33, 70, 5)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(5, 1000, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def recorded(
    tiny_model: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The record, and the engine's counters."""
    path = tmp_path_factory.mktemp("record")
    lens = {"folds": FOLDS, "prompts": FITTED}
    switch = {"record": [*RECORDED, LAYERS], "record_lens": lens}
    engine = tiny_engine(tiny_model, switch, max_model_len=256, kv_cache_memory_bytes=64 << 20)
    params = [greedy(extra_args={ROW_ARG: row}) for row in range(len(prompts))]
    ask(engine, prompts, params)
    engine.collective_rpc("adainfer_take_record", args=(str(path),))
    taken = load_file(path / "000001.safetensors") | load_file(path / "sums.safetensors")
    return taken, stats(engine)


@pytest.fixture(scope="module")
def states(reference: Any, prompts: list[list[int]]) -> list[list[Tensor]]:
    return [hidden_states(reference, prompt) for prompt in prompts]


@pytest.mark.parametrize("layer", [*RECORDED, LAYERS])
def test_the_states_of_decision_rows_are_kept_with_their_prompt_and_position(
    recorded, states, layer
):
    record, _ = recorded
    places = list(zip(record["tags"].tolist(), record["positions"].tolist(), strict=True))
    assert sorted(places) == [(tag, length - 1) for tag, length in enumerate(LENGTHS)]
    right = torch.stack([states[tag][layer][position] for tag, position in places])
    name = "final" if layer == LAYERS else f"layer.{layer}"
    torch.testing.assert_close(record[name], right, rtol=1e-3, atol=1e-3)


def by_rows(states: list[list[Tensor]], layer: int, fold: int) -> Moments:
    """Moments of one fold, row by row; prompts from `FITTED` on are held out."""
    moments = Moments.zeros(64, 64)
    for tag in range(fold, FITTED, FOLDS):
        length = len(states[tag][layer])
        for position in range(length):
            last = position == length - 1
            if not last and (position == 0 or (tag + position) % STRIDE):
                continue
            x, final = (states[tag][n][position].double().unsqueeze(0) for n in (layer, LAYERS))
            moments.add(x, final - x, torch.tensor([DECISION_ROW_WEIGHT if last else 1.0]))
    return moments


@pytest.mark.parametrize("fold", range(FOLDS))
@pytest.mark.parametrize("layer", RECORDED)
def test_the_sums_for_a_lens_are_over_the_rows_of_fitted_prompts(recorded, states, layer, fold):
    right = by_rows(states, layer, fold)
    for field in fields(Moments):
        found = recorded[0][f"lens.{layer}.{fold}.{field.name}"]
        expected = getattr(right, field.name)
        tolerance = 1e-3 * float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=tolerance)


def test_recording_runs_every_layer_for_every_row_and_counts_it(recorded):
    _, counted = recorded
    assert counted["layers_run"] == counted["layers_possible"] == sum(LENGTHS) * LAYERS
    assert counted["tokens_decided"] == len(LENGTHS)
    assert counted["exit_histogram"] == {LAYERS: len(LENGTHS)}


POOLED_FROM = 40


def alike(generator: np.random.Generator) -> list[list[int]]:
    """Prompts that are longer than a step (128 rows) or shorter, and begin alike.

    The first ones share `POOLED_FROM` tokens; others 100, or all.
    """
    head = generator.integers(5, 1000, 100).tolist()
    few, many = (
        [[*head[:shared], *generator.integers(5, 1000, own).tolist()] for own in (1, 50, 220)]
        for shared in (POOLED_FROM, len(head))
    )
    own = [generator.integers(5, 1000, length).tolist() for length in (41, 128, 129, 300)]
    return [*few, *many, *own, *many, *few]


OF_EACH_TOKEN = 3  # the layer


def test_a_prompt_is_recorded_with_all_of_its_rows_whatever_was_cached(
    tiny_model, reference, tmp_path
):
    """Their mean, or after one layer each of them."""
    prompts = alike(np.random.default_rng(1))
    switch = {
        "record": [*sorted([*RECORDED, OF_EACH_TOKEN]), LAYERS],
        "record_pooled_from": POOLED_FROM,
        "record_states": {"layers": [OF_EACH_TOKEN], "directory": str(tmp_path)},
    }
    engine = tiny_engine(tiny_model, switch, max_model_len=512, kv_cache_memory_bytes=64 << 20)
    examples = [Example("", "", prompt, None) for prompt in prompts]
    recording = record(engine, examples, Plan(RECORDED))
    assert recording.computed.min() <= 32, "some prompts must have found others cached"
    for file in tmp_path.iterdir():
        file.unlink()  # what is mapped stays
    for place, prompt in enumerate(prompts):
        states = hidden_states(reference, prompt)
        for layer in RECORDED:
            own = states[layer] / (states[layer].square().mean(1, keepdim=True) + 1e-6).sqrt()
            right = torch.cat([own[-1], own[POOLED_FROM:].mean(0)])
            read = recording.read_by_probe(layer, np.array([place]), pooled=True)[0]
            torch.testing.assert_close(read, right, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(normed(recording.states[layer][[place]])[0], own[-1])
        [found] = recording.own_states.of(OF_EACH_TOKEN, np.array([place]))
        right = states[OF_EACH_TOKEN][POOLED_FROM:]
        torch.testing.assert_close(found, right, rtol=1e-3, atol=1e-3)
