"""What an engine has recorded, as calibration takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vllm_adainfer.policy.probe import Probe, logit_lens_of


def taken_from(engine: Any, folder: Path) -> tuple[dict[str, Tensor], Probe]:
    """The decision rows, by name and sorted by prompt, and the model's own head."""
    [facts] = engine.collective_rpc("adainfer_take_record", args=(str(folder),))
    rows = load_file(folder / "000001.safetensors")
    order = rows["tags"].argsort()
    lens = logit_lens_of(load_file(folder / "head.safetensors"), facts["norm"])
    return {name: part[order] for name, part in rows.items()}, lens
