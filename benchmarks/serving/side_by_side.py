"""A stock server and those with the plugin, run side by side to be measured in turn."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common.server import Server, serving
from benchmarks.serving.serve_report import NEVER, OURS, STOCK

SAVES_NOTHING = {"epsilon": 0, "finish_choices": False}
ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",  # an idle server leaves its core to the other one
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # provides /reset_prefix_cache
}


@contextmanager
def side_by_side(
    model: str, switch: Mapping[str, Any], flags: Sequence[str], control: bool = False
) -> Iterator[dict[str, Server]]:
    """The servers, by name: ours and stock, and with `control` one of ours that saves nothing.

    Ours starts first, because it may refuse `switch`.
    """
    switches = {OURS: switch, STOCK: None}
    if control:
        switches[NEVER] = {**switch, **SAVES_NOTHING}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = {}
        for number, (name, own) in enumerate(switches.items()):
            environment = ENVIRONMENT if own else {**ENVIRONMENT, "VLLM_PLUGINS": ""}
            log = Path(folder, f"{number}.log")
            servers[name] = stack.enter_context(serving(model, own, log, flags, environment))
        yield servers
