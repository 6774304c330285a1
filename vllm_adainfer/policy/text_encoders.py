"""The encoder of a student: it reads the text of a prompt, before the first layer of the model.

It is distilled (Hinton et al. 2015, arXiv 1503.02531) on the scores that full depth gives the
labels. It is an encoder of transformers, perhaps its first layers alone, or a bag of its tokens.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, gelu
from typing_extensions import override

from vllm_adainfer.artifact import fields as described
from vllm_adainfer.artifact.artifact import Encoder
from vllm_adainfer.errors import AdaInferError
from vllm_adainfer.policy.encoders import BATCH
from vllm_adainfer.policy.packing import SHORTEST_ROW, packed
from vllm_adainfer.transfers import upload

# Settings by which transformers runs other code than the class of the model, or fetches a kernel
# from the hub. So do private ones, and all that name an implementation.
NAMES_CODE = {"auto_map", "kernel_config", "quantization_config", "use_kernels"}
BAG_TYPE = "adainfer-bag"  # the `model_type` of a bag in an artifact; transformers has no such type
BAG_WIDTH = 512
# Encoders that take positions and a mask may read them in ways of their own (RoBERTa counts on from
# the padding). Then states differ by much more than this share of the largest one.
READS_ALIKE = 0.05


class TextEncoder(nn.Module):
    """Describes a text.

    Attributes:
        width: that of its description.

    """

    width: int

    @staticmethod
    def of(encoder: Encoder, device: torch.device) -> TextEncoder:
        """The encoder of an artifact, on `device`, in a dtype that it multiplies fast.

        It takes no more memory than its weights: settings of something larger are refused first.

        Raises:
            AdaInferError: it cannot be built, or its weights do not fit.

        """
        kind = BagEncoder if encoder.settings.get("model_type") == BAG_TYPE else LayersEncoder
        try:
            built = kind.built(encoder)
        except Exception as error:  # whatever transformers raises about settings from elsewhere
            raise AdaInferError(
                f"the student cannot be built ({' '.join(str(error).split())[:200]}): calibrate "
                "again with this version of transformers"
            ) from None
        return built.eval().requires_grad_(False).served(device)

    def served(self, device: torch.device) -> TextEncoder:
        """It on `device`, where bfloat16 weights become fp32 ones if fp32 is multiplied faster."""
        self.to(device)
        halved = self.embedding.weight.dtype == torch.bfloat16
        return self.float() if halved and not multiplies_bfloat16(device) else self

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The content of its ``config.json`` in an artifact."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Its weights, by their names in an artifact."""

    @property
    @abstractmethod
    def embedding(self) -> nn.Embedding:
        """The embedding of its tokens."""

    @property
    def filling(self) -> int:
        """A token that it reads besides those of texts."""
        return 0

    @torch.no_grad()
    def check_reads(self, student: described.Student, largest_token: int) -> None:
        """Check that it reads every text of a `student`, whose tokens are at most `largest_token`.

        It runs: call it on a CPU, because on a GPU a wrong index ends the process. It raises an
        AdaInferError where it does not, or where its states have another width than the student's.
        """
        longest, ids = [largest_token] * student.most_tokens, {largest_token, self.filling}
        try:
            rows = self.embedding.num_embeddings
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
        """Read any number of `texts`, the token ids of each, none empty: fp32 [texts, width]."""
        raise NotImplementedError

    def read(self, _hidden: object, _lens: object, texts: Sequence[Sequence[int]]) -> Tensor:
        """Read any number of texts, as an exit point asks it to: fp32 [texts, width]."""
        read: Tensor = self(texts)
        return read


class LayersEncoder(TextEncoder):
    """Describes a text by the mean of the states of its tokens.

    Attributes:
        model: the encoder of transformers.
        packs: whether it reads texts side by side as it reads each alone; else they are padded.

    """

    def __init__(self, model: Any) -> None:
        """Read texts with `model`, which `transformers.AutoModel` has made, on a CPU."""
        super().__init__()
        self.model, self.width = model, int(model.config.hidden_size)
        self.packs = self._reads_alike_packed()

    @classmethod
    def built(cls, encoder: Encoder) -> LayersEncoder:
        """That of an artifact; raises whatever transformers does."""
        from transformers import AutoConfig, AutoModel

        tensors = encoder.tensors
        options: dict[str, Any] = {"trust_remote_code": False}
        options["dtype"] = next((one.dtype for one in tensors.values()), torch.float32)
        config = AutoConfig.for_model(**without_code(encoder.settings))
        if not 0 < config.num_hidden_layers <= len(tensors):
            raise ValueError(f"it has {config.num_hidden_layers} layers")
        with torch.device("meta"):
            shapes = AutoModel.from_config(config, **options).state_dict()
        wrong = [n for n, one in shapes.items() if n in tensors and one.shape != tensors[n].shape]
        if wrong or shapes.keys() != tensors.keys():
            raise ValueError("its weights are those of another one")
        model = AutoModel.from_config(config, **options)
        model.load_state_dict(tensors, assign=True)
        return cls(model.eval())

    @classmethod
    def first_layers(cls, model: Any, count: int) -> LayersEncoder:
        """A copy of `model` that has the first `count` of its layers."""
        from transformers import AutoConfig, AutoModel

        settings = model.config.to_dict() | {"num_hidden_layers": count}
        config = AutoConfig.for_model(**without_code(settings))
        shorter = AutoModel.from_config(config, dtype=model.dtype, trust_remote_code=False)
        own, tensors = shorter.state_dict(), model.state_dict()
        shorter.load_state_dict({name: tensors[name] for name in own})
        return cls(shorter)

    @property
    @override
    def settings(self) -> dict[str, Any]:
        config = self.model.config
        return {**config.to_diff_dict(), "model_type": config.model_type}

    @override
    def tensors(self) -> dict[str, Tensor]:
        return dict(self.model.state_dict())

    @property
    @override
    def embedding(self) -> nn.Embedding:
        found: nn.Embedding = self.model.get_input_embeddings()
        return found

    @property
    @override
    def filling(self) -> int:
        return int(self.model.config.pad_token_id or 0)

    @override
    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        return self._packed(texts) if self.packs else self._padded(texts)

    def _packed(self, texts: Sequence[Sequence[int]]) -> Tensor:
        places, found = [], []
        for some in packed(texts, self.model.device):
            states = self.model(
                input_ids=some.tokens, attention_mask=some.mask, position_ids=some.positions
            ).last_hidden_state
            places.append(some.texts)
            found.append(some.means(states))
        [order] = upload([np.argsort(np.concatenate(places))], self.model.device)
        return torch.cat(found).index_select(0, order)

    def _padded(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Read texts in padded batches of about the same length."""
        order = np.argsort([len(text) for text in texts], kind="stable")
        batches = np.split(order, range(BATCH, len(order), BATCH))
        read = torch.cat([self._batch([texts[i] for i in batch]) for batch in batches])
        [places] = upload([np.argsort(order)], read.device)
        return read.index_select(0, places)

    def _batch(self, texts: Sequence[Sequence[int]]) -> Tensor:
        longest = max(map(len, texts))
        padded = np.full((len(texts), longest), self.filling)
        for row, text in zip(padded, texts, strict=True):
            row[: len(text)] = text
        lens = np.array([len(text) for text in texts])
        given = padded.ravel(), (np.arange(longest) < lens[:, None]).ravel()
        tokens, present = (one.view(padded.shape) for one in upload(given, self.model.device))
        states = self.model(input_ids=tokens, attention_mask=present.long()).last_hidden_state
        weights = present.to(states.dtype).unsqueeze(2)
        return ((states * weights).sum(1) / weights.sum(1)).float()

    @torch.no_grad()
    def _reads_alike_packed(self) -> bool:
        """Whether it describes packed texts as it does padded ones."""
        training, config = self.model.training, self.model.config
        places = getattr(config, "max_position_embeddings", None) or 4 * SHORTEST_ROW
        lens = (9, 5, 1, min(places // 2, 4 * SHORTEST_ROW), 7)
        known = self.embedding.num_embeddings
        texts = [[(7 * place + n) % known for n in range(n)] for place, n in enumerate(lens)]
        self.model.eval()
        try:
            one, two = self._packed(texts), self._padded(texts)
        except Exception:  # whatever a model raises that takes no positions, or no such mask
            return False
        finally:
            self.model.train(training)
        largest = float(two.abs().max())
        return bool(((one - two).abs() <= READS_ALIKE * largest).all())


class BagEncoder(TextEncoder):
    """Describes a text by one layer on the mean of its tokens' embeddings, in any order."""

    def __init__(self, weight: Tensor, width: int = BAG_WIDTH) -> None:
        """Make an untrained one of `weight` [tokens, size], the embedding of another encoder."""
        super().__init__()
        self.width, size = width, weight.shape[1]
        self.words = nn.Embedding.from_pretrained(weight)
        self.norm, self.mlp = nn.LayerNorm(size), nn.Linear(size, width)

    @classmethod
    def built(cls, encoder: Encoder) -> BagEncoder:
        """That of an artifact; raises a KeyError or RuntimeError where its tensors do not fit."""
        tensors = encoder.tensors
        with torch.device("meta"):
            found = cls(tensors["words.weight"], len(tensors["mlp.bias"]))
        found.load_state_dict(tensors, assign=True)
        return found

    @property
    @override
    def settings(self) -> dict[str, Any]:
        return {"model_type": BAG_TYPE}

    @override
    def tensors(self) -> dict[str, Tensor]:
        return self.state_dict()

    @property
    @override
    def embedding(self) -> nn.Embedding:
        return self.words

    @override
    def forward(self, texts: Sequence[Sequence[int]]) -> Tensor:
        weight = self.words.weight
        lens = np.array([len(text) for text in texts])
        tokens, starts = upload((np.concatenate(texts), np.cumsum(lens) - lens), weight.device)
        mean = embedding_bag(tokens, weight, starts, mode="mean")
        return gelu(self.mlp(self.norm(mean))).float()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device multiplies matrices of bfloat16 itself, so that they are the fastest."""
    if device.type != "cpu":
        return True
    return any(has for name, has in torch.cpu.get_capabilities().items() if "bf16" in name)


def without_code(settings: Any) -> Any:
    """`settings` of an encoder, and of its parts, without those that name code or kernels."""
    if isinstance(settings, Mapping):
        return {
            key: without_code(value)
            for key, value in settings.items()
            if not (key in NAMES_CODE or str(key).startswith("_") or "_implementation" in str(key))
        }
    return [without_code(one) for one in settings] if isinstance(settings, list) else settings
