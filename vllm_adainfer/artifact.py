"""The artifact: a directory of JSON, safetensors and a model card; data only, never code.

config.json           what the policy is for and what it promises (`ArtifactConfig`)
policy.safetensors    probes, classifiers, thresholds
calibration.json      provenance, split sizes, risk curve
README.md             model card
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_adainfer.decision.score import served_shape
from vllm_adainfer.errors import AdaInferError

CONFIG_FILE = "config.json"
POLICY_FILE = "policy.safetensors"
CALIBRATION_FILE = "calibration.json"
CARD_FILE = "README.md"
# What a reader of calibration.json may rely on.
DETAILS = ("rows", "rows_held_out", "seed", "majority_share", "exit_points")


def are_exit_points(points: Sequence[int], layers: int) -> bool:
    """Whether there are points, each once, ascending, and inside a model of so many layers."""
    inside = all(0 < point < layers for point in points)
    return bool(points) and inside and sorted(set(points)) == list(points)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Label(_Strict):
    """A label and the token that decides it: the first one after the prompt."""

    name: str
    token_id: int = Field(ge=0)


class Level(_Strict):
    """One certified row of the epsilon table: which bound, and what it cost and brought."""

    epsilon: float = Field(gt=0, lt=1)
    disagreement: float = Field(description="On the held-out rows that certified the bound.")
    risk: float = Field(description="Mean loss there: the disagreement, or the accuracy lost.")
    bound: float = Field(description="Upper confidence bound of the risk, <= epsilon.")
    layers_saved: float = Field(description="Share of layers, on the same rows.")


class ArtifactConfig(_Strict):
    """``config.json``: the model a policy belongs to and the bounds it was certified for."""

    schema_version: Literal[1] = 1
    base_model: str
    architecture: str
    layers: int = Field(gt=1)
    hidden_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    head_size: int | None = Field(
        None, gt=0, description="Of what the LM head reads, where that is not the hidden size."
    )
    weights_fingerprint: str
    exit_points: tuple[int, ...] = Field(min_length=1)
    probe: Literal["label-head", "lens", "logit-lens"]
    candidates: Literal["labels", "shortlist", "full"]
    labels: tuple[Label, ...] = ()
    features: tuple[str, ...]
    classifier: Literal["svm", "logreg", "threshold", "rbf", "boosting", "crf"]
    epsilon: float = Field(gt=0, lt=1)
    delta: float = Field(gt=0, lt=1)
    risk: Literal["disagreement", "accuracy"] = Field(
        "disagreement", description="What epsilon bounds: changed answers, or accuracy lost."
    )
    bound: Literal["exact", "wsr", "hoeffding-bentkus", "naive"] = "exact"
    max_tokens: int = Field(
        1, ge=1, description="Tokens generated per prompt: 1 speaks of one-token requests only."
    )
    levels: tuple[Level, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> ArtifactConfig:
        points = self.exit_points
        if not are_exit_points(points, self.layers):
            raise ValueError(f"exit_points {points} must ascend between 1 and {self.layers - 1}")
        if (self.candidates == "labels") != bool(self.labels):
            raise ValueError('labels go with candidates = "labels"')
        if self.probe == "label-head" and self.candidates != "labels":
            raise ValueError("a label-head has labels for candidates")
        return self

    @property
    def label_ids(self) -> tuple[int, ...]:
        """Token ids of the labels, in column order of the probe's scores."""
        return tuple(label.token_id for label in self.labels)

    def level_of(self, epsilon: float | None) -> int:
        """Row of the epsilon table that promises `epsilon` (None: the artifact's own).

        Returns:
            the index of the loosest level within `epsilon`, or -1 for 0, which never exits.

        Raises:
            AdaInferError: no certified level is that strict.

        """
        wanted = self.epsilon if epsilon is None else epsilon
        if wanted == 0:
            return -1
        fitting = [i for i, level in enumerate(self.levels) if level.epsilon <= wanted + 1e-12]
        if not fitting:
            strictest = min(level.epsilon for level in self.levels)
            raise AdaInferError(
                f"epsilon {wanted:g} is stricter than the artifact's strictest certified bound "
                f"{strictest:g}: ask for at least that, or calibrate with more rows"
            )
        return max(fitting, key=lambda i: self.levels[i].epsilon)

    def check_served_by(self, hf_config: Any) -> None:
        """Compare with the Hugging Face config of the model about to be served.

        Raises:
            AdaInferError: it is another architecture, depth, width or vocabulary.

        """
        served = {
            "architecture": (hf_config.architectures or ["none"])[0],
            "layers": hf_config.num_hidden_layers,
            "hidden_size": hf_config.hidden_size,
            "vocab_size": hf_config.vocab_size,
        }
        for name, value in served.items():
            if value != getattr(self, name):
                raise AdaInferError(
                    f"the artifact was calibrated for {self.base_model} with {name} = "
                    f"{getattr(self, name)}, but the served model has {name} = {value}: "
                    "calibrate for this model"
                )

    def check_weights(self, fingerprint: str) -> None:
        """Compare with `fingerprint` of the loaded weights.

        Raises:
            AdaInferError: the weights (or their dtype) are not those of the calibration.

        """
        if fingerprint != self.weights_fingerprint:
            raise AdaInferError(
                f"the artifact was calibrated for other weights of this architecture "
                f"({self.base_model}): its weights fingerprint is {self.weights_fingerprint}, "
                f"the served model's is {fingerprint}: calibrate for this checkpoint and dtype"
            )


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: the config and the tensors of ``policy.safetensors``."""

    config: ArtifactConfig
    tensors: dict[str, Tensor]


def load_artifact(source: str) -> Artifact:
    """Read an artifact from a directory or a hub id, and check every shape.

    Raises:
        AdaInferError: it is missing, damaged, or not an artifact.

    """
    directory = _locate(source)
    try:
        text = (directory / CONFIG_FILE).read_text(encoding="utf-8")
        config = ArtifactConfig.model_validate_json(text)
    except (OSError, UnicodeDecodeError) as error:
        raise AdaInferError(f"{directory / CONFIG_FILE} cannot be read ({error})") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "its content"
        raise AdaInferError(
            f"{directory / CONFIG_FILE} is not a valid artifact config ({where}: "
            f"{problem['msg']}): calibrate again"
        ) from None
    try:
        tensors = load_file(directory / POLICY_FILE)
    except (OSError, SafetensorError) as error:
        raise AdaInferError(
            f"{directory / POLICY_FILE} cannot be read ({error}): calibrate again"
        ) from None
    for name, shape in _expected_shapes(config, tensors).items():
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise AdaInferError(
                f"{directory / POLICY_FILE}: tensor {name} must have shape {list(shape)} but "
                f"{'is missing' if found is None else f'has {list(found)}'}: calibrate again"
            )
    return Artifact(config, tensors)


def load_details(source: str) -> dict[str, Any]:
    """``calibration.json`` of an artifact: how it was made, and what each exit point does.

    Raises:
        AdaInferError: it is missing or damaged.

    """
    path = _locate(source) / CALIBRATION_FILE
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdaInferError(f"{path} cannot be read ({error}): calibrate again") from None
    if not isinstance(details, dict) or not details.keys() >= set(DETAILS):
        raise AdaInferError(f"{path} does not hold {', '.join(DETAILS)}: calibrate again")
    return details


def save_artifact(
    directory: Path,
    config: ArtifactConfig,
    tensors: Mapping[str, Tensor],
    calibration: Mapping[str, Any],
    card: str,
    plots: Mapping[str, bytes],
) -> None:
    """Write an artifact under a temporary name, then rename: whole or not at all.

    An artifact that is already there is replaced; anything else in the way is an error.

    Raises:
        AdaInferError: `directory` exists and is no artifact, or cannot be written.

    """
    check_writable(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            (draft / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")
            save_file({k: v.contiguous() for k, v in tensors.items()}, draft / POLICY_FILE)
            (draft / CALIBRATION_FILE).write_text(json.dumps(calibration, indent=2) + "\n")
            (draft / CARD_FILE).write_text(card)
            for name, content in plots.items():
                (draft / name).write_bytes(content)
            draft.chmod(0o755)
            if directory.exists():
                former = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
                directory.replace(former)  # onto an empty directory
                draft.rename(directory)
                shutil.rmtree(former)
            else:
                draft.rename(directory)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise AdaInferError(f"cannot write the artifact to {directory}: {error}") from None


def check_writable(directory: Path) -> None:
    """Fail before the work is done, not after it.

    Raises:
        AdaInferError: something else is there, or the nearest parent takes no files.

    """
    # A model checkpoint has a config.json as well: only the two files together are ours.
    ours = all((directory / name).is_file() for name in (CONFIG_FILE, POLICY_FILE))
    if directory.exists() and not ours and not _is_empty_directory(directory):
        raise AdaInferError(f"{directory} exists and is no output of ours: choose another --output")
    parent = directory.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise AdaInferError(
            f"cannot write to {parent} ({error}): choose another --output"
        ) from None


def _is_empty_directory(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _locate(source: str) -> Path:
    directory = Path(source)
    if not directory.exists() and source.count("/") == 1 and not source.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            directory = Path(snapshot_download(source))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise AdaInferError(
                f"artifact {source!r} is neither a directory nor a hub id that can be "
                f"fetched ({type(error).__name__})"
            ) from None
    for name in (CONFIG_FILE, POLICY_FILE):
        if not (directory / name).is_file():
            raise AdaInferError(
                f"artifact {source!r} has no {name}: give the directory that "
                "`vllm-adainfer calibrate --output` wrote"
            )
    return directory


def _expected_shapes(
    config: ArtifactConfig, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name; each lens may be whole or of any rank."""
    hidden, labels = config.hidden_size, len(config.labels)
    shapes: dict[str, tuple[int, ...]] = {
        "thresholds": (len(config.levels), len(config.exit_points))
    }
    scored = labels
    if config.candidates == "shortlist":
        scored = len(tensors.get("shortlist", ()))
        shapes["shortlist"] = (scored,)
    if config.probe != "label-head" and config.candidates != "full":
        shapes["head_rows"] = (scored, config.head_size or hidden)
    for layer in config.exit_points:
        shapes[f"exit.{layer}.classifier"] = served_shape(config.classifier)
        if config.probe == "label-head":
            shapes[f"exit.{layer}.head_weight"] = (labels, hidden)
            shapes[f"exit.{layer}.head_bias"] = (labels,)
        elif config.probe == "lens":
            up = tensors.get(f"exit.{layer}.lens_up")
            if up is None:
                shapes[f"exit.{layer}.lens_weight"] = (hidden, hidden)
            else:
                rank = len(up)
                shapes[f"exit.{layer}.lens_down"] = (hidden, rank)
                shapes[f"exit.{layer}.lens_up"] = (rank, hidden)
            shapes[f"exit.{layer}.lens_bias"] = (hidden,)
    return shapes


class WeightsFingerprint:
    """A short hash of up to 1,024 evenly spaced elements of every tensor of a checkpoint, by name.

    Of the checkpoint, not of the served parameters: those are stacked, and sharded over ranks.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype` is what the model is served in."""
        self._dtype = dtype
        self._samples: dict[str, bytes] = {}

    def passing(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """`weights` by name, as they are, noted on their way to the model."""
        for name, tensor in weights:
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 1024)][:1024].to("cpu", torch.float32)
            self._samples[name] = str(tensor.dtype).encode() + sample.numpy().tobytes()
            yield name, tensor

    @property
    def hexdigest(self) -> str:
        """Of those that have passed, whatever their order: 16 hex digits."""
        digest = hashlib.sha256(str(self._dtype).encode())
        for name in sorted(self._samples):
            digest.update(name.encode())
            digest.update(self._samples[name])
        return digest.hexdigest()[:16]
