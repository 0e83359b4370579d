"""Decide whether the weights of a base, quantized in its files, can be trained on."""

from __future__ import annotations

from typing import Any

from lorakit.errors import ModelError
from lorakit.recipe.schema import Recipe


class UntrainableWeights(ModelError):
    """The base's stored weights cannot be trained on with the recipe's method."""


def stored_quantization(config: Any) -> dict[str, Any]:
    """Return the quantization that config.json names; empty for plain weights."""
    values = getattr(config, "quantization_config", None)
    if values is None:
        return {}
    return dict(values) if isinstance(values, dict) else dict(values.to_dict())


def require_trainable_weights(recipe: Recipe, config: Any) -> None:
    """Refuse a base whose stored weights the recipe's method cannot train on.

    bitsandbytes' 4-bit weights train with QLoRA. gpt-oss's MXFP4 experts become bfloat16 while
    loading, for LoRA.

    Raises:
        UntrainableWeights: names the quantization and what to set or choose instead.
    """
    stored = stored_quantization(config)
    if not stored:
        return
    kind = str(stored.get("quant_method", "unknown"))
    four_bit = kind == "bitsandbytes" and bool(stored.get("load_in_4bit"))
    if kind == "mxfp4" and recipe.method == "lora":
        return
    if four_bit and recipe.method == "qlora":
        return
    found = f"model: {recipe.model}: its weights are already quantized ({kind})"
    if kind == "mxfp4":
        raise UntrainableWeights(
            f"{found}, and qlora would not quantize its experts again",
            hint="set method: lora, which trains on the weights as bfloat16",
        )
    if four_bit:
        raise UntrainableWeights(
            f"{found}, expected 16- or 32-bit weights for lora",
            hint="set method: qlora, or name the 16-bit original of this model",
        )
    raise UntrainableWeights(
        f"{found}, expected 16- or 32-bit weights, or bitsandbytes' 4-bit ones for qlora",
        hint="name the 16-bit original of this model; method: qlora quantizes it while loading",
    )


def dequantizing(config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights that are dequantized while loading."""
    if stored_quantization(config).get("quant_method") != "mxfp4":
        return {}
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}
