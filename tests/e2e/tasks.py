"""Three calibrated tasks in one engine: their artifacts, and requests with what each has to get."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from vllm import SamplingParams

from tests.e2e.asking import tokens
from tests.e2e.policies import artifact_of, expected
from tests.tiny import EXIT_POINTS, tiny_config
from vllm_adainfer.artifact.artifact import Artifact
from vllm_adainfer.artifact.fields import Label
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.settings.engine import NO_POLICY

# Each has exit points of its own, so that the stack is cut where one of them wants it.
POINTS = {"mood": (2, 3), "topic": (3, 5), "next": (2, 5)}
TOPICS = ("Review", "positive", "Sentiment")


def three_tasks(model_path: Path, reference: Any) -> dict[str, Artifact]:
    """Two tasks with labels, of which some rows leave at each level, and one for any text."""
    mood = artifact_of(model_path, reference, "label-head", "labels", 0.2)
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    labels = tuple(Label(name=name, token_id=tokenizer.encode(name)[0]) for name in TOPICS)
    generator = torch.Generator().manual_seed(3)
    heads = {
        f"exit.{layer}.{part}": tensor
        for layer in EXIT_POINTS
        for part, tensor in (
            ("head_weight", 0.02 * torch.randn(len(labels), 64, generator=generator)),
            ("head_bias", torch.zeros(len(labels))),
        )
    }
    config = tiny_config(model_path, labels=labels, classifier="threshold")
    topic = Artifact(config, {**mood.tensors, **heads})
    text = artifact_of(model_path, reference, "lens", "full", 0.1, max_tokens=32)
    tasks = {"mood": mood, "topic": topic, "next": text}
    return {name: stricter_first(only_at(task, POINTS[name])) for name, task in tasks.items()}


def only_at(artifact: Artifact, points: tuple[int, ...]) -> Artifact:
    """The same with some of its exit points."""
    columns = [EXIT_POINTS.index(point) for point in points]
    tensors = {
        name: tensor
        for name, tensor in artifact.tensors.items()
        if not name.startswith("exit.") or int(name.split(".")[1]) in points
    }
    tensors["thresholds"] = tensors["thresholds"][:, columns]
    return Artifact(artifact.config.model_copy(update={"exit_points": points}), tensors)


def stricter_first(artifact: Artifact) -> Artifact:
    """The same with a higher threshold in the first row of its epsilon table."""
    thresholds = artifact.tensors["thresholds"].clone()
    thresholds[0] *= 1.5
    return replace(artifact, tensors={**artifact.tensors, "thresholds": thresholds})


def saved(tasks: dict[str, Artifact], directory: Path) -> dict[str, str]:
    """Write them; the value of the switch's ``artifact``."""
    for name, task in tasks.items():
        save_artifact(directory / name, task.config, task.tensors, {}, "card\n")
    return {name: str(directory / name) for name in tasks}


@dataclass(frozen=True)
class Case:
    """A request, the depth and the token that it has to get, and the token at full depth."""

    prompt: list[int]
    params: SamplingParams
    task: str
    depth: int
    token: int
    deep_token: int


def cases(
    tasks: dict[str, Artifact], reference: Any, prompts: list[list[int]], seed: int
) -> list[Case]:
    """Each prompt for a task, at an epsilon or at full depth, all drawn; without ties."""
    draw = np.random.default_rng(seed)
    found = []
    for prompt in prompts:
        name = str(draw.choice(list(tasks)))
        task, level = tasks[name], int(draw.integers(-1, 2))
        arguments: dict[str, Any] = {"adainfer": int(level >= 0)}
        if level >= 0:
            arguments["adainfer_epsilon"] = task.config.levels[level].epsilon
        if draw.random() < 0.5:  # else it is found by its labels
            arguments["adainfer_policy"] = name
        never = replace(
            task, tensors={**task.tensors, "thresholds": task.tensors["thresholds"] + torch.inf}
        )
        deep = expected(never, reference, prompt)
        wanted = deep if level < 0 else expected(task, reference, prompt, level)
        if deep is not None and wanted is not None:
            params = SamplingParams(
                temperature=0,
                max_tokens=1,
                allowed_token_ids=list(task.config.label_ids) or None,
                extra_args=arguments,
            )
            decides = name if level >= 0 else NO_POLICY
            found.append(Case(prompt, params, decides, *wanted, deep[1]))
    return found


def tokens_of(llm: Any, some: list[Case]) -> list[int]:
    """What an engine answers when all come at once."""
    found = tokens(llm, [case.prompt for case in some], [case.params for case in some])
    return [token for [token] in found]
