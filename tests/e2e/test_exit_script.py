"""Scripted exits, which benchmarks rely on: requests run the layers they were told to run."""

from __future__ import annotations

from collections import Counter

from tests.e2e.test_equal_to_stock import LENGTHS, answer
from tests.tiny import LAYERS
from vllm_adainfer.policy.script import SCRIPT_LABELS

SCRIPT = (0, 3)


def test_requests_leave_where_the_script_says(tiny_model):
    leave = [0, None, 3, 0, 3]
    params = [
        {
            "temperature": 0,
            "max_tokens": 1,
            "allowed_token_ids": list(SCRIPT_LABELS),
            "extra_args": {} if layer is None else {"adainfer_exit": layer},
        }
        for layer in leave
    ]
    found = answer(
        tiny_model,
        params,
        {},
        enforce_eager=True,
        max_num_batched_tokens=512,
        additional_config={"adainfer": {"exit_script": SCRIPT, "min_rows_saved": 1}},
    )
    depths = [LAYERS if layer is None else layer for layer in leave]
    stats = found["stats"]
    assert stats["exit_histogram"] == {str(d): n for d, n in sorted(Counter(depths).items())}
    assert stats["layers_run"] == sum(d * n for d, n in zip(depths, LENGTHS, strict=True))
    assert all(given["tokens"][0] in SCRIPT_LABELS for given in found["answers"])
