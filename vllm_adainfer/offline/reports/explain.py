"""Explain: what a policy sees of one prompt, exit point by exit point, and where it leaves."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from vllm_adainfer.artifact.files import load_artifact
from vllm_adainfer.offline.calibration.adapter import NamedAdapter, adapter_for
from vllm_adainfer.offline.calibration.collect import record, recording_engine
from vllm_adainfer.offline.calibration.data import Row, make_examples, read_template
from vllm_adainfer.offline.pretrained import load_config_and_tokenizer
from vllm_adainfer.offline.reports.views import View, tag_at, views_of
from vllm_adainfer.offline.tables import text_table


@dataclass(frozen=True)
class ExplainRequest:
    """The command line's arguments; see `vllm-adainfer explain --help`."""

    text: str
    model: str
    artifact: str
    template: str | None = None
    epsilon: float | None = None
    adapter: NamedAdapter | None = None


@dataclass(frozen=True)
class Explanation:
    """What the policy makes of one prompt.

    Attributes:
        prompt_tokens: of the prompt.
        layers: of the model.
        epsilon: the bound that the thresholds are for.
        leaves_after: layers that the request runs.
        views: by exit point; the last one is at full depth.

    """

    prompt_tokens: int
    layers: int
    epsilon: float
    leaves_after: int
    views: tuple[View, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values; a score or a threshold that is not finite, which JSON lacks, is None."""
        plain = asdict(self)
        for view in plain["views"]:
            for name in "score", "threshold":
                if view[name] is not None and not math.isfinite(view[name]):
                    view[name] = None
        return plain

    def __str__(self) -> str:
        """A table for a terminal, and what follows from it."""
        columns = ["answer", "after layer", "top_prob", "gap", "score", "threshold", ""]
        rows = [
            [
                view.answer,
                str(view.layer),
                f"{view.top_prob:.3f}",
                f"{view.gap:.3f}",
                _number(view.score),
                _number(view.threshold),
                "leaves" if view.layer == self.leaves_after else "",
            ]
            for view in self.views
        ]
        return f"{text_table(columns, rows, text_columns=1)}\n\n{self._in_words()}"

    def _in_words(self) -> str:
        left = next(view for view in self.views if view.layer == self.leaves_after)
        full = self.views[-1]
        if left is full:
            return (
                f"The policy never settles it at epsilon {self.epsilon:g}: it runs all "
                f"{self.layers} layers and answers {full.answer}."
            )
        same = "as at full depth" if left.answer == full.answer else f"at full depth {full.answer}"
        return (
            f"It leaves after {left.layer} of {self.layers} layers, at epsilon {self.epsilon:g}, "
            f"and answers {left.answer}, {same}."
        )


def explain(request: ExplainRequest) -> Explanation:
    """Run a prompt at full depth, and look at it as the policy does.

    Raises:
        AdaInferError: model, artifact and prompt do not fit together.

    """
    artifact = load_artifact(request.artifact)
    config = artifact.config
    adapter = adapter_for(config, request.adapter)
    hf_config, tokenizer = load_config_and_tokenizer(request.model)
    config.check_served_by(hf_config)
    template = read_template(request.template)
    row = Row("the text", {"text" if template is not None else "prompt": request.text})
    longest = hf_config.max_position_embeddings - 1
    [example] = make_examples([row], tokenizer, template, "label", longest)
    tag, epsilon = tag_at(config, request.epsilon, example.token_ids)
    settings = {"enforce_eager": True, **({} if adapter is None else adapter.engine_settings)}
    with recording_engine(
        request.model, hf_config, [example], config.exit_points, **settings
    ) as engine:
        recording = record(
            engine,
            [example],
            config.label_ids,
            config.exit_points,
            adapter=adapter and adapter.request,
        )
    config.check_weights(recording.fingerprint)
    names = {label.token_id: label.name for label in config.labels}

    def named(token: int) -> str:
        return repr(names.get(token) or tokenizer.decode([token]))

    views = views_of(artifact, recording, 0, tag, named)
    leaves_after = next(view.layer for view in views if view.settled)
    return Explanation(len(example.token_ids), config.layers, epsilon, leaves_after, tuple(views))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
