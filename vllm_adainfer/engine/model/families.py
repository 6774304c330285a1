"""vLLM's model classes with exit points, each made when vLLM asks this module for it by name."""

from __future__ import annotations

from pkgutil import resolve_name
from types import new_class

from vllm.compilation.decorators import ignore_torch_compile

from vllm_adainfer.engine.classes import STOCK
from vllm_adainfer.engine.model.decoders import (
    DeltaNetDecoder,
    Gemma2Decoder,
    Gemma4Decoder,
    GptOssDecoder,
    GraniteDecoder,
    OPTDecoder,
)
from vllm_adainfer.engine.model.early_exit import EarlyExit
from vllm_adainfer.engine.segments.decoder import Decoder

# By stock class, where a family is not as Llama. Mixtures of experts may be: vLLM 0.32 routes each
# row by its own state without a capacity limit, so rows that leave change nothing for the others.
DECODERS: dict[str, type[Decoder]] = {
    "Gemma2ForCausalLM": Gemma2Decoder,
    "Gemma4ForCausalLM": Gemma4Decoder,
    "Gemma4ForConditionalGeneration": Gemma4Decoder,
    "GptOssForCausalLM": GptOssDecoder,
    "GraniteForCausalLM": GraniteDecoder,
    "OPTForCausalLM": OPTDecoder,
    "Qwen3NextForCausalLM": DeltaNetDecoder,
    "Qwen3_5ForCausalLM": DeltaNetDecoder,
    "Qwen3_5ForConditionalGeneration": DeltaNetDecoder,
    "Qwen3_5MoeForCausalLM": DeltaNetDecoder,
    "Qwen3_5MoeForConditionalGeneration": DeltaNetDecoder,
}
COMPILED_BY_VLLM = {"Ernie4_5ForCausalLM"}  # the class; of others, a module in it


def __getattr__(name: str) -> type[EarlyExit]:
    """Our class of that name, such as ``AdaInferLlamaForCausalLM``, from now on in this module."""
    stock = name.removeprefix("AdaInfer")
    if stock == name or stock not in STOCK:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    own = {"decoder": DECODERS.get(stock, Decoder), "__module__": __name__}
    found = new_class(
        name, (EarlyExit, resolve_name(STOCK[stock])), exec_body=lambda b: b.update(own)
    )
    if stock in COMPILED_BY_VLLM:  # we compile its segments instead
        found = ignore_torch_compile(found)
    return globals().setdefault(name, found)
