"""The time of probes that a trainer will fit beside a server, on the device that serves."""

from __future__ import annotations

from typing import Any

import adainfer_kernels
import torch
from adainfer_kernels import Head

from vllm_adainfer.exits.accounting.clock import Clock

LABELS = 16
ROWS = 128  # prompts that a step asks about
ROUNDS = 20


@torch.inference_mode()
def label_head_seconds(model: Any) -> dict[str, float]:
    """Time of a label head for one prompt, until the host knows who is settled.

    By what it reads, the ``last_token`` or the whole ``prompt``. `model` is an `EarlyExit` that is
    ready to serve; nothing else may use its device now.
    """
    device, size = model.device, model.hidden_size
    clock = Clock(device, torch.get_num_threads())
    threshold = torch.zeros(ROWS, device=device)
    classifier = torch.ones(3, device=device)

    def seconds(width: int) -> float:
        states = torch.zeros(ROWS, width, device=device)
        head = Head(torch.zeros(LABELS, width, device=device), torch.zeros(LABELS, device=device))

        def ask() -> None:
            read = adainfer_kernels.readout(states, None, None, dtype=head.weight.dtype)
            adainfer_kernels.settle(read, head, classifier, threshold)[0].cpu()

        ask()  # compiles
        return clock.seconds_of(ask, ROUNDS) / ROWS

    return {"last_token": seconds(size), "prompt": seconds(2 * size)}
