from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_adainfer.exits.batch.hidden_states import HiddenStates
from vllm_adainfer.exits.kv.policies import FIRST_SIZE, RowPool


def stream_of(values: list[int], parts: int) -> HiddenStates:
    """Rows [1] that are their values, in one part or in two."""
    hidden = torch.tensor(values, dtype=torch.float32).unsqueeze(1)
    return HiddenStates(hidden, None if parts == 1 else -hidden)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("seed", range(5))
def test_rows_come_out_as_they_went_in_however_many_there_are(parts, seed):
    generator, pool = np.random.default_rng(seed), RowPool()
    kept: list[tuple[np.ndarray, list[int]]] = []
    for number in range(60):
        if kept and generator.random() < 0.45:
            places, values = kept.pop(int(generator.integers(len(kept))))
            found = pool.take(places)
            assert found.hidden.flatten().tolist() == values
            assert parts == 1 or found.residual.flatten().tolist() == [-v for v in values]
            continue
        values = [1000 * number + v for v in range(int(generator.integers(1, FIRST_SIZE)))]
        places = pool.free_places(len(values))
        pool.put(stream_of(values, parts), torch.from_numpy(places))
        kept.append((places, values))
    assert pool.taken == sum(len(values) for _, values in kept)


def test_places_are_used_again():
    pool = RowPool()
    for _ in range(100):
        places = pool.free_places(FIRST_SIZE)
        pool.put(stream_of([1] * FIRST_SIZE, 2), torch.from_numpy(places))
        assert places.max() < FIRST_SIZE
        assert pool.take(places).num_rows == FIRST_SIZE
