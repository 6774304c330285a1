"""Where an artifact comes from: a directory, or a repository of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from vllm_adainfer.errors import AdaInferError

CONFIG_FILE = "config.json"
POLICY_FILE = "policy.safetensors"
CALIBRATION_FILE = "calibration.json"
CARD_FILE = "README.md"
FILES = (CONFIG_FILE, POLICY_FILE, CALIBRATION_FILE, CARD_FILE)
SERVED_FILES = (CONFIG_FILE, POLICY_FILE)

Stamps: TypeAlias = tuple[tuple[int, int, int], ...]


def locate(source: str) -> Path:
    """The directory of an artifact, downloaded first if `source` is a hub id.

    Raises:
        AdaInferError: there is no artifact, or a file in it is a link that leads elsewhere.

    """
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
    for name in SERVED_FILES:
        if not (directory / name).is_file():
            raise AdaInferError(
                f"artifact {source!r} has no {name}: give the directory that "
                "`vllm-adainfer calibrate --output` wrote"
            )
        check_inside(directory, directory / name)
    return directory


def check_inside(directory: Path, path: Path) -> None:
    """Refuse a link that leads out of an artifact, unless into the hub's own cache.

    Raises:
        AdaInferError: `path` leads elsewhere.

    """
    home, target = directory.resolve(), path.resolve()
    blobs = home.parent.parent / "blobs"  # the target of links in the hub's snapshots
    if not (target.is_relative_to(home) or target.parent == blobs):
        raise AdaInferError(
            f"{path} is a link that leads out of the artifact: copy the file there instead"
        )


@contextmanager
def of_one_write(source: str) -> Iterator[Path]:
    """The directory of an artifact, whose files stay the same ones while they are read.

    Raises:
        AdaInferError: there is no artifact, or it was overwritten.

    """
    directory = locate(source)
    before = stamps_of(directory)
    try:
        yield directory
    finally:  # what was read is then of two writes, and what it looks like is no news
        if stamps_of(directory) != before:
            raise AdaInferError(f"artifact {source!r} was overwritten while it was read: try again")


def stamps_of(directory: Path) -> Stamps:
    """What tells the files that are served from others in their place; () if one is missing."""
    try:
        found = [(directory / name).stat() for name in SERVED_FILES]
    except OSError:
        return ()
    return tuple((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in found)
