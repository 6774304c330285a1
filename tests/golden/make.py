"""How the golden artifacts were made: ``python -m tests.golden.make`` in the repository's root.

They are of the format of November 2026 and must load for ever, so this writes only those that are
missing. Delete one to make it again, and say in the commit why its results may differ.
"""

from __future__ import annotations

import json
import lzma
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save, save_file
from torch import Tensor

from tests import student
from tests.golden.reading import (
    DECIDED,
    DECISIONS,
    EPSILONS,
    HALF,
    HERE,
    INPUTS,
    NUMBERS,
    RUNS,
    SCORED,
    Inputs,
    certified,
    decisions,
    loaded,
    report,
    scored,
    target_of,
)
from vllm_adainfer.artifact.artifact import LAST_TOKEN, Artifact
from vllm_adainfer.artifact.branch_shapes import BRANCH_WIDTH, branch_shapes
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import (
    Choice,
    Gate,
    Label,
    LabelBound,
    LabelRisk,
    LastToken,
    Level,
    TopK,
)
from vllm_adainfer.artifact.files import save_artifact
from vllm_adainfer.artifact.kinds import features_of_risk

LABELS = (
    Label(name="bad", token_id=17),
    Label(name="good", token_id=9),
    Label(name="odd", token_id=2),
)
COLUMNS = tuple(Label(name=one.name, token_id=place) for place, one in enumerate(LABELS))
GATES = (Gate(label="good", probability=0.7), Gate(probability=0.5))
LARGE = 8192  # bytes of a file that is packed
TOKENS: dict[str, Any] = {"probe": "lens", "labels": (), "max_tokens": 3, "bound": "wsr"}
POOLED: dict[str, Any] = {"probe": "pooled-label-head", "pooled_from": 1}
CASES: dict[str, dict[str, Any]] = {
    "label": {},
    "label-by-group": {"bound": "wsr", "largest_group": 6},
    "label-crf": {"classifier": "crf"},
    "pool": {"label_pool": True},
    "choices": {
        "choices": (
            Choice(text="bad", token_ids=(17,), first_tokens=(17, 20)),
            Choice(text="good", token_ids=(9, 4), first_tokens=(9,)),
        ),
        "undecided": (2, 5),
    },
    "accuracy": {"risk": "accuracy", "bound": "wsr"},
    "tolerance": {"risk": "probability", "tolerance": 0.2},
    "tolerance-with-mass": {"risk": "probability", "tolerance": 0.3, "label_mass": True},
    "tolerance-of-pool": {"risk": "probability", "tolerance": 0.2, "label_pool": True},
    "gates": {"risk": "probability", "gates": GATES},
    "gates-of-pool": {"risk": "probability", "gates": GATES, "label_pool": True},
    "first-documents": {
        "risk": "probability",
        "top_k": TopK(k=2, margin=0.1),
        "score_head": "sigmoid",
        "labels": (Label(name="no", token_id=0), Label(name="yes", token_id=1)),
    },
    "score-of-reranker": {
        "risk": "probability",
        "tolerance": 0.2,
        "score_head": "sigmoid",
        "labels": (Label(name="no", token_id=0), Label(name="yes", token_id=1)),
    },
    "several-labels": {
        "risk": "probability",
        "tolerance": 0.2,
        "score_head": "sigmoids",
        "labels": COLUMNS,
    },
    "gates-on-several": {
        "risk": "probability",
        "gates": GATES[:1],
        "score_head": "sigmoids",
        "labels": COLUMNS,
    },
    "class": {"score_head": "softmax", "labels": COLUMNS},
    "about-labels": {
        "label_bounds": (
            LabelBound(kind="recall", label="bad", epsilon=0.3),
            LabelBound(kind="precision", label="good", epsilon=0.3),
        ),
        "never_early": ("odd",),
    },
    "text-shortlist": {**TOKENS, "candidates": "shortlist"},
    "text-vocabulary": {**TOKENS, "probe": "logit-lens", "candidates": "full"},
    "pooled": {**POOLED, "last_token": True},
    "branch": {**POOLED, "branches": (4,)},
    "student": {**student.asked_with(), "exit_points": (0, 4)},
}


def inputs() -> dict[str, Tensor]:
    """States that come nearer to the final one from layer to layer, in eighths and quarters."""
    draw = torch.Generator().manual_seed(60)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=draw)).round().clamp(-24, 24).to(torch.int8)

    rows, lens = 2 * HALF, torch.tensor([3, 1, 7, 4, 9, 2, 5, 5])
    final = normal(rows, 8, scale=5)
    found = {"final": final, "head": normal(32, 8, scale=5), "lens": lens}
    found |= {"2": final + normal(rows, 8, scale=2), "4": final + normal(rows, 8)}
    found |= {"mean2": final + normal(rows, 8), "mean4": final + normal(rows, 8)}
    found["prompt"] = normal(int(lens.sum()), 8, scale=5)
    found["bits"] = torch.tensor([7, 3, 5, 6])[torch.randint(4, (rows,), generator=draw)].byte()
    found["right"] = torch.randint(3, (rows,), generator=draw).byte()
    return found


def config_of(changes: dict[str, Any], levels: tuple[Level, ...]) -> ArtifactConfig:
    """The config of a case."""
    values = {
        "base_model": "golden",
        "architecture": "LlamaForCausalLM",
        "layers": 6,
        "hidden_size": 8,
        "vocab_size": 1000 if "student" in changes else 32,
        "weights_fingerprint": "0123456789abcdef",
        "exit_points": (2, 4),
        "probe": "label-head",
        "candidates": "labels",
        "labels": LABELS,
        "features": features_of_risk(
            changes.get("risk", "disagreement"), bool(changes.get("gates"))
        ),
        "classifier": "svm",
        "epsilon": EPSILONS[-1],
        "delta": 0.1,
        "levels": levels,
        **changes,
    }
    if changes.get("last_token"):
        values["last_token"] = LastToken(exit_points=(4,), levels=levels, one_bound=True)
    return ArtifactConfig(**values)


def tensors_of(config: ArtifactConfig, seen: Inputs) -> dict[str, Tensor]:
    """Heads that read the answer from a state as full depth does, with a little noise."""
    whole, *last = config.parts("").values()
    tensors = part_tensors(whole, seen)
    for part in last:
        own = part_tensors(part, seen)
        tensors |= {f"{LAST_TOKEN}.{name}": one.clone() for name, one in own.items()}
    return tensors


def part_tensors(config: ArtifactConfig, seen: Inputs) -> dict[str, Tensor]:
    """Those of one part; nothing is settled yet."""
    draw = torch.Generator().manual_seed(61)
    levels = len(config.levels)
    tensors = {"thresholds": torch.full((levels, len(config.exit_points)), torch.inf)}
    tokens = torch.tensor([17, 9, 2][: len(config.labels)], dtype=torch.int64)
    if config.candidates == "shortlist":
        tokens = torch.tensor([1, 2, 5, 9, 11, 17, 20, 21, 26, 30])
        tensors["shortlist"] = tokens
    rows = seen.head[tokens]
    if config.score_head == "sigmoid":
        rows = torch.stack([torch.zeros(8), seen.head[9]])
    if config.risk == "probability":
        rows = torch.cat([rows, torch.randint(-2, 3, (1, 8), generator=draw) / 8])
    if not config.has_label_heads and config.candidates == "shortlist":
        tensors["head_rows"] = rows
    for layer, read in zip(config.exit_points, config.probe_inputs, strict=True):
        weights = {3: [4, 2, -4], 4: [0.5, 1, 0.25, -1]}[len(config.features) + 1]
        transitions = [0.5, -0.5, -0.25, 0.75] if config.classifier == "crf" else []
        tensors[f"exit.{layer}.classifier"] = torch.tensor([*transitions, *weights]).float()
        if config.probe == "lens":
            noise = torch.randint(-1, 2, (8, 8), generator=draw) / 16
            tensors[f"exit.{layer}.lens_weight"] = torch.eye(8) + noise
            tensors[f"exit.{layer}.lens_bias"] = torch.randint(-1, 2, (8,), generator=draw) / 8
        if not config.has_label_heads:
            continue
        head = rows + torch.randint(-1, 2, rows.shape, generator=draw) / 16
        if config.is_pooled:
            head = torch.cat([head, rows], dim=1) / 2
        if read.name == "OWN_STATES":
            shapes = branch_shapes(8)
            for name, shape in shapes.items():
                kept = torch.rand(shape, generator=draw) < 0.005
                some = torch.randint(-3, 4, shape, generator=draw) / 4 * kept
                if "norm.weight" in name:
                    some = torch.ones(shape)
                tensors[f"exit.{layer}.branch.{name}"] = some.half()
            head = torch.randint(-2, 3, (len(rows), 2 * BRANCH_WIDTH), generator=draw) / 16
        if read.name == "TEXT":
            head = torch.randint(-4, 5, (len(rows), student.WIDTH), generator=draw) / 4
        bias = torch.randint(-2, 3, (len(rows),), generator=draw) / 8
        tensors |= {f"exit.{layer}.head_weight": head, f"exit.{layer}.head_bias": bias}
    return tensors


def level_of(epsilon: float, found: dict[str, Any]) -> Level:
    """A level of the table, as certified."""
    fields = ("risk", "disagreement", "layers_saved", "bound")
    return Level(
        epsilon=epsilon,
        label_risks=found["labels"],
        **{name: found[name] for name in fields},
    )


def made(changes: dict[str, Any], seen: Inputs) -> tuple[Artifact, dict[str, Any], Any]:
    """An artifact with certified thresholds; what certifies them, and what was certified."""
    nothing = [LabelRisk(rows=1, risk=0, bound=0.1)] * len(changes.get("label_bounds", ()))
    levels = tuple(
        Level(
            epsilon=e, disagreement=0, risk=0, bound=e, layers_saved=0, label_risks=tuple(nothing)
        )
        for e in EPSILONS
    )
    config = config_of(changes, levels)
    artifact = Artifact(config, tensors_of(config, seen))
    if set(changes) & {"student", "branches"}:  # their thresholds are chosen, not certified
        for name in artifact.tensors:
            if name.endswith("thresholds"):
                artifact.tensors[name] = torch.tensor([[-0.5], [-1.5]]).repeat(1, 2)
        return artifact, {}, {}
    rows = scored(artifact, seen)
    found = certified(config, rows, seen)
    own = {
        name: tuple(level_of(float(epsilon), one) for epsilon, one in by_epsilon.items())
        for name, by_epsilon in found.items()
    }
    if config.last_token is not None:
        changes = changes | {
            "last_token": config.last_token.model_copy(
                update={"levels": own[f"policy:{LAST_TOKEN}"]}
            )
        }
        config = ArtifactConfig(**{**dict(config), "levels": own["policy"], **changes})
    else:
        config = ArtifactConfig(**{**dict(config), "levels": own["policy"]})
    for name, prefix in (("policy", ""), (f"policy:{LAST_TOKEN}", f"{LAST_TOKEN}.")):
        if name in found:
            values = torch.tensor([one["threshold"] for one in found[name].values()])
            wide = artifact.tensors[f"{prefix}thresholds"].shape[1]
            artifact.tensors[f"{prefix}thresholds"] = values.unsqueeze(1).repeat(1, wide)
    return replace(artifact, config=config), rows, found


def runs_of(artifact: Artifact, rows: Any, seen: Inputs) -> dict[str, Tensor]:
    """Runs of an evaluation in which each of the first rows leaves where it is settled."""
    config, exits = artifact.config, rows["policy"]
    draw = np.random.default_rng(62)
    full = target_of(config, seen)[1].tokens
    thresholds = artifact.tensors["thresholds"][:, 0]
    logits = seen.logits(config)[:DECIDED]
    ids = list(config.label_ids)
    reads = config.risk == "probability"
    deep = logits[:, ids].log_softmax(1) if config.score_head else logits.log_softmax(1)[:, ids]
    if config.score_head == "sigmoids":
        deep = logits.sigmoid().log()
    right = [config.label_ids[place % len(ids)] for place in seen.right[:DECIDED].tolist()]
    found = {"right": torch.tensor(right)}

    def keep(name: str, tokens: Any, layers: Any, logprobs: Tensor, seconds: float) -> None:
        found[f"{name}.texts"] = torch.tensor(np.array(tokens)[:, None]).short()
        found[f"{name}.layers"] = torch.tensor(np.array(layers)).to(torch.int8)
        found[f"{name}.seconds"] = torch.tensor(seconds)
        if reads:
            found[f"{name}.logprobs"] = logprobs.float()

    whole = [6] * DECIDED
    noise = torch.from_numpy(draw.integers(-1, 2, tuple(deep.shape))) / 64
    keep("never", full[:DECIDED], whole, deep, 2.5)
    keep("stock", full[:DECIDED], whole, deep - noise.abs(), 2.0)
    for level, threshold in zip(config.levels, thresholds.tolist(), strict=True):
        tokens, layers, probs = full[:DECIDED].copy(), np.array(whole), deep.clone()
        for layer, one in reversed([*zip(config.exit_points, exits, strict=True)]):
            leaves = (one.score[:DECIDED] >= threshold).numpy()
            tokens[leaves], layers[leaves] = one.tokens[:DECIDED][leaves], layer
            moved = torch.from_numpy(draw.integers(-40, 41, tuple(deep.shape))) / 32 / layer
            probs[leaves] = (deep - moved.abs())[leaves]
        keep(str(level.epsilon), tokens, layers, probs, 1.25)
    return found


def flat(rows: Any) -> Iterator[tuple[str, Tensor]]:
    """What certifies, by name."""
    for name, exits in rows.items():
        for place, one in enumerate(exits):
            yield f"{name}/{place}/tokens", torch.from_numpy(one.tokens).short()
            yield f"{name}/{place}/full", torch.from_numpy(one.full).short()
            yield f"{name}/{place}/loss", torch.from_numpy(one.loss).to(torch.int8)
            yield f"{name}/{place}/score", one.score
            if one.relevance is not None:
                yield f"{name}/{place}/relevance", torch.from_numpy(one.relevance).float()


def write(case: str, changes: dict[str, Any], seen: Inputs) -> None:
    """Write an artifact, and what the code made of it."""
    artifact, rows, found = made(changes, seen)
    with tempfile.TemporaryDirectory() as draft:
        directory = Path(draft) / case
        with_student = ()
        if "student" in changes:
            encoder = student.encoder()
            coarse = {n: (t * 4).round().half() / 4 for n, t in encoder.tensors.items()}
            with_student = replace(encoder, tensors=coarse), student.tokenizer()
        save_artifact(directory, artifact.config, artifact.tensors, {}, "golden\n", *with_student)
        for file in [one for one in directory.rglob("*.*") if one.stat().st_size > LARGE]:
            packed(file.with_name(f"{file.name}.xz"), file.read_bytes())
            file.unlink()
        shutil.copytree(directory, HERE / case)
    with tempfile.TemporaryDirectory() as draft:
        artifact = loaded(case, Path(draft))
    packed(HERE / case / DECISIONS, save(decisions(artifact, seen)))
    numbers: dict[str, Any] = {"capability": torch.backends.cpu.get_cpu_capability()}
    if rows:
        packed(HERE / case / SCORED, save(dict(flat(rows))))
        numbers["certified"] = found
    if rows and artifact.config.labels:
        runs = save(runs_of(artifact, rows, seen))
        packed(HERE / case / RUNS, runs)
        numbers["report"] = report(artifact.config, load(runs))
    packed(HERE / case / NUMBERS, json.dumps(numbers).encode())


def packed(path: Path, content: bytes) -> None:
    """Write a file that `reading.read` reads."""
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))


def main() -> None:
    """Write what is missing."""
    if not (HERE / INPUTS).exists():
        save_file(inputs(), HERE / INPUTS)
    seen = Inputs.load()
    for case, changes in CASES.items():
        if not (HERE / case).exists():
            write(case, changes, seen)
            sys.stdout.write(f"{case}\n")


if __name__ == "__main__":
    main()
