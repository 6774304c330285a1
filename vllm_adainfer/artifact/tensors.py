"""The tensors of an artifact: their names, shapes and types follow from its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vllm_adainfer.artifact.branch_shapes import BRANCH_WIDTH, branch_shapes
from vllm_adainfer.artifact.config import LAST_TOKEN, ArtifactConfig
from vllm_adainfer.artifact.kinds import ProbeInput
from vllm_adainfer.errors import AdaInferError

UNREADABLE = (OSError, RuntimeError, SafetensorError)  # RuntimeError: more than can be mapped
GUESS_TOKENS, GUESS_WEIGHT = "guess.tokens", "guess.weight"  # of a guesser of objects
INTEGERS = ("shortlist", GUESS_TOKENS)
FLOATS = ("F32", "F16", "BF16")
TRANSITIONS = 4  # between the two states of a CRF


def served_shape(kind: str, features: int) -> tuple[int]:
    """Shape of the tensor of a classifier of this `kind` on this many features."""
    return (features + 1 + (TRANSITIONS if kind == "crf" else 0),)


def check_tensors(path: Path, config: ArtifactConfig) -> None:
    """Compare the header of `path` with `config`, before any tensor is read.

    An AdaInferError if a tensor is missing, unknown, or has another shape or type.
    """
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            dtypes = {name: part.get_dtype() for name, part in parts.items()}
    except UNREADABLE as error:
        raise AdaInferError(f"{path} cannot be read ({error}): calibrate again") from None
    problem = _problem(shapes, dtypes, expected_shapes(config, shapes))
    if problem is not None:
        raise AdaInferError(f"{path}: {problem}: calibrate again")


def _problem(
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    expected: Mapping[str, tuple[int, ...]],
) -> str | None:
    """The first difference between the tensors found and those `expected`; None if all fit."""
    for name, shape in expected.items():
        if name.endswith(".lens_weight") and name.replace("_weight", "_down") in shapes:
            return f"{name} is of low rank, which is served no more"
        if name not in shapes:
            return f"tensor {name} must have shape {list(shape)} but is missing"
        if shapes[name] != shape:
            return f"tensor {name} must have shape {list(shape)} but has {list(shapes[name])}"
        allowed = ("I64",) if name in INTEGERS else FLOATS
        if dtypes[name] not in allowed:
            return f"tensor {name} must be {' or '.join(allowed)} but is {dtypes[name]}"
    if expected.get("shortlist", (2,))[0] < 2:
        return "there is nothing to decide in a shortlist of fewer than two tokens"
    for name in sorted(shapes.keys() - expected.keys()):
        return f"tensor {name!r:.80} does not belong to this policy"
    return None


def expected_shapes(
    config: ArtifactConfig, found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by name.

    The shapes `found` tell how long the shortlist is, and how many tokens a guesser knows.
    """
    own, *others = config.parts("").values()
    shapes = _shapes_of_part(own, found)
    for part in others:
        shapes |= {f"{LAST_TOKEN}.{n}": s for n, s in _shapes_of_part(part, found).items()}
    if config.objects is not None and config.objects.guesser:
        tokens = (found.get(GUESS_TOKENS) or (0,))[0]
        shapes |= {GUESS_TOKENS: (tokens,), GUESS_WEIGHT: (tokens + 1, len(config.labels))}
    return shapes


def _shapes_of_part(
    config: ArtifactConfig, found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    hidden, labels = config.hidden_size, len(config.labels)
    head_rows = labels + config.promise.reads_probabilities  # the last is for the label mass
    shapes: dict[str, tuple[int, ...]] = {
        "thresholds": (config.num_threshold_rows, len(config.exit_points))
    }
    scored = labels
    if config.candidates == "shortlist":
        scored = (found.get("shortlist") or (0,))[0]
        shapes["shortlist"] = (scored,)
    if not config.has_label_heads and config.candidates != "full":
        shapes["head_rows"] = (scored, config.head_size or hidden)
    for layer, read in zip(config.exit_points, config.probe_inputs, strict=True):
        shapes[f"exit.{layer}.classifier"] = served_shape(config.classifier, len(config.features))
        if config.has_label_heads:
            width = hidden * (1 + config.is_pooled)
            if config.student is not None and read is ProbeInput.TEXT:
                width = config.student.hidden_size
            if read is ProbeInput.OWN_STATES:
                width = 2 * BRANCH_WIDTH  # of the last token and of the mean
                own = branch_shapes(hidden)
                shapes |= {f"exit.{layer}.branch.{name}": shape for name, shape in own.items()}
            shapes[f"exit.{layer}.head_weight"] = (head_rows, width)
            shapes[f"exit.{layer}.head_bias"] = (head_rows,)
        elif config.probe == "lens":
            shapes[f"exit.{layer}.lens_weight"] = (hidden, hidden)
            shapes[f"exit.{layer}.lens_bias"] = (hidden,)
    return shapes
