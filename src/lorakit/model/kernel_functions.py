"""Functions of a model's layers that transformers binds to kernels of other packages.

transformers binds functions of Qwen3.5, LFM2, Falcon-H1 and others at import to
flash-linear-attention, causal-conv1d or mamba-ssm, if these are installed. Each is replaced by a
`KernelFunction`, which calls our own operation (`own_kernels`), the kernel or the torch
implementation.

Convolutions and recurrent layers read earlier tokens whatever a mask says, so a packed row needs
the borders of its documents: kernels and our operations take them as `seq_idx` or `cu_seqlens`, and
a torch implementation, which takes neither, is called once per document.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit.model.own_kernels import OWN

# The layers hand unknown arguments down to their functions; this one has the documents' lengths.
LENGTHS = "document_lengths"
# Arguments that have one entry per token, and their dimension of tokens.
_PER_TOKEN = {
    **dict.fromkeys(("query", "key", "value", "g", "beta"), 1),  # delta rules
    **dict.fromkeys(("hidden_states", "dt", "B", "C"), 1),  # Mamba 2
}
_CONVOLUTION = {"hidden_states": 2}
# Multiplies by out_proj's weight itself: past an adapter, and 4-bit weights it cannot read. Its
# torch implementation returns None, whereupon the layer calls its convolution and its scan.
_PAST_OUT_PROJ = "split_conv1d_scan_combined"


# Packages with kernels, by the name of the torch implementation.
_PACKAGES = {
    "chunk_kimi_delta_attention": "flash-linear-attention",
    "torch_chunk_gated_delta_rule": "flash-linear-attention",
    "causal_conv1d_fn": "causal-conv1d",
    "mamba2_chunk_scan": "mamba-ssm",
}


class KernelFunction:
    """A function of a modeling module: our kernel, else the bound one, else plain torch.

    Triton's kernels cannot read tensors on the CPU, and on a machine with a GPU they are bound at
    import, whatever device a model is loaded on.
    """

    plain_on: ClassVar[tuple[str, ...]] = ("cpu",)

    def __init__(self, bound: Any, plain: Callable[..., Any]) -> None:
        functools.update_wrapper(self, plain)
        self.name: str = plain.__name__
        self.bound: Callable[..., Any] = getattr(bound, "bound", bound)
        self.plain = plain
        self.has_kernel = _has_kernel(self.bound) and _PAST_OUT_PROJ not in self.name
        self.use_kernel = self.has_kernel
        self.own = OWN.get(self.name)
        self.parameters = tuple(inspect.signature(plain).parameters)
        self.use_own = self.own is not None

    @property
    def missing_package(self) -> str | None:
        """The package that would bring the kernel, if it is not installed and we have none."""
        return None if self.has_kernel or self.use_own else _PACKAGES.get(self.name)

    @property
    def recurrent_in_torch(self) -> bool:
        """True for a recurrent layer without a kernel, which takes packed documents in turn."""
        recurrent = _PACKAGES.get(self.name, "causal-conv1d") != "causal-conv1d"
        return recurrent and not (self.use_kernel or self.use_own)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        lengths = kwargs.pop(LENGTHS, None)
        if self.own is not None and self.use_own and torch.compiler.is_compiling():
            given = dict(zip(self.parameters, args, strict=False))
            return self.own({**given, **kwargs}, False)
        if lengths is None and kwargs.get("seq_idx") is not None:  # LFM2 in transformers 5.17
            lengths = torch.bincount(kwargs["seq_idx"].flatten()).tolist()
        tensors = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        first = next(tensors, None)
        unreadable = first is not None and first.device.type in self.plain_on
        other = self.use_kernel and not unreadable
        call = inspect.signature(self.plain).bind(*args, **kwargs)
        if self.own is not None and self.use_own:
            found = self.own({**call.arguments, **call.arguments.get("kwargs", {})}, other)
            if found is not None:
                return found
        if other:
            return self.bound(*args, **kwargs)
        return (
            self.plain(*args, **kwargs) if lengths is None else self._each_document(lengths, call)
        )

    def _each_document(self, lengths: Sequence[int], call: inspect.BoundArguments) -> Any:
        """Call the torch implementation with one document at a time, and join its outputs."""
        convolution = self.name.startswith("causal_conv1d")
        names = _CONVOLUTION if convolution else _PER_TOKEN
        pieces = {
            name: value.split(tuple(lengths), dim=names[name])
            for name, value in call.arguments.items()
            if name in names and isinstance(value, Tensor)
        }
        outputs: list[Any] = []
        for number in range(len(lengths)):
            call.arguments.update({name: parts[number] for name, parts in pieces.items()})
            outputs.append(self.plain(*call.args, **call.kwargs))
        if not isinstance(outputs[0], tuple):
            return None if outputs[0] is None else torch.cat(outputs, dim=2 if convolution else 1)
        # The delta rule also returns its last state, which is None without a cache.
        return torch.cat([first for first, *_ in outputs], dim=1), *outputs[-1][1:]


def kernel_functions(model: Any) -> list[KernelFunction]:
    """Return the kernel-bound functions of the modules that define the model's layers.

    They are replaced in these modules at the first call, for every model of the process.
    """
    functions = []
    for source in {type(module).__module__ for module in model.modules()}:
        names = vars(sys.modules[source]) if source in sys.modules else {}
        for name, bound in list(names.items()):
            if isinstance(bound, KernelFunction):
                functions.append(bound)
            elif (plain := _definition(bound)) is not None:
                names[name] = KernelFunction(bound, plain)
                functions.append(names[name])
    return functions


def document_arguments(borders: Tensor, tokens: int, lengths: Sequence[int] = ()) -> dict[str, Any]:
    """Arguments by which a decoder's convolutions and recurrent layers isolate documents.

    Args:
        borders: cumulative lengths int32 [n + 1] of the documents in one row.
        tokens: of all documents together.
        lengths: the documents' lengths on the host, which torch implementations need.
    """
    documents = torch.arange(len(borders) - 1, dtype=torch.int32, device=borders.device)
    each = torch.repeat_interleave(documents, borders.diff(), output_size=tokens)
    # `cu_seq_lens_q`: transformers' name for what layers of linear attention hand to their kernel.
    given = {"seq_idx": each.unsqueeze(0), "cu_seq_lens_q": borders}
    return {**given, LENGTHS: tuple(lengths)} if lengths else given


def _definition(bound: Any) -> Any:
    """Torch implementation of a kernel-bound function; None for any other object."""
    code = getattr(_wrapper(bound), "__code__", None)
    from transformers.integrations import hub_kernels

    if code is None or code.co_filename != hub_kernels.__file__:
        return None
    return getattr(_wrapper(bound), "__wrapped__", None)


def _has_kernel(bound: Any) -> bool:
    """True if transformers found the function in an installed package."""
    found = inspect.getclosurevars(_wrapper(bound)).nonlocals.get("is_new_implementation")
    return bool(found)


def _wrapper(bound: Any) -> Any:
    """transformers' function around a kernel; the package `kernels` wraps each in a module."""
    if isinstance(bound, nn.Module):
        return inspect.getclosurevars(type(bound).forward).nonlocals.get("func")
    return bound
