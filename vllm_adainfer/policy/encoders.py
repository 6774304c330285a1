"""Encoders, which make the state that the head of a student or a branch reads.

A student's reads the text of a prompt, before the first layer of the model. A branch's is one small
transformer layer over all tokens of a prompt, at an exit point: BranchyNet (Teerapittayanon et al.
2016, arXiv 1709.01686) calls a side network with layers of its own a branch. Both are distilled
(Hinton et al. 2015, arXiv 1503.02531) on the scores that full depth gives the labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from adainfer_kernels.pooling import EPS
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention
from typing_extensions import override

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact import fields as described
from vllm_adainfer.artifact.artifact import Encoder
from vllm_adainfer.artifact.branch_shapes import BRANCH_HEADS, BRANCH_MLP, BRANCH_WIDTH
from vllm_adainfer.errors import AdaInferError

DROPOUT = 0.1  # in training
# Texts are read, and prompts attended to, in padded batches of about the same length.
BATCH = 32
# Settings by which transformers runs other code than the class of the model, or fetches a kernel
# from the hub. So do private ones, and all that name an implementation.
NAMES_CODE = {"auto_map", "kernel_config", "quantization_config", "use_kernels"}


class StateEncoder(nn.Module):
    """Describes a prompt by the states of its tokens after some layers of the model.

    Everything but attention is computed token by token, so that no padding takes time.

    Attributes:
        width: that of its description: of the last token, and of the mean.

    """

    width = 2 * BRANCH_WIDTH

    def __init__(self, hidden_size: int) -> None:
        """Make an untrained one, for states of this width."""
        super().__init__()
        self.project = nn.Linear(hidden_size, BRANCH_WIDTH)
        self.attention_norm = nn.LayerNorm(BRANCH_WIDTH)
        self.attention_in = nn.Linear(BRANCH_WIDTH, 3 * BRANCH_WIDTH)
        self.attention_out = nn.Linear(BRANCH_WIDTH, BRANCH_WIDTH)
        self.mlp_norm = nn.LayerNorm(BRANCH_WIDTH)
        self.mlp_in = nn.Linear(BRANCH_WIDTH, BRANCH_MLP)
        self.mlp_out = nn.Linear(BRANCH_MLP, BRANCH_WIDTH)
        self.dropout = nn.Dropout(DROPOUT)

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], device: torch.device) -> StateEncoder:
        """That of an artifact, on `device`, in the dtype of its first matrix."""
        weight = tensors["project.weight"]
        encoder = cls(weight.shape[1])
        encoder.load_state_dict(tensors)
        return encoder.eval().requires_grad_(False).to(device, weight.dtype)

    @override
    def forward(self, prompts: Sequence[Tensor]) -> Tensor:
        """Read prompts, the states [tokens, hidden size] of each: fp32 [prompts, 2 x width]."""
        lens = np.array([len(states) for states in prompts])
        # Autocasting, which training does, cannot join float16.
        dtype = self.project.weight.dtype
        return self.read(self.projected(torch.cat([one.to(dtype) for one in prompts])), lens)

    def projected(self, states: Tensor) -> Tensor:
        """[rows, width], of each token's state [rows, hidden size] what `read` reads.

        The states are RMS-normed, as `adainfer_kernels.pool` norms them; here the quotient is taken
        last, on fewer numbers.
        """
        size, weight = torch.linalg.vector_norm(states, dim=1, dtype=torch.float32), self.project
        scale = (size.square() / states.shape[1] + EPS).rsqrt().unsqueeze(1)
        read = linear(states.to(weight.weight.dtype), weight.weight)
        return (read * scale + weight.bias).to(weight.weight.dtype)

    def read(self, rows: Tensor, lens: Ints, _texts: object = ()) -> Tensor:
        """fp32 [prompts, 2 x width]: the state of the last token, and the mean of all.

        `rows` [tokens of all prompts, width] is what `projected` makes of their states; `lens` are
        the tokens of each prompt, at least one.
        """
        attended = self._attend(self.attention_in(self.attention_norm(rows)), lens)
        rows = rows + self.dropout(self.attention_out(attended))
        wide = self.dropout(gelu(self.mlp_in(self.mlp_norm(rows))))
        rows = (rows + self.dropout(self.mlp_out(wide))).float()
        on_device = torch.from_numpy(lens).to(rows.device, non_blocking=True)
        mean = torch.segment_reduce(rows, "mean", lengths=on_device, unsafe=True)
        return torch.cat([rows[on_device.cumsum(0) - 1], mean], dim=1)

    def _attend(self, rows: Tensor, lens: Ints) -> Tensor:
        """Attention among the tokens of each prompt; `rows` [tokens, 3 x width] are q, k and v."""
        starts, parts, order = np.cumsum(lens) - lens, [], []
        for prompts in np.split(np.argsort(lens, kind="stable"), range(BATCH, len(lens), BATCH)):
            places = np.arange(lens[prompts].max())
            present = places < lens[prompts, None]
            padded = np.where(present, starts[prompts, None] + places, 0)
            real = np.flatnonzero(present)
            order.append(padded.ravel()[real])
            read, mask, kept = (
                torch.from_numpy(one).to(rows.device, non_blocking=True)
                for one in (padded.ravel(), present, real)
            )
            query, key, value = (
                rows.index_select(0, read)
                .view(*padded.shape, 3, BRANCH_HEADS, -1)
                .permute(2, 0, 3, 1, 4)
            )
            found = scaled_dot_product_attention(query, key, value, mask[:, None, None])
            found = found.transpose(1, 2).reshape(-1, BRANCH_WIDTH)
            parts.append(found.index_select(0, kept))
        places = np.argsort(np.concatenate(order))
        return torch.cat(parts).index_select(0, torch.from_numpy(places).to(rows.device))


class TextEncoder(nn.Module):
    """Describes a text by the mean of the states of its tokens.

    Attributes:
        model: the encoder of transformers.
        width: that of its description.

    """

    def __init__(self, model: Any) -> None:
        """Read texts with `model`, which `transformers.AutoModel` has made."""
        super().__init__()
        self.model, self.width = model, int(model.config.hidden_size)
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
        return cls(model.eval().requires_grad_(False).to(device))

    @torch.no_grad()
    def check_reads(self, student: described.Student, largest_token: int) -> None:
        """Check that it reads every text of a `student`, whose tokens are at most `largest_token`.

        It runs: call it on a CPU, because on a GPU a wrong index ends the process. It raises an
        AdaInferError where it does not, or where its states have another width than the student's.
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


def without_code(settings: Any) -> Any:
    """`settings` of an encoder, and of its parts, without those that name code or kernels."""
    if isinstance(settings, Mapping):
        return {
            key: without_code(value)
            for key, value in settings.items()
            if not (key in NAMES_CODE or str(key).startswith("_") or "_implementation" in str(key))
        }
    return [without_code(one) for one in settings] if isinstance(settings, list) else settings
