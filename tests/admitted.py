"""What an admission decides about a request, as scheduler and worker ask it in turn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from vllm_adainfer.engine.admission import traffic_sample as sample
from vllm_adainfer.engine.admission.admission import Admission
from vllm_adainfer.engine.admission.running import Running
from vllm_adainfer.engine.admission.traffic_sample import in_traffic_sample
from vllm_adainfer.engine.compat.requests import client_request_id
from vllm_adainfer.engine.runner.adapters import fingerprint_of


def resolved(admission: Admission, params: Any, adapter: Any = None) -> Running:
    """What the scheduler decides."""
    return admission.arrival.resolve("id", params, adapter)


def admitted(
    admission: Admission, params: Any, prompt: Sequence[int] = (), adapter: Any = None
) -> Running:
    """What the worker remembers; it reads the adapter's files as vLLM loads it."""
    fingerprint = None if adapter is None else fingerprint_of(adapter.lora_path)
    return admission.admit(resolved(admission, params, adapter), prompt, adapter, fingerprint)


def row_of(
    admission: Admission, params: Any, prompt: Sequence[int] = (), adapter: Any = None
) -> int:
    """The threshold row under which the worker runs the request."""
    return admitted(admission, params, prompt, adapter).threshold_row


def draw_by_the_clients_ids(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the draws of `module` be the same for each engine and run, as a test expects them."""
    monkeypatch.setattr(sample, "SECRET", b"the same in each run")

    def drawn(request_id: str, rate: float, purpose: str) -> bool:
        return in_traffic_sample(client_request_id(request_id), rate, purpose)

    monkeypatch.setattr(sample, "in_traffic_sample", drawn)
