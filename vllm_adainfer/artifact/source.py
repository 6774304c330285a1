"""Find an artifact, in a directory or on the Hugging Face hub, and read it as one piece."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from vllm_adainfer.errors import AdaInferError

CONFIG_FILE = "config.json"
POLICY_FILE = "policy.safetensors"
CALIBRATION_FILE = "calibration.json"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, POLICY_FILE, CALIBRATION_FILE, CARD_FILE)
SERVED_FILES = (CONFIG_FILE, POLICY_FILE)
FOLDER = "adainfer"  # of an artifact that is bundled with a model or adapter, in its directory
# The encoder of a student, in the files in which transformers keeps one.
STUDENT_CONFIG = "student/config.json"
STUDENT_WEIGHTS = "student/model.safetensors"
STUDENT_TOKENIZER = "student/tokenizer.json"
STUDENT_FILES = (STUDENT_CONFIG, STUDENT_WEIGHTS, STUDENT_TOKENIZER)


class Pinned(NamedTuple):
    """An artifact as one process has found it, for others on its machine to read.

    Attributes:
        directory: where it lies; of a hub id that of its snapshot.
        digest: see `Artifact.digest`.

    """

    directory: str
    digest: str


def locate(source: str, names: tuple[str, ...] = SERVED_FILES) -> Path:
    """The directory of an artifact, downloaded first if `source` is a hub id.

    An id may end in ``@`` and a branch, tag or commit.

    An AdaInferError if one of the files `names` is missing, or a link that leads elsewhere.
    """
    directory = Path(source)
    if not directory.exists() and source.count("/") == 1 and not source.startswith((".", "/")):
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HFValidationError

        try:
            repo, _, revision = source.partition("@")
            patterns = [*FILES, *STUDENT_FILES]
            directory = Path(
                snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
            )
        except (OSError, HFValidationError) as error:
            raise AdaInferError(
                f"artifact {source!r} is neither a directory nor a hub id that can be "
                f"fetched ({type(error).__name__})"
            ) from None
    check_files(source, directory, names)
    return directory


def bundled(directory: str | Path) -> Path | None:
    """The folder of the artifact bundled with a model or adapter; None without one."""
    folder = Path(directory) / FOLDER
    return folder if folder.is_dir() else None


def check_files(source: str, directory: Path, names: tuple[str, ...]) -> None:
    """Check that the files `names` of the artifact `source` are in its `directory`.

    An AdaInferError if one of them is missing, or a link that leads elsewhere.
    """
    home = directory.resolve()
    blobs = home.parent.parent / "blobs"  # the target of links in the hub's snapshots
    for name in names:
        path = directory / name
        if not path.is_file():
            raise AdaInferError(
                f"artifact {source!r} has no {name}: give the directory that "
                "`vllm-adainfer calibrate --output` wrote"
            )
        target = path.resolve()
        if not (target.is_relative_to(home) or target.parent == blobs):
            raise AdaInferError(
                f"{path} is a link that leads out of the artifact: copy the file there instead"
            )


@contextmanager
def unchanged(source: str) -> Iterator[Path]:
    """The directory of an artifact, whose served files must not change while they are read.

    An AdaInferError if there is no artifact, or it was overwritten.
    """
    directory = locate(source)
    before = _stamps(directory)
    try:
        yield directory
    finally:  # also after an error: files of two writes do not fit together
        if _stamps(directory) != before:
            raise AdaInferError(f"artifact {source!r} was overwritten while it was read: try again")


def _stamps(directory: Path) -> list[tuple[int, int, int]]:
    """What tells the served files from others in their place; empty if one is missing."""
    try:
        found = [(directory / name).stat() for name in _served_files(directory)]
    except OSError:
        return []
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found]


def _served_files(directory: Path) -> tuple[str, ...]:
    """What serving reads: with a student, its files, too."""
    student = (name for name in STUDENT_FILES if (directory / name).is_file())
    return (*SERVED_FILES, *student)


def files_digest(directory: Path) -> str:
    """SHA-256, in hex digits, of the SHA-256 of each served file."""
    digest = hashlib.sha256()
    for name in _served_files(directory):
        part = hashlib.sha256()
        add_file(part, directory / name)
        digest.update(part.digest())
    return digest.hexdigest()


def add_file(digest: hashlib._Hash, path: Path) -> None:
    """Update `digest` with the content of a file, of any size."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
