"""Check the kernels of other packages that transformers binds to a model's functions.

Only running such a kernel shows if it works on this GPU with this Triton: fla 0.6 refuses its
backward on Hopper with Triton 3.4 to 3.7.0, since the gradients would be wrong.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import first_line
from lorakit.model.kernel_functions import KernelFunction, kernel_functions

# Kernels and plain torch sum in a different order and differ by 1 to 2% in bfloat16. A wrong
# gradient differs by far more.
LARGEST_DIFFERENCE = 0.05
_TOKENS = 128


def check_kernels(model: Any, device_type: str = "cuda") -> str | None:
    """Compare the bound kernels with plain torch on this GPU, and unbind them if they differ.

    One layer of each class runs forward and backward both ways, with the model's weights.

    Args:
        device_type: device of the kernels; layers on another device are not checked.

    Returns:
        The reason plain torch is used, or None if the kernels agree or none is bound.
    """
    functions = kernel_functions(model)
    modules = _layers_to_check(model, functions, device_type)
    missing = sorted({package for f in functions if (package := f.missing_package)})
    if modules and missing:
        logging.getLogger("lorakit").warning(
            "note: %s runs in plain torch, which is slower; pip install %s",
            ", ".join(type(module).__name__ for module in modules),
            " ".join(missing),
        )
    for module in modules:
        weight = next(module.parameters())
        generator = torch.Generator(weight.device).manual_seed(0)
        shape = (1, _TOKENS, int(model.config.get_text_config().hidden_size))
        hidden = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
        try:
            fast = _outputs(module, hidden)
            for function in functions:
                function.use_kernel = False
            plain = _outputs(module, hidden)
        except Exception as error:  # the package refuses, or a kernel does not compile
            reason = first_line(error)
        else:
            worst = max(map(_difference, fast, plain))
            if worst <= LARGEST_DIFFERENCE:
                for function in functions:
                    function.use_kernel = function.has_kernel
                continue
            reason = f"its results differ from plain torch by {worst:.0%}"
        for function in functions:
            function.use_kernel = False
        class_name = type(module).__name__
        logging.getLogger("lorakit").warning(
            "note: the kernels bound to %s are replaced by plain torch, which is slower: %s",
            class_name,
            reason,
        )
        return reason
    return None


def _layers_to_check(
    model: Any, functions: list[KernelFunction], device_type: str
) -> list[nn.Module]:
    """Return the first module of each class whose forward calls one of the functions."""
    names = {function.name for function in functions}
    modules: dict[type, nn.Module] = {}
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        first = next(module.parameters(), None)
        on_device = first is not None and first.device.type == device_type
        if code is not None and on_device and names & set(code.co_names):
            modules.setdefault(type(module), module)
    return list(modules.values())


def _outputs(module: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return a layer's output and the gradient of its input."""
    inputs = hidden.clone().requires_grad_()
    with torch.enable_grad():
        out = module(inputs)
    out = out[0] if isinstance(out, tuple) else out
    (grad,) = torch.autograd.grad(out.float().square().sum(), inputs)
    return out.detach(), grad


def _difference(one: Tensor, other: Tensor) -> float:
    """Relative norm of the difference; infinity if it is not a number."""
    apart = (one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30)
    value = float(apart)
    return value if value == value else float("inf")
