"""The tensors of an artifact: their names, shapes and types follow from its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.score import served_shape

UNREADABLE = (OSError, RuntimeError, SafetensorError)  # RuntimeError: more than can be mapped
FLOATS = ("F32", "F16", "BF16")


def check_tensors(path: Path, config: ArtifactConfig) -> None:
    """Compare the header of `path` with `config`, before any tensor is read.

    Raises:
        AdaInferError: a tensor is missing, unknown, or has another shape or type.

    """
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            dtypes = {name: part.get_dtype() for name, part in parts.items()}
    except UNREADABLE as error:
        raise AdaInferError(f"{path} cannot be read ({error}): calibrate again") from None
    expected = expected_shapes(config, shapes)
    if expected.get("shortlist", (2,))[0] < 2:
        raise AdaInferError(
            f"{path}: there is nothing to decide in a shortlist of fewer than two tokens: "
            "calibrate again"
        )
    for name, shape in expected.items():
        found = shapes.get(name)
        if found != shape:
            raise AdaInferError(
                f"{path}: tensor {name} must have shape {list(shape)} but "
                f"{'is missing' if found is None else f'has {list(found)}'}: calibrate again"
            )
        allowed = ("I64",) if name == "shortlist" else FLOATS
        if dtypes[name] not in allowed:
            raise AdaInferError(
                f"{path}: tensor {name} must be {' or '.join(allowed)} but is {dtypes[name]}: "
                "calibrate again"
            )
    unknown = sorted(shapes.keys() - expected.keys())
    if unknown:
        raise AdaInferError(
            f"{path}: tensor {unknown[0]!r:.80} does not belong to this policy: calibrate again"
        )


def expected_shapes(
    config: ArtifactConfig, found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by name; `found` says whether a lens is full or of which rank."""
    hidden, labels = config.hidden_size, len(config.labels)
    head_rows = labels + (config.risk == "probability")  # the last is for the label mass
    shapes: dict[str, tuple[int, ...]] = {"thresholds": (config.num_tags, len(config.exit_points))}
    scored = labels
    if config.candidates == "shortlist":
        scored = (found.get("shortlist") or (0,))[0]
        shapes["shortlist"] = (scored,)
    if config.probe != "label-head" and config.candidates != "full":
        shapes["head_rows"] = (scored, config.head_size or hidden)
    for layer in config.exit_points:
        shapes[f"exit.{layer}.classifier"] = served_shape(config.classifier, len(config.features))
        if config.probe == "label-head":
            shapes[f"exit.{layer}.head_weight"] = (head_rows, hidden)
            shapes[f"exit.{layer}.head_bias"] = (head_rows,)
        elif config.probe == "lens":
            up = found.get(f"exit.{layer}.lens_up")
            if up is None:
                shapes[f"exit.{layer}.lens_weight"] = (hidden, hidden)
            else:
                rank = (up or (0,))[0]
                shapes[f"exit.{layer}.lens_down"] = (hidden, rank)
                shapes[f"exit.{layer}.lens_up"] = (rank, hidden)
            shapes[f"exit.{layer}.lens_bias"] = (hidden,)
    return shapes
