"""The encoder of a branch: one small transformer layer over all tokens of a prompt.

BranchyNet (Teerapittayanon et al. 2016, arXiv 1709.01686) calls a side network with layers of its
own, at an exit point, a branch. It is distilled (Hinton et al. 2015, arXiv 1503.02531) on the
scores that full depth gives the labels, as a student is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from adainfer_kernels.pooling import EPS
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention
from typing_extensions import override

from vllm_adainfer.arrays import Ints
from vllm_adainfer.artifact.branch_shapes import BRANCH_HEADS, BRANCH_MLP, BRANCH_WIDTH
from vllm_adainfer.transfers import upload

# Prompts are attended to in padded batches of about the same length.
BATCH = 32


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
        rows = rows + self.attention_out(attended)
        wide = gelu(self.mlp_in(self.mlp_norm(rows)))
        rows = (rows + self.mlp_out(wide)).float()
        [on_device] = upload([lens], rows.device)
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
            read, mask, kept = upload((padded.ravel(), present.ravel(), real), rows.device)
            mask = mask.view(padded.shape)
            query, key, value = (
                rows.index_select(0, read)
                .view(*padded.shape, 3, BRANCH_HEADS, -1)
                .permute(2, 0, 3, 1, 4)
            )
            found = scaled_dot_product_attention(query, key, value, mask[:, None, None])
            found = found.transpose(1, 2).reshape(-1, BRANCH_WIDTH)
            parts.append(found.index_select(0, kept))
        [back] = upload([np.argsort(np.concatenate(order))], rows.device)
        return torch.cat(parts).index_select(0, back)
