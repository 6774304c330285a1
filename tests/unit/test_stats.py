"""`vllm_adainfer.stats` returns what its type says."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from pydantic import ConfigDict, TypeAdapter, with_config

import vllm_adainfer
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.exits.accounting.counters import ExitStats, PolicyStats
from vllm_adainfer.stats import PolicyWork, ShadowChecks, Stats
from vllm_adainfer.watch.watch import Watch

STRICT = ConfigDict(strict=True, extra="forbid")
for typed in PolicyWork, ShadowChecks, Stats:
    with_config(STRICT)(typed)


def engine(counters: dict[str, Any]) -> Any:
    """Two ranks that count the same."""
    return SimpleNamespace(collective_rpc=lambda method: [counters, counters])


def monitor() -> Watch:
    watched = Watch((0.02, 0.05), alpha=0.1)
    watched.observe(["a", "b"], np.array([0, 1]), np.array([False, True]))
    return watched


@pytest.mark.parametrize("names", [(), ("default",), ("mood", "topic")], ids=len)
def test_the_counters_of_an_engine_have_the_keys_and_types_that_are_promised(names):
    counters = ExitStats(tokens_decided=3, shadow={name: monitor() for name in names})
    counters.by_policy["default"].exit_histogram[4] += 3
    found = vllm_adainfer.stats(engine(counters.as_dict()))
    TypeAdapter(Stats).validate_python(found)
    assert found["tokens_decided"] == 3
    assert found["policies"]["default"]["exit_histogram"] == {4: 3}
    assert ("shadow" in found) == bool(names)
    assert ("shadow" in found["policies"]["default"]) == ("default" in names)


def test_each_part_of_the_only_policy_has_its_shadow_checks():
    counters = ExitStats(shadow={"default": monitor(), "default:last-token": monitor()})
    counters.by_policy.update({name: PolicyStats() for name in counters.shadow})
    found = counters.as_dict()
    assert found["shadow"] == monitor().as_dict()
    for name in counters.shadow:
        assert found["policies"][name]["shadow"] == monitor().as_dict()


def test_an_engine_without_the_plugin_is_refused_with_what_to_pass():
    def collective_rpc(method: str) -> Any:
        raise AttributeError(f"'Worker' object has no attribute '{method}'")

    with pytest.raises(AdaInferError, match="pass additional_config="):
        vllm_adainfer.stats(SimpleNamespace(collective_rpc=collective_rpc))
