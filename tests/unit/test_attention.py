from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_adainfer.engine.attention import with_own_builders
from vllm_adainfer.errors import AdaInferError


def test_a_backend_that_writes_keys_only_where_it_attends_is_refused():
    backend = SimpleNamespace(forward_includes_kv_cache_update=True, get_name=lambda: "HPC_ATTN")
    with pytest.raises(AdaInferError, match="HPC_ATTN cannot write keys and values of rows"):
        with_own_builders([[SimpleNamespace(backend=backend)]], None, torch.device("cpu"))
