"""Choose the class of a base model, and find the text decoder in it.

The class that config.json names is built, as engines do: adapters and merged weights then have its
names. For Qwen3.5 and Llama 4 AutoModelForCausalLM builds only the text model, whose layers have
other names; adapters trained in it match nothing in the class that the base declares.
"""

from __future__ import annotations

import copy
import dis
import functools
import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

from lorakit.errors import DependencyError

# Mixers whose fused kernels read `out_proj.weight` themselves, by the name of class or part.
STATE_SPACE = re.compile(r"mamba|ssm", re.IGNORECASE)


def auto_class(config: Any) -> Any:
    """The auto class of transformers that builds this config's base.

    It is AutoModelForCausalLM, unless config.json names the class with other inputs (images,
    audio), or transformers knows no other class for this config.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    causal = _mapped(AutoModelForCausalLM, config)
    multimodal = _mapped(AutoModelForMultimodalLM, config)
    named = (getattr(config, "architectures", None) or [None])[0]
    if multimodal is not None and (causal is None or multimodal.__name__ == named):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def base_class(config: Any) -> Any:
    """The class that is built for this config; None if transformers has none (remote code)."""
    return _mapped(auto_class(config), config)


def _mapped(auto: Any, config: Any) -> Any:
    if type(config) not in auto._model_mapping:
        return None
    found = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def frozen_config(config: Any) -> Any:
    """Copy a config for a frozen base: without dropout, and with each class's own attention.

    Dropout belongs to the adapters; Seed-OSS's config has 0.1 for the base's activations, too.
    Without an attention implementation each part takes sdpa if its class has it: gpt-oss, Gemma 2
    and Gemma 4's audio tower have none in transformers and take eager.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = None
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        for key, value in list(vars(part).items()) if part is not None else ():
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def empty_base(config: Any, **options: Any) -> Any:
    """Build the base on the meta device, without weights.

    Raises:
        DependencyError: one of its towers is from a package that is not installed.
    """
    import torch

    try:
        with torch.device("meta"):
            return auto_class(config).from_config(frozen_config(config), **options)
    except ImportError as error:  # Gemma 3n's vision tower is from timm
        package = re.search(r"pip install ([\w.-]+)", str(error))
        raise DependencyError(
            f"{config.model_type}: {' '.join(str(error).split()).partition('. ')[0]}",
            hint=f"pip install {package[1]}" if package else None,
        ) from error


def text_decoder(model: Any) -> Any:
    """The module with the text model's layers: ids to hidden states, without the head."""
    decoder = model.get_decoder()
    # Llama 4's answer is a causal language model with its head.
    return decoder.model if hasattr(decoder, "lm_head") else decoder


def name_of(model: Any, wanted: Any) -> str:
    """Name of a module in the model; "" if it is the model itself or not in it."""
    return next((name for name, module in model.named_modules() if module is wanted), "")


def side_modules(model: Any) -> list[str]:
    """Names of the parts other than text decoder and head: towers and projectors."""
    text = {id(text_decoder(model)), id(model.get_output_embeddings())}
    if id(model) in text:
        return []
    return list(_side_names(model, "", text))


def _side_names(parent: Any, path: str, text: set[int]) -> Iterator[str]:
    for name, module in parent.named_children():
        inside = {id(m) for m in module.modules()}
        if id(module) in text or next(module.parameters(), None) is None:
            continue
        if inside & text:
            yield from _side_names(module, f"{path}{name}.", text)
        else:
            yield f"{path}{name}"


def kept_in_16_bits(model: Any) -> set[str]:
    """Names of modules that QLoRA does not quantize: head, towers, routers, special linear layers.

    bitsandbytes would replace a subclass of Linear, and with it its own forward (Llama 4's router).
    A layer whose weight its parent reads (Gemma 3n's coefficients, GLM-5's indexer) would get the
    packed bytes of the 4-bit weight there.
    """
    from torch.nn import Linear
    from transformers.quantizers.base import get_keys_to_not_convert

    special = {
        name
        for name, module in model.named_modules()
        if isinstance(module, Linear) and (type(module) is not Linear or "router" in name)
    }
    for path, module in model.named_modules():
        read = weights_read_by(type(module)) & {name for name, _ in module.named_children()}
        if STATE_SPACE.search(f"{path} {type(module).__name__}"):
            read -= {"out_proj"}  # for a kernel that is not used (model/kernel_functions.py)
        special |= {f"{path}.{name}" for name in read if isinstance(getattr(module, name), Linear)}
    return {*get_keys_to_not_convert(model), *side_modules(model), *special}


def weights_read_by(kind: type) -> set[str]:
    """Names of the parts of a module class whose `weight` its own methods read."""
    from torch.nn import Module

    own = itertools.takewhile(lambda base: base is not Module, kind.__mro__)
    return {name for base in own for name in _weights_read_in(base)}


@functools.cache
def _weights_read_in(kind: type) -> frozenset[str]:
    read = set()
    for method in filter(callable, vars(kind).values()):
        code = getattr(inspect.unwrap(method), "__code__", None)
        loads = [(i.opname, i.argval) for i in dis.get_instructions(code)] if code else []
        for (operation, name), (_, attribute) in itertools.pairwise(loads):
            if operation == "LOAD_ATTR" and attribute == "weight":
                read.add(name)
    return frozenset(read)


def is_inside(name: str, parents: set[str]) -> bool:
    """True if a module is one of `parents` or part of one."""
    return any(name == parent or name.startswith(f"{parent}.") for parent in parents)
