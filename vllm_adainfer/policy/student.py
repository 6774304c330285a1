"""A student: a small encoder that answers for the model before the first layer.

It is distilled (Hinton et al. 2015, arXiv 1503.02531) on the scores that the model gives the labels
at full depth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from vllm_adainfer.artifact import fields as described
from vllm_adainfer.artifact.artifact import Encoder
from vllm_adainfer.errors import AdaInferError

# Texts are sorted by length and read in batches: padding to the longest of all would take longer.
BATCH = 32
# Settings by which transformers runs other code than the class of the model, or fetches a kernel
# from the hub. So do private ones, and all that name an implementation.
NAMES_CODE = {"auto_map", "kernel_config", "quantization_config", "use_kernels"}


def without_code(settings: Any) -> Any:
    """`settings` of an encoder, and of its parts, without those that name code or kernels."""
    if isinstance(settings, Mapping):
        return {
            key: without_code(value)
            for key, value in settings.items()
            if not (key in NAMES_CODE or str(key).startswith("_") or "_implementation" in str(key))
        }
    return [without_code(one) for one in settings] if isinstance(settings, list) else settings


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
        from transformers import AutoConfig, AutoModel

        tensors = encoder.tensors
        options: dict[str, Any] = {"trust_remote_code": False}
        options["dtype"] = next((one.dtype for one in tensors.values()), torch.float32)
        try:
            config = AutoConfig.for_model(**without_code(encoder.settings))
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
        except Exception as error:  # whatever transformers raises about settings from elsewhere
            raise AdaInferError(
                f"the student cannot be built ({' '.join(str(error).split())[:200]}): calibrate "
                "again with this version of transformers"
            ) from None
        return cls(model.eval().to(device))

    @torch.no_grad()
    def check_reads(self, student: described.Student, largest_token: int) -> None:
        """Check that it reads every text of a `student`, whose tokens are at most `largest_token`.

        It runs: call it on a CPU, because on a GPU a wrong index ends the process.

        Raises:
            AdaInferError: it does not, or its states have another width than the student's.

        """
        longest, ids = [largest_token] * student.most_tokens, {largest_token, self._padding}
        try:
            rows = self.model.get_input_embeddings().num_embeddings
            if not ids.issubset(range(rows)):
                raise ValueError(
                    f"its tokenizer has tokens up to {max(ids)}, and its embedding {rows} rows"
                )
            width = self([longest]).shape[1]
        except Exception as error:  # whatever a model of transformers raises about other sizes
            raise AdaInferError(
                f"the student cannot read the longest text of its artifact, {student.most_tokens} "
                f"tokens ({' '.join(str(error).split())[:200]}): calibrate again"
            ) from None
        if width != student.hidden_size:
            raise AdaInferError(
                f"the student's states are {width} wide, and its head reads {student.hidden_size}: "
                "calibrate again"
            )

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

    def read(self, _hidden: object, _lens: object, texts: Sequence[Sequence[int]]) -> Tensor:
        """Read any number of texts: fp32 [texts, hidden size]."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        batches = np.split(order, range(BATCH, len(order), BATCH))
        read = torch.cat([self([texts[i] for i in batch]) for batch in batches])
        return read[torch.from_numpy(np.argsort(order)).to(read.device)]
