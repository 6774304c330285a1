"""A stock server and one with the plugin, run side by side to be measured in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common.server import Server, serving
from benchmarks.serving.serve_report import OURS, STOCK

ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # an idle server leaves its core to the other one
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # provides /reset_prefix_cache
}


@contextmanager
def side_by_side(
    model: str, switch: Mapping[str, Any], flags: Sequence[str]
) -> Iterator[dict[str, Server]]:
    """Both servers, by name. Ours starts first, because it may refuse `switch`."""
    without = {**ENVIRONMENT, "VLLM_PLUGINS": ""}
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(model, switch, Path(folder, "ours.log"), flags, ENVIRONMENT) as ours,
        serving(model, None, Path(folder, "stock.log"), flags, without) as stock,
    ):
        yield {OURS: ours, STOCK: stock}
