"""Check the kernels of a model's functions, those of other packages and our own, on this GPU.

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
from lorakit.ops.backend import definitions_only, has_kernels

# Kernels and plain torch sum in a different order and differ by 1 to 2% in bfloat16. A wrong
# gradient differs by far more.
LARGEST_DIFFERENCE = 0.05
_TOKENS = 128


def check_kernels(model: Any, device_type: str = "cuda") -> str | None:
    """Compare the kernels with plain torch on this GPU, and leave out those that differ.

    One layer of each class runs forward and backward each way, with the model's weights. Ours come
    before those of other packages, which autotune for most of a minute (fla 0.6 on an H200).

    Args:
        device_type: device of the kernels; layers on another device are not checked.

    Returns:
        The reason why some kernels are not used, or None.
    """
    functions = kernel_functions(model)
    modules = _layers_to_check(model, functions, device_type)
    missing = sorted({package for f in functions if (package := f.missing_package)})
    logger = logging.getLogger("lorakit")
    if modules and missing:
        logger.warning(
            "note: %s runs in plain torch, which is slower; pip install %s",
            ", ".join(type(module).__name__ for module in modules),
            " ".join(missing),
        )
    first, tried = None, set[tuple[bool, ...]]()
    for own, others in ((True, True), (True, False), (False, True), (False, False)):
        for function in functions:
            function.use_own = own and function.own is not None
            function.use_kernel = others and function.has_kernel
        used = tuple(
            setting
            for function in functions
            for setting in (function.use_own and _on_gpu(modules), function.use_kernel)
        )
        if used in tried:
            continue
        tried.add(used)
        reason = _first_disagreement(model, modules, functions) if any(used) else None
        first = first or reason
        if reason is None:
            break
    if first is not None:
        by = "our own" if own and any(used) else "those of other packages"
        logger.warning(
            "note: kernels of %s are replaced by %s, which is slower: %s",
            ", ".join(type(module).__name__ for module in modules),
            by if any(used) else "plain torch",
            first,
        )
    return first


def _on_gpu(modules: list[nn.Module]) -> bool:
    """True if our kernels can run one of the modules."""
    return any(has_kernels(next(module.parameters())) for module in modules)


def _first_disagreement(
    model: Any, modules: list[nn.Module], functions: list[KernelFunction]
) -> str | None:
    """The reason why a module's results are not those of plain torch, or None if all agree."""
    hidden = int(model.config.get_text_config().hidden_size)
    reasons = (_disagreement(module, hidden, functions) for module in modules)
    return next((reason for reason in reasons if reason is not None), None)


def _disagreement(module: nn.Module, width: int, functions: list[KernelFunction]) -> str | None:
    """The reason why a layer's results with kernels are not those of plain torch, or None."""
    weight = next(module.parameters())
    generator = torch.Generator(weight.device).manual_seed(0)
    shape = (1, _TOKENS, width)
    hidden = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
    used = [function.use_kernel for function in functions]
    try:
        fast = _outputs(module, hidden)
        for function in functions:
            function.use_kernel = False
        with definitions_only():
            plain = _outputs(module, hidden)
    except Exception as error:  # the package refuses, or a kernel does not compile
        return first_line(error)
    finally:
        for function, use_kernel in zip(functions, used, strict=True):
            function.use_kernel = use_kernel
    worst = max(map(_difference, fast, plain))
    if worst <= LARGEST_DIFFERENCE:
        return None
    return f"its results differ from plain torch by {worst:.0%}"


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
