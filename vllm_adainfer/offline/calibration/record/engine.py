"""The vLLM engines of calibration and evaluation: quiet, small and comparable."""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from vllm_adainfer.engine.compat.compilation import find_compiled_code_again
from vllm_adainfer.engine.worker.freed_memory import ENVIRONMENT
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.offline.calibration.data.examples import Example
from vllm_adainfer.offline.progress import say
from vllm_adainfer.settings.engine import CONFIG_KEY

if TYPE_CHECKING:
    from vllm import LLM

# On a GPU, vLLM checks that its share of the memory is free, even if the cache's size is given.
SMALL = {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.05}
BLOCK = 128  # vLLM's default block on a CPU: lengths are rounded up to it


def start_engine(
    model: str,
    examples: Sequence[Example],
    adainfer: dict[str, Any] | None = None,
    max_tokens: int = 1,
    **settings: Any,
) -> LLM:
    """Start an engine with the switch `adainfer`, or stock vLLM if that is None, or empty.

    The longest of `examples` and `max_tokens` set its maximum length; `settings` are further
    arguments of `vllm.LLM`.

    Two engines may run side by side, so idle OpenMP threads sleep, and each engine has a KV cache
    of fixed size. Stock vLLM, too, keeps the memory that it has freed and compiles as ours does, so
    that a comparison shows the savings of exits alone.

    An AdaInferError if vLLM cannot start; the message ends with the reason it gave.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ |= ENVIRONMENT
    find_compiled_code_again()
    say(f"starting {'stock vLLM' if adainfer is None else 'vLLM with the plugin'}")
    with _output_to_file() as log:
        try:
            from vllm import LLM

            longest = max(len(example.token_ids) for example in examples)
            return LLM(
                model=model,
                max_model_len=-(-(longest + max_tokens) // BLOCK) * BLOCK,
                disable_log_stats=True,
                language_model_only=True,  # of a multimodal model; others ignore it
                additional_config={CONFIG_KEY: adainfer or {"enabled": False}},
                **{**SMALL, **settings},
            )
        except Exception as error:
            raise AdaInferError(
                f"vLLM could not start {model}: {_last_words(log, error)}"
            ) from error


def stop_engine(engine: LLM) -> None:
    """Stop an engine's processes now rather than at garbage collection."""
    with _output_to_file():
        engine.llm_engine.engine_core.shutdown()


def _last_words(log: Path, error: Exception) -> str:
    """The error message meant for the user, whichever of vLLM's processes raised it."""
    for found in error.errors() if isinstance(error, ValidationError) else ():
        if found["type"] == "literal_error":  # an option's value that vLLM does not have
            option, given, known = found["loc"][0], found["input"], found["ctx"]["expected"]
            return f"{option} is {given!r}, and should be {known}"
    text = f"{log.read_text(errors='replace')}\n{error}"
    ours = re.findall(rf"{AdaInferError.__name__}: (.+)", text)
    wrapped = re.findall(r"Value error, (.+?)(?: \[type=|\n|$)", text)
    causes = re.findall(r"^(?:\(\S+ pid=\d+\) )?(?:ERROR \S+ \S+ \S+ )?(\w*Error: .+)$", text, re.M)
    return str([*causes, str(error), *wrapped, *ours][-1]).strip()


@contextmanager
def _output_to_file() -> Iterator[Path]:
    """Redirect the output of vLLM and its processes to a file, which is deleted at the end."""
    handle, name = tempfile.mkstemp(prefix="vllm-adainfer-", suffix=".log")
    saved = os.dup(1), os.dup(2)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    try:
        yield Path(name)
    finally:
        for stream in logging.getLogger("vllm").handlers:
            stream.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(saved[0], 1)
        os.dup2(saved[1], 2)
        for descriptor in (handle, *saved):
            os.close(descriptor)
        os.unlink(name)
