"""The artifact's model card."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.offline.facts.artifact import artifact_facts
from vllm_adainfer.offline.facts.document import Facts, Table, as_markdown

SERVE = "vllm-adainfer serve DIR"  # `push` puts the artifact's id in place of DIR
SHOWN_POINTS = 8  # of the risk curve


def model_card(config: ArtifactConfig, details: Mapping[str, Any]) -> str:
    """README.md of an artifact: front matter for the hub, then what the policy promises."""
    provenance = details["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    content = as_markdown(
        [
            *artifact_facts(config, details),
            f"{details['rows_fitted']} rows fitted the probes. How often the probe alone agrees "
            "with the full model, if every row left there:",
            Table(_agreement(config, details), text_columns=1),
            *_students(details),
            "## Curve",
            "Layers saved, and what is changed, on the held-out rows, by the threshold of the "
            "probes' scores. `vllm-adainfer inspect DIR --html page.html` draws it.",
            Table(_curve(details)),
            "## Limits",
            "The bound is for prompts like those of the calibration. It says nothing about another "
            "mixture of prompts, or about prompts that are written to deceive: serve with a "
            "`shadow_rate` to watch it. Requests of another form run all layers. Other weights, "
            "also another fine-tuning or quantisation of this model, are refused at start-up.",
            f"Made with {versions} on {provenance['cpu']}.",
        ]
    )
    adapter = config.adapter
    lora = "" if adapter is None else f" --enable-lora --lora-modules {adapter.name}=ADAPTER"
    return f"""---
base_model: {config.base_model}
library_name: vllm
tags: [vllm, early-exit, adainfer]
---

# Early-exit policy for {config.base_model}

Serve the model with it by vLLM and its plugin vllm-adainfer, which implements
[AdaInfer](https://arxiv.org/abs/2403.02181):

```
{SERVE}{lora}
```
{_request(details)}
{content}
"""


def _request(details: Mapping[str, Any]) -> str:
    """A request that the policy serves, where it takes more than a prompt: one for an object."""
    schema = details.get("schema")
    if schema is None:
        return ""
    asked = {"name": "answer", "schema": json.loads(schema)}
    body = {
        "model": "MODEL",
        "messages": [{"role": "user", "content": "PROMPT"}],
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": asked},
    }
    return f"""
A request for `/v1/chat/completions` that it serves, with a prompt like those of the calibration:

```json
{json.dumps(body, indent=2, ensure_ascii=False)}
```
"""


def _curve(details: Mapping[str, Any]) -> list[Facts]:
    """Points of the risk curve, evenly from the first to the last."""
    points = details["risk_curve"]
    count = min(len(points), SHOWN_POINTS)
    places = [round(n * (len(points) - 1) / max(1, count - 1)) for n in range(count)]
    return [
        {
            "layers saved": f"{points[place]['layers_saved']:.1%}",
            "risk, held out": f"{points[place]['risk']:.2%}",
            "upper bound": f"{points[place]['bound']:.2%}",
        }
        for place in places
    ]


def _students(details: Mapping[str, Any]) -> list[str | Table]:
    """The students that were trained, and what each costs and saves; nothing without any."""
    tried: list[Facts] = [
        {
            "student": one["size"],
            "ms a prompt": f"{one['seconds'] * 1e3:.2f}",
            "layers saved": f"{one['layers_saved']:.1%}",
            "ms expected a prompt": f"{one['expected'] * 1e3:.2f}",
        }
        for one in details.get("students", ())
    ]
    if not tried:
        return []
    return [
        "Students that were trained, each with exit points chosen beside it:",
        Table(tried, text_columns=1),
    ]


def _agreement(config: ArtifactConfig, details: Mapping[str, Any]) -> list[Facts]:
    """The agreement with full depth of the probe after each layer, and of each branch."""
    found = {
        "": (details["agreement"], {*config.exit_points} - {*config.branches}),
        ", branch": (details.get("branch_agreement", {}), config.branches),
    }
    return [
        {
            "layer": f"{layer}{kind}{' (exit point)' * (int(layer) in exit_points)}",
            "agreement": f"{share:.1%}",
        }
        for kind, (shares, exit_points) in found.items()
        for layer, share in shares.items()
    ]
