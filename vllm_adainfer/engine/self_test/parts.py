"""The parts that the self-test can disable."""

from __future__ import annotations

from typing import Literal, get_args

Part = Literal["kernels", "segment_graphs", "vllm_graphs", "compiled_code", "exits"]
PARTS: tuple[Part, ...] = get_args(Part)
