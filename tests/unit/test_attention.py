from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_adainfer.engine.compat.attention import share_workspace
from vllm_adainfer.engine.segments.attention import with_own_builders
from vllm_adainfer.errors import AdaInferError


def cache_of(*names: list[str]) -> SimpleNamespace:
    """A KV cache with these layers in its groups."""
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(layer_names=each) for each in names])


def test_a_backend_that_writes_keys_only_where_it_attends_is_refused():
    backend = SimpleNamespace(
        forward_includes_kv_cache_update=True, is_ssm=lambda: False, get_name=lambda: "HPC_ATTN"
    )
    group = SimpleNamespace(backend=backend, layer_names=["0"])
    with pytest.raises(AdaInferError, match="HPC_ATTN cannot write keys and values of rows"):
        with_own_builders([[group]], cache_of(["0"]), None, torch.device("cpu"))


@pytest.mark.parametrize("lacking", ["1", "2"])
def test_metadata_without_a_layer_of_the_cache_are_never_built(lacking):
    cached = [["0"], ["1", "2"]]
    groups = [
        [SimpleNamespace(layer_names=[name]) for name in names if name != lacking]
        for names in cached
    ]
    with pytest.raises(AssertionError, match=rf"no metadata would be built for \['{lacking}'\]"):
        with_own_builders(groups, cache_of(*cached), None, torch.device("cpu"))


class Builder:
    """Of FlashInfer's kind."""

    workspace = None

    def _get_workspace_buffer(self):
        self.workspace = self.workspace or object()
        return self.workspace

    def set_workspace_buffer(self, workspace):
        self.workspace = workspace


def groups_of(*builders: object) -> list[list[SimpleNamespace]]:
    return [[SimpleNamespace(metadata_builders=[builder])] for builder in builders]


def test_our_builders_use_the_workspace_of_the_runners():
    theirs, ours, plain = Builder(), [Builder(), Builder()], object()
    share_workspace(groups_of(plain, theirs), groups_of(ours[0], plain, ours[1]))
    assert {builder.workspace for builder in (theirs, *ours)} == {theirs.workspace}


@pytest.mark.parametrize("theirs", [(), (SimpleNamespace(),)], ids=["no builder", "no workspace"])
def test_ours_keep_to_themselves_where_the_runner_has_no_workspace(theirs):
    ours = Builder()
    share_workspace(groups_of(*theirs), groups_of(ours))
    assert ours.workspace is None
