"""Train on a base model that a Python program has loaded, if it is the one that files hold.

Evaluation, export and every later use load the base from its files again, so an object with other
weights, another class or another quantization would give an adapter that fits nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorakit.errors import ModelError
from lorakit.model.base_class import auto_class, base_class
from lorakit.model.base_fingerprint import base_folder
from lorakit.model.load import finish_base, nf4_config, prepare_experts
from lorakit.recipe.schema import Recipe
from lorakit.types import Device

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SAMPLED_ROWS = 4


def settings_of(model: Any) -> dict[str, Any]:
    """Return the settings that a loaded base model decides: `model`, `method` and `dtype`.

    Raises:
        ModelError: it is no model of transformers, it does not name its files, or it is quantized
            otherwise than QLoRA is.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ModelError(
            f"model is a {type(model).__name__}, expected a model of transformers or its name",
            hint="load it with AutoModelForCausalLM.from_pretrained, or give a hub id or a folder",
        )
    name = model.config._name_or_path
    if not name:
        raise ModelError(
            "model: the object does not name the files it was loaded from, which exports need",
            hint="save it and load it again: model.save_pretrained(folder), "
            "from_pretrained(folder)",
        )
    quantization = getattr(model.config, "quantization_config", None)
    if quantization is None:
        if model.dtype not in DTYPES:
            raise ModelError(f"model: its weights are {model.dtype}, expected 16- or 32-bit floats")
        return {"model": name, "method": "lora", "dtype": DTYPES[model.dtype]}
    if not getattr(quantization, "load_in_4bit", False):
        raise ModelError(
            f"model: quantized with {type(quantization).__name__}, which cannot be trained",
            hint="load it in 16 bits, or in 4 bits with BitsAndBytesConfig(load_in_4bit=True, "
            "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)",
        )
    return {
        "model": name,
        "method": "qlora",
        "dtype": DTYPES[quantization.bnb_4bit_compute_dtype],
    }


def take_base(model: Any, recipe: Recipe, location: str, device: Device, on_host: bool) -> Any:
    """Check a loaded base against its files, place it, and prepare it for training.

    Raises:
        ModelError: class, quantization or weights are not those that the files give, or the plan
            needs a part of a quantized base in host memory.
    """
    declared = base_class(model.config) or auto_class(model.config)
    if type(model) is not declared:
        raise ModelError(
            f"model is a {type(model).__name__}, but its config.json names {declared.__name__}",
            hint=f"load it with {auto_class(model.config).__name__}",
        )
    if recipe.method == "qlora":
        _check_quantization(model, device)
        if on_host:
            raise ModelError(
                "model: the memory plan keeps weights in host memory, and the object is quantized "
                "on a device already",
                hint="give the name of the model instead of the object",
            )
    else:
        model.to("cpu" if on_host else device.kind)
    _check_weights(model, recipe, location)
    model.requires_grad_(False)
    prepare_experts(model, recipe, getattr(torch, device.dtype))
    return finish_base(model, device)


def _check_quantization(model: Any, device: Device) -> None:
    own = model.config.quantization_config
    expected = nf4_config(device, ())
    for name in ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant"):
        found, wanted = getattr(own, name), getattr(expected, name)
        if found != wanted:
            raise ModelError(
                f"model: quantized with {name}={found!r}, expected {wanted!r}",
                hint="load it with BitsAndBytesConfig(load_in_4bit=True, "
                "bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)",
            )


def _check_weights(model: Any, recipe: Recipe, location: str) -> None:
    """Compare the first rows of each tensor that model and files have under one name."""
    folder = base_folder(recipe, location)
    tensors = {name: p for name, p in model.named_parameters() if p.dtype in DTYPES}
    for path in sorted(Path(folder).glob("*.safetensors")) if folder else []:
        with safe_open(path, "pt") as file:
            for name in sorted(file.keys() & tensors.keys()):
                stored, own = file.get_slice(name), tensors[name]
                shape = list(own.shape)
                rows = stored[:_SAMPLED_ROWS].to(own.dtype)
                same = stored.get_shape() == shape and torch.equal(
                    rows, own.detach()[:_SAMPLED_ROWS].cpu()
                )
                if not same:
                    raise ModelError(
                        f"model: {name} of the object is not the tensor in {path.name}",
                        hint="save the changed model (model.save_pretrained(folder)) and load it "
                        "from there, so that exports have the same base",
                    )
