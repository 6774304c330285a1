"""Read and write artifacts: directories of JSON, safetensors and a model card.

config.json           what the policy is for and what it promises (`ArtifactConfig`)
policy.safetensors    probes, classifiers, thresholds
calibration.json      provenance, split sizes, risk curve
README.md             model card
student/              the encoder of a student and its tokenizer, in the files of transformers
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from vllm_adainfer.artifact.artifact import Artifact, Encoder
from vllm_adainfer.artifact.config import ArtifactConfig
from vllm_adainfer.artifact.fields import Student
from vllm_adainfer.artifact.source import (
    CALIBRATION_FILE,
    CARD_FILE,
    CONFIG_FILE,
    POLICY_FILE,
    SERVED_FILES,
    STUDENT_CONFIG,
    STUDENT_FILES,
    STUDENT_TOKENIZER,
    STUDENT_WEIGHTS,
    Pinned,
    add_file,
    check_files,
    files_digest,
    locate,
    unchanged,
)
from vllm_adainfer.artifact.tensors import UNREADABLE, check_tensors
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.files import whole_directory

MAX_JSON = 64 << 20  # bytes; the files we write take tens of KiB
# The keys of calibration.json that readers rely on.
DETAILS = ("rows", "rows_held_out", "seed", "majority_share", "exit_points")


def load_artifact_config(source: str) -> ArtifactConfig:
    """Read an artifact's config from a directory or a hub id.

    The names, shapes and types of the tensors are checked against it, without reading the tensors.

    An AdaInferError if it is missing or damaged, or it is not an artifact.
    """
    with unchanged(source) as directory:
        return _read_config(directory)


def load_config_and_digest(source: str) -> tuple[ArtifactConfig, str]:
    """An artifact's config, and its `Artifact.digest`; raises what `load_artifact_config` does."""
    with unchanged(source) as directory:
        return _read_config(directory), files_digest(directory)


def pin(source: str) -> Pinned:
    """Find an artifact, and read what serving would; raises what `load_artifact_config` does."""
    directory = str(locate(source))
    return Pinned(directory, load_config_and_digest(directory)[1])


def load_artifact(source: str) -> Artifact:
    """Read a whole artifact; raises what `load_artifact_config` does."""
    with unchanged(source) as directory:
        config = _read_config(directory)
        encoder = None if config.student is None else _read_encoder(directory, config.student)
        tensors = _read_tensors(directory, config)
        return Artifact(config, tensors, files_digest(directory), encoder)


def load_student_tokenizer(source: str) -> str:
    """The file of a student's tokenizer, JSON; raises what `load_artifact_config` does."""
    with unchanged(source) as directory:
        return _read_text(directory / STUDENT_TOKENIZER)


def _read_encoder(directory: Path, student: Student) -> Encoder:
    settings = _read_json(directory / STUDENT_CONFIG)
    largest = _largest_token(directory / STUDENT_TOKENIZER, student)
    return Encoder(settings, _read_file(directory / STUDENT_WEIGHTS), largest)


def _largest_token(path: Path, student: Student) -> int:
    """The largest id that a student's tokenizer gives a token of a text.

    An AdaInferError if it is no tokenizer, or leaves no room for a text.
    """
    try:
        tokenizer = Tokenizer.from_str(_read_text(path))
    except Exception as error:
        raise AdaInferError(f"{path} cannot be read ({error}): calibrate again") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    around = tokenizer.encode("").ids  # of every text; they need not be in the vocabulary
    if len(around) >= student.most_tokens:
        raise AdaInferError(
            f"{path} puts {len(around)} tokens around every text, and the student reads at most "
            f"{student.most_tokens}: calibrate again"
        )
    return max([*around, *tokenizer.get_vocab().values()], default=0)


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        # Copies, because the loaded tensors map the file, which may be overwritten while we serve.
        return {k: v.clone() for k, v in load_file(path).items()}
    except UNREADABLE as error:
        raise AdaInferError(f"{path} cannot be read ({error}): calibrate again") from None


def _read_tensors(directory: Path, config: ArtifactConfig) -> dict[str, Tensor]:
    path = directory / POLICY_FILE
    tensors = _read_file(path)
    ids = tensors.get("shortlist")
    if ids is not None and not (ids.min() >= 0 and ids.max() < config.vocab_size):
        raise AdaInferError(
            f"{path}: shortlist has token ids outside the vocabulary of {config.vocab_size}: "
            "calibrate again"
        )
    return tensors


def _read_config(directory: Path) -> ArtifactConfig:
    path = directory / CONFIG_FILE
    try:
        config = ArtifactConfig.model_validate_json(_read_text(path))
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "its content"
        what = problem["msg"].removeprefix("Value error, ")
        raise AdaInferError(
            f"{path} is not a valid artifact config ({where}: {what}): calibrate again"
        ) from None
    check_tensors(directory / POLICY_FILE, config)
    if config.student is not None:
        check_files(str(directory), directory, STUDENT_FILES)
        tokenizer = hashlib.sha256()
        add_file(tokenizer, directory / STUDENT_TOKENIZER)
        if tokenizer.hexdigest() != config.student.tokenizer:
            raise AdaInferError(
                f"{directory / STUDENT_TOKENIZER} is not the tokenizer that the student was "
                "trained with: calibrate again"
            )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    An AdaInferError if it cannot be read, or holds something else.
    """
    try:
        found = json.loads(_read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise AdaInferError(f"{path} cannot be read ({error}): calibrate again") from None
    if not isinstance(found, dict):
        raise AdaInferError(f"{path} does not hold an object: calibrate again")
    return found


def _read_text(path: Path) -> str:
    """The text of a file of at most `MAX_JSON` bytes.

    An AdaInferError if it is larger, or it cannot be read.
    """
    try:
        if path.stat().st_size > MAX_JSON:
            raise AdaInferError(f"{path} is larger than {MAX_JSON >> 20} MiB: calibrate again")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdaInferError(f"{path} cannot be read ({error}): calibrate again") from None


def load_details(source: str) -> dict[str, Any]:
    """``calibration.json`` of an artifact: how it was made, and what each exit point does.

    An AdaInferError if it is missing or damaged.
    """
    path = locate(source, (CALIBRATION_FILE,)) / CALIBRATION_FILE
    details = _read_json(path)
    if not details.keys() >= set(DETAILS):
        raise AdaInferError(f"{path} does not hold {', '.join(DETAILS)}: calibrate again")
    return details


def save_artifact(
    directory: Path,
    config: ArtifactConfig,
    tensors: Mapping[str, Tensor],
    calibration: Mapping[str, Any],
    card: str,
    encoder: Encoder | None = None,
    tokenizer: str = "",
) -> None:
    """Write an artifact under a temporary name, then rename it: all of it or nothing.

    An artifact that is already there is replaced; anything else in its place is an error.
    `encoder` and `tokenizer`, the text of its file, are those of a student.

    An AdaInferError if `directory` exists and is not an artifact, or cannot be written.
    """
    check_writable(directory)
    try:
        with whole_directory(directory) as draft:
            (draft / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n")
            save_file({k: v.contiguous() for k, v in tensors.items()}, draft / POLICY_FILE)
            (draft / CALIBRATION_FILE).write_text(json.dumps(calibration, indent=2) + "\n")
            (draft / CARD_FILE).write_text(card)
            if encoder is not None:
                (draft / STUDENT_CONFIG).parent.mkdir()
                (draft / STUDENT_CONFIG).write_text(json.dumps(encoder.settings, indent=2) + "\n")
                save_file(encoder.tensors, draft / STUDENT_WEIGHTS)
                (draft / STUDENT_TOKENIZER).write_text(tokenizer, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise AdaInferError(f"cannot write the artifact to {directory}: {error}") from None


def check_writable(directory: Path) -> None:
    """Check, before the work starts, that an artifact can be written to `directory`.

    An AdaInferError if something else is there, or the nearest parent is not writable.
    """
    # A model checkpoint has a config.json too, so only both files together mark an artifact.
    there = {path.name for path in directory.iterdir()} if directory.is_dir() else {"a file"}
    if directory.exists() and there and not there.issuperset(SERVED_FILES):
        raise AdaInferError(
            f"{directory} exists and was not written by vllm-adainfer: choose another --output"
        )
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
