"""A student: a small encoder that answers for the model before the first layer.

It is distilled (Hinton et al. 2015, arXiv 1503.02531) on the scores that the model gives the labels
at full depth.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from vllm_adainfer.artifact.artifact import Artifact, Encoder
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.probe import LabelHead

# Texts are sorted by length and read in batches: padding to the longest of all would take longer.
BATCH = 32


class TextEncoder(nn.Module):
    """Describes a text by the mean of the states of its tokens.

    Attributes:
        model: the encoder of transformers.

    """

    def __init__(self, model: Any) -> None:
        """Read texts with `model`, which `transformers.AutoModel` has made."""
        super().__init__()
        self.model = model
        self._padding = model.config.pad_token_id or 0

    @classmethod
    def of(cls, encoder: Encoder, device: torch.device) -> TextEncoder:
        """The encoder of an artifact, on `device`, in the dtype of its weights.

        It takes no more memory than its weights: settings of something larger are refused first.

        Raises:
            AdaInferError: transformers cannot build it, or its weights do not fit.

        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModel

        damage = AttributeError, KeyError, TypeError, ValueError, RuntimeError, StrictDataclassError
        tensors = encoder.tensors
        options: dict[str, Any] = {"trust_remote_code": False}
        options["dtype"] = next((one.dtype for one in tensors.values()), torch.float32)
        try:
            config = AutoConfig.for_model(**encoder.settings)
            if not 0 < config.num_hidden_layers <= len(tensors):
                raise ValueError(f"it has {config.num_hidden_layers} layers")
            with torch.device("meta"):
                shapes = AutoModel.from_config(config, **options).state_dict()
            wrong = [
                n for n, one in shapes.items() if n in tensors and one.shape != tensors[n].shape
            ]
            if wrong or shapes.keys() != tensors.keys():
                raise ValueError("its weights are those of another one")
            model = AutoModel.from_config(config, **options)
            model.load_state_dict(tensors, assign=True)
        except damage as error:
            raise AdaInferError(
                f"the student cannot be built ({' '.join(str(error).split())[:200]}): calibrate "
                "again with this version of transformers"
            ) from None
        return cls(model.eval().to(device))

    @override
    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Read `texts`, the token ids of each, as one padded batch: fp32 [texts, hidden size]."""
        longest = max(map(len, texts))
        padded = np.full((len(texts), longest), self._padding)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text
        lens = torch.tensor([len(text) for text in texts])
        device = self.model.device
        tokens = torch.from_numpy(padded).to(device, non_blocking=True)
        present = (torch.arange(longest) < lens.unsqueeze(1)).to(device, non_blocking=True)
        states = self.model(input_ids=tokens, attention_mask=present.long()).last_hidden_state
        weights = present.to(states.dtype).unsqueeze(2)
        return ((states * weights).sum(1) / weights.sum(1)).float()


class Student:
    """An encoder with a label head: the probe at exit point 0 of a policy that has one.

    Attributes:
        encoder: reads the texts.
        head: scores the labels from what the encoder makes of a text.

    """

    def __init__(self, encoder: TextEncoder, head: LabelHead) -> None:
        """Put `head` on `encoder`; calibration and serving both use this."""
        self.encoder = encoder
        self.head = head

    @classmethod
    def of(cls, artifact: Artifact, head: LabelHead, device: torch.device) -> Student:
        """The student of an artifact, with its head on `device`; raises as `TextEncoder.of`."""
        assert artifact.encoder is not None, "its config has a student"
        return cls(TextEncoder.of(artifact.encoder, device), head)

    @property
    def fitted_tensors(self) -> dict[str, Tensor]:
        """Those of the head, by their names in an artifact; the encoder has files of its own."""
        return self.head.fitted_tensors

    @property
    def bytes(self) -> int:
        """Bytes that the student stores."""
        encoder = sum(one.nbytes for one in self.encoder.state_dict().values())
        return self.head.bytes + encoder

    @torch.no_grad()
    def score(self, texts: Sequence[Sequence[int]], subsets: Tensor | None = None) -> Tensor:
        """Scores fp32 [texts, labels or labels + 1], see `LabelHead.score`."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        batches = np.split(order, range(BATCH, len(order), BATCH))
        read = torch.cat([self.encoder([texts[i] for i in batch]) for batch in batches])
        places = torch.from_numpy(np.argsort(order)).to(read.device)
        return self.head.score(read[places], subsets)
