"""The artifact as a directory of JSON, safetensors and a model card.

config.json           what the policy is for and what it promises (`ArtifactConfig`)
policy.safetensors    probes, classifiers, thresholds
calibration.json      provenance, split sizes, risk curve
README.md             model card
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.artifact import Artifact, ArtifactConfig
from vllm_adainfer.policy.score import served_shape

CONFIG_FILE = "config.json"
POLICY_FILE = "policy.safetensors"
CALIBRATION_FILE = "calibration.json"
CARD_FILE = "README.md"
MAX_JSON = 64 << 20  # bytes; what we write takes some tens of KiB
UNREADABLE = (OSError, RuntimeError, SafetensorError)  # RuntimeError: more than can be mapped
FLOATS = ("F32", "F16", "BF16")
FILES = (CONFIG_FILE, POLICY_FILE, CALIBRATION_FILE, CARD_FILE)
# What a reader of calibration.json may rely on.
DETAILS = ("rows", "rows_held_out", "seed", "majority_share", "exit_points")


def load_artifact_config(source: str) -> ArtifactConfig:
    """Read an artifact's config from a directory or a hub id.

    The tensors' names, shapes and types are checked against it, without reading the tensors.

    Raises:
        AdaInferError: it is missing, damaged, or not an artifact.

    """
    return _config_of(_locate(source))


def load_artifact_configs(sources: Mapping[str, str]) -> dict[str, ArtifactConfig]:
    """Those of several artifacts, by policy; see `load_artifact_config`."""
    return {name: load_artifact_config(source) for name, source in sources.items()}


def load_artifacts(sources: Mapping[str, str]) -> dict[str, Artifact]:
    """Several artifacts, by policy; see `load_artifact`."""
    return {name: load_artifact(source) for name, source in sources.items()}


def load_artifact(source: str) -> Artifact:
    """Read a whole artifact; see `load_artifact_config`.

    Raises:
        AdaInferError: it is missing, damaged, or not an artifact.

    """
    directory = _locate(source)
    config = _config_of(directory)
    try:
        # Copies: what is loaded is the file itself, which may be overwritten while it serves.
        tensors = {k: v.clone() for k, v in load_file(directory / POLICY_FILE).items()}
    except UNREADABLE as error:
        raise AdaInferError(
            f"{directory / POLICY_FILE} cannot be read ({error}): calibrate again"
        ) from None
    ids = tensors.get("shortlist")
    if ids is not None and not (ids.min() >= 0 and ids.max() < config.vocab_size):
        raise AdaInferError(
            f"{directory / POLICY_FILE}: shortlist has token ids outside the vocabulary of "
            f"{config.vocab_size}: calibrate again"
        )
    return Artifact(config, tensors)


def _config_of(directory: Path) -> ArtifactConfig:
    try:
        config = ArtifactConfig.model_validate_json(_read_json(directory / CONFIG_FILE))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "its content"
        raise AdaInferError(
            f"{directory / CONFIG_FILE} is not a valid artifact config ({where}: "
            f"{problem['msg']}): calibrate again"
        ) from None
    _check_tensors(directory / POLICY_FILE, config)
    return config


def _check_tensors(path: Path, config: ArtifactConfig) -> None:
    """Compare the header of `path` with `config`: nothing is allocated for what does not fit."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            shapes = {name: tuple(part.get_shape()) for name, part in parts.items()}
            dtypes = {name: part.get_dtype() for name, part in parts.items()}
    except UNREADABLE as error:
        raise AdaInferError(f"{path} cannot be read ({error}): calibrate again") from None
    expected = _expected_shapes(config, shapes)
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


def _read_json(path: Path) -> str:
    """The text of a file that is not larger than any of ours.

    Raises:
        AdaInferError: it is, or cannot be read.

    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise AdaInferError(f"{path} is larger than {MAX_JSON >> 20} MiB: calibrate again")
        return text.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise AdaInferError(f"{path} cannot be read ({error}): calibrate again") from None


def load_details(source: str) -> dict[str, Any]:
    """``calibration.json`` of an artifact: how it was made, and what each exit point does.

    Raises:
        AdaInferError: it is missing or damaged.

    """
    path = _locate(source) / CALIBRATION_FILE
    _check_inside(path.parent, path)
    try:
        details = json.loads(_read_json(path))
    except (json.JSONDecodeError, RecursionError) as error:
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
                _replace(directory, draft)
            else:
                draft.rename(directory)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise AdaInferError(f"cannot write the artifact to {directory}: {error}") from None


def _replace(directory: Path, draft: Path) -> None:
    """Put `draft` where `directory` is, which comes back if that fails.

    Raises:
        AdaInferError: it failed, and `directory` could not be put back either.

    """
    former = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        directory.replace(former)  # onto an empty directory
    except OSError:
        former.rmdir()
        raise
    try:
        draft.rename(directory)
    except OSError as error:
        try:
            former.replace(directory)
        except OSError:
            raise AdaInferError(
                f"cannot write the artifact to {directory} ({error}); the one that was there is "
                f"now {former}: move it back"
            ) from None
        raise
    shutil.rmtree(former, ignore_errors=True)


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
            directory = Path(snapshot_download(source, allow_patterns=list(FILES)))
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
        _check_inside(directory, directory / name)
    return directory


def _check_inside(directory: Path, path: Path) -> None:
    """Follow links of an artifact only where they stay in it, or lead to the hub's own cache.

    Raises:
        AdaInferError: `path` leads elsewhere.

    """
    home, target = directory.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"  # where the hub's snapshots link to
    if not (target.is_relative_to(home) or target.parent == blobs):
        raise AdaInferError(
            f"{path} is a link that leads out of the artifact: copy the file there instead"
        )


def _expected_shapes(
    config: ArtifactConfig, found: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name; each lens may be whole or of any rank, as `found`."""
    hidden, labels = config.hidden_size, len(config.labels)
    shapes: dict[str, tuple[int, ...]] = {
        "thresholds": (len(config.levels), len(config.exit_points))
    }
    scored = labels
    if config.candidates == "shortlist":
        scored = (found.get("shortlist") or (0,))[0]
        shapes["shortlist"] = (scored,)
    if config.probe != "label-head" and config.candidates != "full":
        shapes["head_rows"] = (scored, config.head_size or hidden)
    for layer in config.exit_points:
        shapes[f"exit.{layer}.classifier"] = served_shape(config.classifier)
        if config.probe == "label-head":
            shapes[f"exit.{layer}.head_weight"] = (labels, hidden)
            shapes[f"exit.{layer}.head_bias"] = (labels,)
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
