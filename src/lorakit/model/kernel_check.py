"""Check the kernels of other packages that transformers binds to a model's functions.

transformers binds functions of Qwen3.5, LFM2, Falcon-H1 and others at import to
flash-linear-attention, causal-conv1d or mamba-ssm, if these are installed. Only running such a
kernel shows if it works on this GPU with this Triton: fla 0.6 refuses its backward on Hopper with
Triton 3.4 to 3.7.0, since the gradients would be wrong.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.errors import first_line

# Kernels and plain torch sum in a different order and differ by 1 to 2% in bfloat16. A wrong
# gradient differs by far more.
LARGEST_DIFFERENCE = 0.05
_TOKENS = 128


@dataclass(frozen=True, slots=True)
class KernelFunction:
    """A function of a modeling module that is bound to a kernel, and its torch implementation."""

    namespace: dict[str, Any]
    name: str
    bound: Any
    plain: Callable[..., Any]

    def use_plain(self) -> None:
        """Bind the name to the torch function."""
        self.namespace[self.name] = self.plain

    def restore(self) -> None:
        """Bind the name to the kernel again."""
        self.namespace[self.name] = self.bound


def kernel_functions(model: Any) -> list[KernelFunction]:
    """List the kernel-bound functions of the modules that define the model's layers."""
    functions = []
    for source in {type(module).__module__ for module in model.modules()}:
        names = vars(sys.modules[source]) if source in sys.modules else {}
        for name, bound in list(names.items()):
            plain = _definition(bound)
            if plain is not None:
                functions.append(KernelFunction(names, name, bound, plain))
    return functions


class PlainOnCPU:
    """A bound function that calls its torch implementation for tensors on the CPU.

    Triton's kernels cannot read these, and on a machine with a GPU they are bound at import,
    whatever device a model is loaded on.
    """

    def __init__(self, bound: Callable[..., Any], plain: Callable[..., Any]) -> None:
        functools.update_wrapper(self, plain)
        self.bound, self.plain = bound, plain

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next(tensors, None)
        on_cpu = first is not None and first.device.type == "cpu"
        return (self.plain if on_cpu else self.bound)(*args, **kwargs)


def use_plain_torch_on_cpu(model: Any) -> None:
    """Let the model's kernel-bound functions call plain torch for tensors on the CPU."""
    for function in kernel_functions(model):
        if not isinstance(function.bound, PlainOnCPU):
            function.namespace[function.name] = PlainOnCPU(function.bound, function.plain)


def check_kernels(model: Any, device_type: str = "cuda") -> str | None:
    """Compare the bound kernels with plain torch on this GPU, and unbind them if they differ.

    One layer of each class runs forward and backward both ways, with the model's weights.

    Args:
        device_type: device of the kernels; layers on another device are not checked.

    Returns:
        The reason plain torch is used, or None if the kernels agree or none is bound.
    """
    functions = kernel_functions(model)
    for module in _layers_to_check(model, functions, device_type):
        weight = next(module.parameters())
        generator = torch.Generator(weight.device).manual_seed(0)
        shape = (1, _TOKENS, int(model.config.get_text_config().hidden_size))
        hidden = torch.randn(shape, generator=generator, device=weight.device, dtype=weight.dtype)
        try:
            fast = _outputs(module, hidden)
            for function in functions:
                function.use_plain()
            plain = _outputs(module, hidden)
        except Exception as error:  # the package refuses, or a kernel does not compile
            reason = first_line(error)
        else:
            worst = max(map(_difference, fast, plain))
            if worst <= LARGEST_DIFFERENCE:
                for function in functions:
                    function.restore()
                continue
            reason = f"its results differ from plain torch by {worst:.0%}"
        for function in functions:
            function.use_plain()
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


def _definition(bound: Any) -> Any:
    """Torch implementation of a kernel-bound function; None for any other object."""
    from transformers.integrations import hub_kernels

    if isinstance(bound, PlainOnCPU):
        return bound.plain
    if isinstance(bound, nn.Module):  # the package `kernels` wraps each in a module
        bound = inspect.getclosurevars(type(bound).forward).nonlocals.get("func")
    code = getattr(bound, "__code__", None)
    if code is None or code.co_filename != hub_kernels.__file__:
        return None
    return getattr(bound, "__wrapped__", None)
