"""The Grafana dashboard shows all our series, and only existing ones, for the chosen engines."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY

from vllm_adainfer.frontend.series import register_series

FILE = Path(__file__).parents[2] / "docs" / "grafana.json"
SUFFIXES = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "gauge": ("",)}


@pytest.fixture(scope="module")
def dashboard() -> Any:
    return json.loads(FILE.read_text())


@pytest.fixture(scope="module")
def series() -> dict[str, set[str]]:
    """Labels of each of our series, by its name on /metrics."""
    ours = register_series((2, 6), choices=True, kinds=True, drafts=True).values()
    labels = {metric._name: set(metric._labelnames) for metric in ours}
    return {
        metric.name + suffix: labels[metric.name] | ({"le"} if suffix == "_bucket" else set())
        for metric in REGISTRY.collect()
        if metric.name.startswith("adainfer:")
        for suffix in SUFFIXES[metric.type]
    }


def expressions(dashboard: Any) -> Iterator[str]:
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def test_every_named_series_exists_and_every_series_of_ours_is_shown(dashboard, series):
    named = set(re.findall(r"adainfer:\w+", FILE.read_text()))
    assert named == series.keys()
    shown = {name for text in expressions(dashboard) for name in re.findall(r"adainfer:\w+", text)}
    assert shown == series.keys()


def test_every_expression_selects_the_chosen_models_and_engines(dashboard):
    chosen = 'model_name=~"$model_name", engine=~"$engine"'
    for text in expressions(dashboard):
        for name, labels in re.findall(r"((?:adainfer|vllm):\w+)(\{[^}]*\})?", text):
            assert chosen in labels, (name, text)


def test_series_are_grouped_by_labels_that_they_have(dashboard, series):
    for text in expressions(dashboard):
        groups = re.findall(r"by \(([\w, ]+)\) \((?:\w+ ?\()?(adainfer:\w+)", text)
        joins = re.findall(r"group_left \((\w+)\) (adainfer:\w+)", text)
        joined = {label for label, name in joins if label in series[name]}
        for labels, name in groups:
            assert set(labels.split(", ")) <= series[name] | joined, text
    texts = "".join(expressions(dashboard))
    assert "by (policy)" in texts
    assert "by (le)" in texts


def test_vllms_own_series_are_those_of_its_loggers(dashboard):
    from vllm.v1.metrics import loggers

    known = inspect.getsource(loggers)
    names = {name for text in expressions(dashboard) for name in re.findall(r"vllm:\w+", text)}
    assert {re.sub(r"_(bucket|total)$", "", name) for name in names} == {
        "vllm:time_to_first_token_seconds",
        "vllm:request_success",
    }
    assert all(f'"{re.sub(r"_(bucket|total)$", "", name)}"' in known for name in names)


def test_data_source_model_engine_and_epsilon_are_chosen_by_variables(dashboard):
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    queries = {name: one.get("definition") for name, one in variables.items()}
    for name in ("model_name", "engine", "epsilon"):
        assert re.fullmatch(rf"label_values\(adainfer:.+, {name}\)", queries[name])
    sources = {
        part["datasource"]["uid"]
        for panel in dashboard["panels"]
        if panel["type"] != "row"
        for part in (panel, *panel["targets"])
    }
    assert sources == {"${datasource}"}


def test_panels_have_unique_ids_and_do_not_overlap(dashboard):
    panels = dashboard["panels"]
    assert dashboard["schemaVersion"] >= 36
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (column, line)
        for place in (panel["gridPos"] for panel in panels)
        for column in range(place["x"], place["x"] + place["w"])
        for line in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert all(column < 24 for column, _ in cells)
