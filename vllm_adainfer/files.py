"""Files and directories that are written whole or not at all.

They are written beside their place, under a name that begins with a dot, and then renamed. A
process that is killed leaves such a draft, and what was there before.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vllm_adainfer.errors import AdaInferError

PRIVATE, PUBLIC = 0o600, 0o666  # less what the umask takes away


@contextmanager
def whole_file(path: Path, mode: int = PRIVATE) -> Iterator[Path]:
    """A draft to write, which becomes `path` once the context ends, unless it raises.

    A file that is there is replaced. The draft has its mode from the first byte on.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def replace_file(path: Path, content: str | bytes, mode: int = PRIVATE) -> None:
    """Write a file whole, see `whole_file`; a text in UTF-8."""
    with whole_file(path, mode) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def whole_directory(path: Path, mode: int = 0o755) -> Iterator[Path]:
    """A draft to fill, which becomes the directory `path` once the context ends, unless it raises.

    Its parents are created, and a directory that is there is replaced.

    Raises:
        AdaInferError: it could not be replaced, and what was there could not be put back.
        OSError: it cannot be written; what was there still is.

    """
    path = path.resolve()  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield draft
        draft.chmod(mode)
        if path.exists():
            _replace(path, draft)
        else:
            draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _replace(path: Path, draft: Path) -> None:
    former = draft.with_name(f"{draft.name}-former")
    path.replace(former)
    try:
        draft.rename(path)
    except OSError as error:
        try:
            former.replace(path)
        except OSError:
            raise AdaInferError(
                f"cannot write {path} ({error}); the previous one is now {former}: move it back"
            ) from None
        raise
    shutil.rmtree(former, ignore_errors=True)


def private(path: str, flags: int) -> int:
    """An opener of files that only this user may read."""
    return os.open(path, flags, PRIVATE)
