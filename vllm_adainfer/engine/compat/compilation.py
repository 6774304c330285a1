"""vLLM's compiler and its cache."""

from __future__ import annotations

import copy
import os
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.config import VllmConfig

GRAPH_FOLDERS = "aotautograd", "fxgraph"  # torch 2.13's names in Inductor's cache


def segment_config(vllm_config: VllmConfig) -> VllmConfig:
    """A config to compile segments with that does not depend on our settings.

    vLLM 0.32 puts ``additional_config`` into the key of its compile cache. A segment's code depends
    only on its layers, which its name states, so recalibrated artifacts reuse cached segments.
    """
    config = copy.copy(vllm_config)
    config.additional_config = {}
    return config


def compile_cache_folder(name: str) -> AbstractContextManager[None]:
    """Give modules built in this context their own folder, `name`, in vLLM's compile cache.

    vLLM 0.32 identifies compiled graphs by their folder and a number, which starts at 0 in each
    module; modules built under the same tag share a folder. Unless whole modules are stored
    (``VLLM_USE_MEGA_AOT_ARTIFACT``, the default with torch 2.12), one would run another's code.
    """
    from vllm.compilation.backends import set_model_tag

    return set_model_tag(name)


def share_compiled_graphs() -> None:
    """Let the module that is about to be compiled ahead of time find equal graphs of others.

    For each module vLLM 0.32 changes Inductor's cache to a folder of its own (`decorators.py`: a
    hash of its settings and ``forward``), so equal segments would all be compiled. Torch 2.13 keeps
    whole graphs in two folders of it, by all that they depend on: here links to one place. Other
    files stay the module's own, for later starts, which do not look for graphs. Nothing is replaced
    (another rank may be about to write); without links, a start takes longer.
    """
    own = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    for name in GRAPH_FOLDERS:
        shared = own.parents[1] / "vllm_adainfer" / name
        with suppress(OSError):
            shared.mkdir(parents=True, exist_ok=True)
            # Relative: the cache may be copied into a container.
            (own / name).symlink_to(os.path.relpath(shared, own), target_is_directory=True)


def find_compiled_code_again() -> None:
    """On a CPU, let a later start find what this one compiles, unless the environment decides.

    On a CPU, vLLM 0.32 cannot load what it compiles ahead of time (`_try_load_aot_compiled_fn` of
    `decorators.py` expects the `finalize_loading` of `VllmBackend`, which a CPU does not use), and
    compiles all of it again. Otherwise Inductor finds its code in its own cache.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_USE_AOT_COMPILE", "0")


def names_experts() -> bool:
    """Whether compiled code finds a layer's experts by the layer's name.

    Otherwise vLLM 0.32 counts layers through each forward pass (`moe_runner.py`).
    """
    from vllm.utils import torch_utils

    return bool(torch_utils._USE_LAYERNAME)
