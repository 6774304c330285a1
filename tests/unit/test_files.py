"""Files and directories are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_adainfer.files import PUBLIC, replace_file, whole_directory, whole_file


@pytest.fixture(autouse=True)
def _usual_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("mode", "found"), [(0o600, 0o600), (PUBLIC, 0o644)])
def test_a_file_is_replaced_and_has_the_mode_that_is_asked_for(tmp_path, mode, found):
    path = tmp_path / "file"
    path.write_text("before")
    replace_file(path, "é", mode)
    assert path.read_bytes() == "é".encode()
    assert mode_of(path) == found
    assert list(tmp_path.iterdir()) == [path]


def test_only_this_user_may_read_a_draft_also_while_another_library_writes_it(tmp_path):
    path, weights = tmp_path / "file", torch.arange(3)
    with whole_file(path) as draft:
        save_file({"weights": weights}, draft)
        assert mode_of(draft) == 0o600
        assert not path.exists()
    np.testing.assert_array_equal(load_file(path)["weights"], weights)
    assert mode_of(path) == 0o600


def test_a_file_that_is_not_finished_leaves_the_former_one_and_no_draft(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"before")

    def killed() -> None:
        with whole_file(path) as draft:
            draft.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        killed()
    assert [one.read_text() for one in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("there", [False, True])
def test_a_directory_appears_once_it_is_filled_in_place_of_the_former_one(tmp_path, there):
    path = tmp_path / "new" / "directory"
    if there:
        path.mkdir(parents=True)
        (path / "former").touch()
    with whole_directory(path, 0o700) as draft:
        (draft / "file").touch()
        assert [one.name for one in path.parent.glob("[!.]*/*")] == ["former"] * there
    assert [one.name for one in path.iterdir()] == ["file"]
    assert mode_of(path) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_a_directory_that_is_not_filled_leaves_the_former_one(tmp_path):
    path = tmp_path / "directory"
    path.mkdir()

    def without_space() -> None:
        with whole_directory(path) as draft:
            (draft / "file").touch()
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        without_space()
    assert list(tmp_path.rglob("*")) == [path]


def test_a_link_to_a_directory_stays_one(tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "link"
    link.symlink_to("there")
    with whole_directory(link) as draft:
        (draft / "file").touch()
    assert link.is_symlink()
    assert (tmp_path / "there" / "file").exists()
