"""Many observations at once, compared with prometheus_client's own, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Histogram, values
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_adainfer.engine.compat.prometheus import observe_many

BUCKETS = (2, 3, 5.5)
OBSERVED = [(2, 7), (2.5, 1), (3, 100), (5.5, 4), (6, 2), (0, 3), (3, 0), (-1, 2)]

Samples = Counter[tuple[str, frozenset[tuple[str, str]]]]
Observe = Callable[[Histogram, float, int], None]


def one_by_one(histogram: Histogram, value: float, count: int) -> None:
    for _ in range(count):
        histogram.observe(value)


def samples(registry: CollectorRegistry) -> Samples:
    """By name and labels; without when the histogram was made, which only one process tells."""
    found: Samples = Counter()
    for metric in registry.collect():
        for sample in metric.samples:
            if not sample.name.endswith("_created"):
                found[sample.name, frozenset(sample.labels.items())] = sample.value
    return found


def histogram_of(registry: CollectorRegistry) -> Any:
    return Histogram("layers", "help", ["policy"], buckets=BUCKETS, registry=registry)


def of_one_process(observe: Observe) -> Samples:
    registry = CollectorRegistry()
    histogram = histogram_of(registry)
    for value, count in OBSERVED:
        observe(histogram.labels("a"), value, count)
    return samples(registry)


@pytest.fixture
def of_two_processes(tmp_path, monkeypatch) -> Iterator[Callable[[Observe], Samples]]:
    """Every other observation is that of a second API server; their files are added up."""

    def run(observe: Observe) -> Samples:
        directory = tmp_path / observe.__name__
        directory.mkdir()
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
        for server in range(2):
            shared = values.MultiProcessValue(lambda server=server: server)
            monkeypatch.setattr(values, "ValueClass", shared)
            histogram = histogram_of(CollectorRegistry())
            for value, count in OBSERVED[server::2]:
                observe(histogram.labels("a"), value, count)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        return samples(registry)

    yield run
    values.close_all_multiprocess_files()


def test_many_observations_at_once_are_those_one_by_one():
    found = of_one_process(observe_many)
    assert found == of_one_process(one_by_one)
    assert found["layers_count", frozenset({("policy", "a")})] == 119


def test_so_are_those_of_several_api_servers(of_two_processes):
    found = of_two_processes(observe_many)
    assert found == of_two_processes(one_by_one)
    assert found["layers_count", frozenset({("policy", "a")})] == 119
