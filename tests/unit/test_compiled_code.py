"""A later start finds the code that an earlier one compiled, and a module that of others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from vllm_adainfer.engine.compat.compilation import (
    GRAPH_FOLDERS,
    find_compiled_code_again,
    share_compiled_graphs,
)

NAME = "VLLM_USE_AOT_COMPILE"


@pytest.mark.parametrize(
    ("is_cpu", "chosen", "expected"),
    [(True, None, "0"), (True, "1", "1"), (False, None, None)],
    ids=["on a CPU", "the environment decides", "elsewhere vLLM's own way works"],
)
def test_code_is_not_compiled_ahead_where_it_could_not_be_loaded(
    monkeypatch, is_cpu, chosen, expected
):
    from vllm.platforms import current_platform

    environment = {} if chosen is None else {NAME: chosen}
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _: is_cpu)
    monkeypatch.setattr(os, "environ", environment)
    find_compiled_code_again()
    assert environment.get(NAME) == expected


def a_modules_cache(monkeypatch: pytest.MonkeyPatch, parent: Path, name: str) -> Path:
    """Inductor's cache of a module that is about to be compiled, as vLLM sets it."""
    cache = parent / "torch_aot_compile" / name / "inductor_cache"
    cache.mkdir(parents=True, exist_ok=True)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(cache))
    return cache


@pytest.mark.parametrize("folder", GRAPH_FOLDERS)
def test_graphs_of_one_module_are_found_by_the_next_also_where_the_cache_was_moved(
    tmp_path, monkeypatch, folder
):
    for name in "first", "second":
        cache = a_modules_cache(monkeypatch, tmp_path / "built", name)
        share_compiled_graphs()
        share_compiled_graphs()  # as another rank
        (cache / "own").touch()
        (cache / folder / name).touch()
    moved = (tmp_path / "built").rename(tmp_path / "moved") / "torch_aot_compile"
    for name in "first", "second":
        graphs = moved / name / "inductor_cache" / folder
        assert sorted(path.name for path in graphs.iterdir()) == ["first", "second"]
    assert (moved / "first" / "inductor_cache" / "own").exists()


def test_a_module_that_has_graphs_of_its_own_keeps_them(tmp_path, monkeypatch):
    """They are there where it was compiled by an earlier version, or another rank was faster."""
    cache = a_modules_cache(monkeypatch, tmp_path, "first")
    own = cache / GRAPH_FOLDERS[0] / "graph"
    own.parent.mkdir()
    own.touch()
    share_compiled_graphs()
    assert own.exists()
    assert not own.parent.is_symlink()
    assert (cache / GRAPH_FOLDERS[1]).is_symlink()
