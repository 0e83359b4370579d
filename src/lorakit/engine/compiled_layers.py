"""Run a model's own decoder layers as compiled regions in training.

For families without hand-written gradients. torch.compile fuses what transformers' layers do
between their products (norms, rotations, gates) and chooses which activations to save; attention
and the linear layers with their adapters are operators that it does not look into
(`engine/compiled_attention.py`, `ops/lora_operator.py`).

Only training passes are compiled: generation, evaluation and probes run the layers as they are.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from lorakit.engine.compiled_attention import attention_of, register
from lorakit.engine.lora_linear import FusedLoraLinear, Unsupported, refresh
from lorakit.model.base_class import text_decoder
from lorakit.model.expert_lora import ExpertLora
from lorakit.model.grouped_experts import GroupedExperts
from lorakit.model.kernel_functions import kernel_functions
from lorakit.ops.dropout_mask import draw_keys
from lorakit.ops.lora_operator import LinearSpec, lora_linear, nf4_tensors

# Kinds of layers in a model times kinds of batches; torch stops at 8.
RECOMPILE_LIMIT = 64


class CompiledLayers:
    """The compiled layers of one model, and the state that they share in a pass.

    Args:
        sharing: linear layers by the input that they share, in the order of their calls
            (`shared_inputs`); those that support it are multiplied as one.
        own_attention: keep the attention function of transformers in training, too.
        backend: of torch.compile; "eager" and "aot_eager" are for tests.
    """

    def __init__(
        self,
        base: Any,
        sharing: Sequence[Sequence[nn.Module]],
        own_attention: bool = False,
        backend: str = "inductor",
    ) -> None:
        self.base, self.decoder = base, text_decoder(base)
        self.config, self.own_attention = self.decoder.config, own_attention
        self.recompute = False
        kernel_functions(base)  # puts our operations in place of loops in torch
        self.layers: list[Any] = list(self.decoder.layers)
        self.linear = [group for modules in sharing for group in _groups(modules)]
        self.groups = [group.fused for group in self.linear]
        # The members' classes in a pass, and their own.
        members = [member for group in self.linear for member in group.modules]
        self.classes = [(member, _with(type(member))) for member in members]
        self.own = [(member, type(member)) for member in members]
        dropped = [group for group in self.linear if group.fused.p > 0 and group.fused.adapted]
        device = next(self.decoder.parameters()).device
        # Static addresses: the keys of each pass are written here, and CUDA graphs read them.
        sizes = [len(group.fused.adapted) for group in dropped]
        self.keys = torch.zeros(sum(sizes), 2, dtype=torch.int32, device=device)
        for group, keys in zip(dropped, self.keys.split(sizes), strict=True):
            group.keys = keys
        for tensor in (tensor for group in self.linear for tensor in group.tensors()):
            torch._dynamo.mark_static(tensor)  # parameters are static, other tensors not
        self.has_experts = _leave_out_experts(self.decoder)
        self.run = _compiled(backend, whole=not self.has_experts)
        self.attention = self.config._attn_implementation if own_attention else register(device)

    def __call__(self, inputs: dict[str, Any], compiled: bool = True) -> Tensor:
        """Hidden states [B, T, D] of a training pass: rows padded on the right, or packed.

        Args:
            inputs: of the decoder, without cache. A mask is left out: no token attends to padding
                on its right, and padding has no loss.
            compiled: False computes the same uncompiled.
        """
        if len(self.keys):
            self.keys.copy_(draw_keys(len(self.keys), self.keys.device))
        refresh(self.groups, self.decoder.training)
        given = {k: v for k, v in inputs.items() if k not in ("attention_mask", "use_cache")}
        with self.active(compiled):
            states: Tensor = self.decoder(**given, use_cache=False)[0]
        return states

    @contextlib.contextmanager
    def active(self, compiled: bool = True) -> Iterator[None]:
        """Make calls of the layers compiled ones; or use the operators only, uncompiled."""
        with attention_of(self.config, self.attention):
            try:
                _set_classes(self.classes)
                for layer in self.layers if compiled else ():
                    layer._compiled_call_impl = functools.partial(self._layer, layer)
                yield
            finally:
                for layer in self.layers:
                    layer._compiled_call_impl = None
                _set_classes(self.own)

    def _layer(self, layer: Any, *args: Any, **kwargs: Any) -> Any:
        if args and not args[0].requires_grad:
            # The first layer's input: without a gradient it would be compiled apart, for 10 s.
            args = (args[0].detach().requires_grad_(), *args[1:])
        _mark_tokens(args[0].shape[1], (args, kwargs))
        if not self.recompute:
            return self.run(layer, *args, **kwargs)
        return checkpoint(
            functools.partial(self.run, layer, **kwargs),
            *args,
            use_reentrant=False,
            # Masks come from keys that stay until the next micro-batch; experts draw theirs.
            preserve_rng_state=self.has_experts,
            context_fn=lambda: (contextlib.nullcontext(), self.active()),
        )

    @property
    def supported(self) -> bool:
        """True if the adapters are on, as they were when the layers were compiled."""
        return not any(
            member.merged or member.disable_adapters or member.active_adapters != ["default"]
            for member, _ in self.own
            if hasattr(member, "lora_A")
        )

    def detach(self) -> None:
        """Give the linear layers separate weights again, and remove what was added to them."""
        for group in self.linear:
            group.fused.unmerge()
            for member in group.modules:
                del member.lora_group, member.group_index


def _set_classes(modules: Sequence[tuple[Any, type]]) -> None:
    for module, kind in modules:
        module.__class__ = kind


_LEFT_OUT: set[type] = set()


def _leave_out_experts(decoder: Any) -> bool:
    """Run experts with our products between compiled code; False if there are none.

    Their sorting and products are few launches already, and torch.compile would keep the dense
    weights of 4-bit experts from forward to backward.
    """
    kinds = (GroupedExperts, ExpertLora)
    found = [module for module in decoder.layers.modules() if isinstance(module, kinds)]
    for kind in {type(module) for module in found} - _LEFT_OUT:
        kind.forward = torch.compiler.disable(kind.forward)  # type: ignore[method-assign]
        _LEFT_OUT.add(kind)
    return bool(found)


def _compiled(backend: str, whole: bool) -> Callable[..., Any]:
    """A function that calls a layer; layers of one kind share its compiled code.

    Args:
        whole: a layer that cannot be compiled in one piece is an error.
    """
    torch._dynamo.config.recompile_limit = max(
        torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT
    )

    def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
        return layer._call_impl(*args, **kwargs)

    # Gradients of a group's outputs are concatenated: as one pointwise kernel that computes both
    # branches of each element, a gate's backward took 174 us instead of 75 (H200, Gemma 3 12B).
    options: Any = {"max_pointwise_cat_inputs": 0} if backend == "inductor" else None
    return torch.compile(run, fullgraph=whole, backend=backend, options=options)


def _mark_tokens(tokens: int, arguments: Any) -> None:
    """Let compiled code serve any number of tokens and documents; all other sizes are fixed."""
    for tensor in tree_leaves(arguments):
        if isinstance(tensor, Tensor):
            for dim, size in enumerate(tensor.shape):
                if size == tokens or tensor.dim() == 1:
                    torch._dynamo.maybe_mark_dynamic(tensor, dim)


class LinearGroup:
    """Linear layers of one input, and their outputs on the way from the first to the others."""

    def __init__(self, modules: Sequence[Any], fused: FusedLoraLinear) -> None:
        self.modules, self.fused = list(modules), fused
        fused.merge()
        self.keys: Tensor | None = None
        self.outputs: tuple[Tensor, ...] | None = None
        blocks, self.frozen = (0, 0), fused.base_tensors()
        if fused.four_bit:
            state = fused.bases[0].weight.quant_state
            blocks = (state.blocksize, state.state2.blocksize)
            self.frozen = [t for base in fused.bases for t in nf4_tensors(base.weight)]
        self.spec = LinearSpec(tuple(fused.sizes), fused.inputs, fused.slots, blocks)
        self.all_a = [factors.a for factors in fused.adapted]
        self.all_b = [factors.b for factors in fused.adapted]
        self.factors = {training: fused.factor(training) for training in (False, True)}
        for index, module in enumerate(modules):
            module.lora_group, module.group_index = self, index

    def tensors(self) -> list[Tensor]:
        """Tensors that compiled code reads and that are not parameters."""
        optional = [self.keys, self.fused.bias]
        return [*self.frozen, self.fused.a, self.fused.b, *(t for t in optional if t is not None)]

    def forward(self, x: Tensor, training: bool) -> tuple[Tensor, ...]:
        """The outputs of all modules."""
        y = lora_linear(
            x.to(self.fused.dtype),
            self.frozen,
            self.fused.bias,
            (self.fused.a, self.fused.b),
            (self.all_a, self.all_b),
            self.keys if training else None,
            self.fused.p,
            self.factors[training],
            self.spec,
        )
        return y.to(x.dtype).split(self.spec.sizes, dim=-1)


class _GroupMember:
    """`forward` of a linear layer as its part of a group's operator; mixed into its class."""

    def forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
        group = self.lora_group
        if self.group_index == 0:
            group.outputs = group.forward(x, self.training)
        part = group.outputs[self.group_index]
        if self.group_index + 1 == len(group.modules):
            group.outputs = None
        return part


_CLASSES: dict[type, type] = {}


def _with(kind: type) -> type:
    """The class of a module in a pass; one for each kind, since compiled code depends on it."""
    if kind not in _CLASSES:
        _CLASSES[kind] = _mixed(kind)
    return _CLASSES[kind]


def _mixed(kind: type) -> type:
    return type(kind.__name__, (_GroupMember, kind), {"__module__": kind.__module__})


def _groups(modules: Sequence[Any]) -> list[LinearGroup]:
    """One group of all modules, or one of each where they differ; without those not supported."""
    try:
        return [LinearGroup(modules, _fused(modules))]
    except Unsupported:
        if len(modules) == 1:
            return []
        return [group for module in modules for group in _groups([module])]


def _fused(modules: Sequence[Any]) -> FusedLoraLinear:
    fused = FusedLoraLinear("compiled", modules, {})
    states = [base.weight.quant_state for base in fused.bases if fused.four_bit]
    if any(state.quant_type != "nf4" or not state.nested for state in states):
        raise Unsupported("4-bit weights without nested scales")
    kinds = {(type(base).__name__, base.weight.dtype) for base in fused.bases}
    if len(kinds) > 1 or (not fused.adapted and not fused.four_bit):
        raise Unsupported("weights of several kinds, or without adapters")
    return fused


def shared_inputs(decoder: Any, run: Callable[[], Any]) -> list[list[nn.Module]]:
    """Linear layers, adapted or 4-bit, by the input that they get in `run()`, in call order.

    Raises:
        Unsupported: a layer is called twice.
    """
    inside = {id(m.base_layer) for m in decoder.layers.modules() if hasattr(m, "base_layer")}
    wanted = [
        module
        for module in decoder.layers.modules()
        if id(module) not in inside
        and not isinstance(module, ExpertLora)
        and (hasattr(module, "lora_A") or type(module).__name__ == "Linear4bit")
    ]
    inputs: list[Tensor] = []
    groups: list[list[nn.Module]] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if groups and inputs[-1] is x:
            groups[-1].append(module)
        else:
            inputs.append(x)
            groups.append([module])

    hooks = [module.register_forward_pre_hook(note) for module in wanted]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    called = [id(module) for group in groups for module in group]
    if len(set(called)) < len(called):
        raise Unsupported("a linear layer is called more than once")
    return groups
