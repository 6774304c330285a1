"""Whether the libraries that draw pages are installed; serving does without them."""

from __future__ import annotations

from importlib.util import find_spec

from vllm_adainfer.errors import AdaInferError

LIBRARIES = ("jinja2", "plotly")


def check_installed() -> None:
    """Check that HTML pages can be made, before any long work starts.

    Raises:
        AdaInferError: a library is missing.

    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise AdaInferError(
            f"an HTML page needs {' and '.join(missing)}: pip install 'vllm-adainfer[reports]'"
        )
