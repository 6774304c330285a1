"""The artifact's model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig
from vllm_adainfer.artifact.promise import (
    about_labels,
    after_which_text,
    each_for_itself,
    not_seen_whole,
    right_about,
    student_in_words,
    wrong_in_words,
)
from vllm_adainfer.artifact.served_prompts import served_prompts
from vllm_adainfer.offline.tables import markdown_table


def model_card(config: ArtifactConfig, details: Mapping[str, Any]) -> str:
    """README.md of an artifact: front matter for the hub, then what the policy promises."""
    labels = ", ".join(f"`{label.name}`" for label in config.labels) or "any token"
    rows = "tokens" if config.max_tokens > 1 else "prompts"
    facts = markdown_table(
        ["", ""],
        [
            ["architecture", f"{config.architecture}, {config.layers} layers"],
            ["exit points", ", ".join(map(str, config.exit_points))],
            *_branches(config),
            ["probe", f"{config.probe}, candidates: {labels}"],
            *(
                [["scores", f"of a classifier ({config.score_head})"]]
                * (config.score_head is not None)
            ),
            *_student(config),
            *([["serves prompts", served_prompts(config.shared)]] if config.shared else []),
            ["classifier", f"{config.classifier} on {', '.join(config.features)}"],
            [
                "calibrated on",
                f"{details['rows']} {rows} ({details['rows_fitted']} to fit, "
                f"{details['rows_held_out']} held out), seed {details['seed']}",
            ],
            *_queries(details),
            [
                "majority answer",
                f"{details['majority_share']:.1%} of the held-out {rows}",
            ],
            *_tolerated(config),
            *(["about labels", phrase] for phrase in about_labels(config)),
        ],
        text_columns=2,
    )
    points = {*config.exit_points} - {*config.branches}
    agreement = markdown_table(
        ["layer", "agreement"],
        [
            [
                f"{layer} (exit point)" if int(layer) in points else layer,
                f"{share:.1%}",
            ]
            for layer, share in details["agreement"].items()
        ]
        + [
            [f"{layer}, branch{' (exit point)' * (int(layer) in config.branches)}", f"{share:.1%}"]
            for layer, share in details.get("branch_agreement", {}).items()
        ],
    )
    risk = {
        "disagreement": "the share of answers that differ from the full model's",
        "accuracy": "the accuracy lost",
        "probability": "the share of wrong answers",
    }[config.risk]
    if config.top_k is not None:
        risk = "the share of wrong queries"
    if config.risk == "probability":
        risk += f" ({wrong_in_words(config)})"
    versions = ", ".join(f"{k} {v}" for k, v in details["provenance"]["versions"].items())
    return f"""---
base_model: {config.base_model}
library_name: vllm
tags: [vllm, early-exit, adainfer]
---

# Early-exit policy for {config.base_model}

Serve it with the plugin [vllm-adainfer](https://arxiv.org/abs/2403.02181):

```
vllm-adainfer serve MODEL --policy DIR
```

{facts}

Each bound holds with probability {1 - config.delta:.0%} over the draw of the held-out prompts, for
prompts from the same distribution{_mixture(config)}: {risk} is at most epsilon
({config.bound} bound on the mean loss). {each_for_itself(config)}

{"".join(f"{text}{chr(10)}{chr(10)}" for text in after_which_text(config))}{_levels(config)}
{_not_seen_whole(config)}
How often the probe alone agrees with the full model, if every row left there:

{agreement}

`vllm-adainfer inspect DIR --html page.html` draws the risk and its bound against layers saved.

Made with {versions} on {details["provenance"]["cpu"]}.
"""


def _levels(config: ArtifactConfig) -> str:
    """The epsilon table."""
    labels = [f"{one.kind} of {one.label}: changed (bound)" for one in config.label_bounds]
    columns = ["epsilon", "disagreement, held out", "loss, held out", "upper bound"]
    return markdown_table(
        [*columns, *labels, "layers saved"],
        [
            [
                f"{level.epsilon:.1%}",
                f"{level.disagreement:.2%}",
                f"{level.risk:.2%}",
                f"{level.bound:.2%}",
                *(f"{one.risk:.2%} of {one.rows} ({one.bound:.2%})" for one in level.label_risks),
                f"{level.layers_saved:.1%}",
            ]
            for level in config.levels
        ],
        text_columns=0,
    )


def _not_seen_whole(config: ArtifactConfig) -> str:
    """What a pooled policy does with prompts that it does not see as a whole."""
    said = not_seen_whole(config)
    if config.last_token is not None:
        said += f"\n\n{_levels(config.parts('')[f':{LAST_TOKEN}'])}"
    return f"\n{said}\n" if said else ""


def _mixture(config: ArtifactConfig) -> str:
    """The distribution of a label pool's prompts, in words."""
    if config.by_question:
        return f", for each of {len(config.questions)} questions on its own; others run all layers"
    return " (the same mixture of questions, each with labels of its own)" * config.label_pool


def _student(config: ArtifactConfig) -> list[list[str]]:
    """A row about the student."""
    return [] if config.student is None else [["student", student_in_words(config.student)]]


def _queries(details: Mapping[str, Any]) -> list[list[str]]:
    """The row about the queries that certify an order."""
    documents = details.get("queries_held_out")
    if not documents:
        return []
    mean = sum(documents) / len(documents)
    return [["queries held out", f"{len(documents)}, with {mean:.0f} documents on average"]]


def _branches(config: ArtifactConfig) -> list[list[str]]:
    """The row about exit points where a layer over the whole prompt decides."""
    layers = ", ".join(map(str, config.branches))
    return [["branches", f"after {layers}"]] if layers else []


def _tolerated(config: ArtifactConfig) -> list[list[str]]:
    """Rows about a policy for probabilities."""
    if text := right_about(config):
        names = {"gates": bool(config.gates), "top k": config.top_k is not None}
        promised = [[name, wrong_in_words(config)] for name, given in names.items() if given]
        return [*promised, ["served", text]]
    if config.risk != "probability":
        return []
    if config.score_head is not None:
        return [["tolerance", f"{config.tolerance:g}"]]
    mass = "certified: probabilities in the whole vocabulary are served, too"
    if not config.label_mass:
        mass = "not certified: only probabilities among the labels are served"
    return [["tolerance", f"{config.tolerance:g}"], ["label mass", mass]]
