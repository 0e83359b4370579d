"""Decide whether the weights of a base, quantized in its files, can be trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, ModelError
from lorakit.model.safetensors_io import stored_tensors
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

    bitsandbytes' 4-bit weights train with QLoRA. gpt-oss's MXFP4 experts are dequantized while
    loading, to bfloat16 for LoRA and once more quantized, to NF4, for QLoRA.

    Raises:
        UntrainableWeights: names the quantization and what to set or choose instead.
    """
    stored = stored_quantization(config)
    if not stored:
        return
    kind = str(stored.get("quant_method", "unknown"))
    four_bit = kind == "bitsandbytes" and bool(stored.get("load_in_4bit"))
    if kind == "mxfp4":
        return
    if four_bit and recipe.method == "qlora":
        return
    found = f"model: {recipe.model}: its weights are already quantized ({kind})"
    if four_bit:
        raise UntrainableWeights(
            f"{found}, expected 16- or 32-bit weights for lora",
            hint="set method: qlora, or name the 16-bit original of this model",
        )
    raise UntrainableWeights(
        f"{found}, expected 16- or 32-bit weights, or bitsandbytes' 4-bit ones for qlora",
        hint="name the 16-bit original of this model; method: qlora quantizes it while loading",
    )


def require_dense_experts(recipe: Recipe, config: Any, folder: Path) -> None:
    """Refuse bitsandbytes' packed experts, which transformers cannot load into raw tensors.

    Raises:
        UntrainableWeights: names the first packed tensor.
    """
    if stored_quantization(config).get("quant_method") != "bitsandbytes":
        return
    try:
        tensors = stored_tensors(folder)
    except (LorakitError, OSError):
        return  # no weights here, or damaged ones, which loading reports
    for name, stored in tensors.items():
        if ".experts." in name and stored.dtype == "U8" and name.endswith((".weight", "_proj")):
            raise UntrainableWeights(
                f"model: {recipe.model}: {name} is an expert in bitsandbytes' 4 bits, "
                "expected 16- or 32-bit experts",
                hint="name the 16-bit original of this model; method: qlora quantizes it, experts "
                "included, while loading",
            )


def read_once(recipe: Recipe, config: Any) -> str:
    """Say what becomes of experts that are stored as MXFP4; "" for other bases."""
    if stored_quantization(config).get("quant_method") != "mxfp4":
        return ""
    kept = f"{recipe.dtype}" if recipe.method == "lora" else "NF4"
    return f"stored as MXFP4, dequantized once while loading and kept as {kept}"


def dequantizing(config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` for weights that are dequantized while loading."""
    if stored_quantization(config).get("quant_method") != "mxfp4":
        return {}
    from transformers import Mxfp4Config

    return {"quantization_config": Mxfp4Config(dequantize=True)}
