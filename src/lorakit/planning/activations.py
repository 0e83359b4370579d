"""Count the bytes of one micro-batch's tensors from a recipe, a config and a device.

The model's own layers with PEFT's adapters run forward and backward on fake tensors, which have
shapes and dtypes but no values. Every storage is counted while it is alive, so the bytes kept by
autograd and the peak come from the code that will run, for every architecture. Only a few layers
of each kind are run and the others are extrapolated from them: 0.2 s for a 7B model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lorakit.model.base_class import empty_base, is_inside, kept_in_16_bits, text_decoder
from lorakit.model.grouped_experts import GroupedExperts, group_experts, set_dense_bytes
from lorakit.model.layer_widths import decoder_layers
from lorakit.planning.fake_pass import fake_pass
from lorakit.planning.layer_kinds import depths_to_run, layer_kinds
from lorakit.recipe.schema import Recipe
from lorakit.types import Device

# glibc maps larger blocks one by one and returns them at once (largest M_MMAP_THRESHOLD).
MAPPED_BYTES = 32 * 1024**2

# Recipe keys that change the memory of a micro-batch.
DECIDING = [
    *("method", "micro_batch_size", "cutoff_len", "lora_r", "lora_dropout", "rank_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save"),
    *("use_dora", "bias", "expert_adapters"),
]


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes besides weights, adapters and gradients: at the end of forward, and at the peak.

    `in_heap`: the part of `kept` in blocks too small for malloc to map one by one.
    """

    kept: int
    peak: int
    in_heap: int

    @property
    def work(self) -> int:
        """Bytes at the peak beyond the kept tensors."""
        return max(0, self.peak - self.kept)


def simulate(recipe: Recipe, config: Any, device: Device, recompute: bool) -> Activations | None:
    """Simulate one micro-batch of full rows with all tokens trained.

    Args:
        recipe: with `target_modules` resolved.
        recompute: keep only the input of each layer (activation checkpointing).

    Returns:
        The bytes, or None if the model cannot be run on fake tensors.
    """
    values = {key: getattr(recipe, key) for key in DECIDING}
    memory = recipe.memory_limit_bytes or device.rank_bytes
    question = [values, config.to_dict(), device.kind, device.dtype, recompute, memory]
    return _answer(_Question(json.dumps(question, default=str), recipe, config, device, recompute))


@dataclass(frozen=True)
class _Question:
    """Cache key of a simulation: two are equal if the values in `key` are."""

    key: str
    recipe: Recipe = field(compare=False)
    config: Any = field(compare=False)
    device: Device = field(compare=False)
    recompute: bool = field(compare=False)


@functools.lru_cache(maxsize=64)
def _answer(question: _Question) -> Activations | None:
    quiet = logging.getLogger("torch._subclasses.fake_tensor")
    before = quiet.level
    quiet.setLevel(logging.CRITICAL)
    try:
        return _counted(question)
    except Exception:  # model code that reads values, or a missing package
        return None
    finally:
        quiet.setLevel(before)


def _counted(question: _Question) -> Activations:
    """Run a few layers and extrapolate to all layers of their kinds."""
    depths, shares = depths_to_run(layer_kinds(question.config))
    runs = [_run(question, depth) for depth in depths]

    def extrapolated(sizes: Iterable[int]) -> int:
        return max(0, round(sum(share * n for share, n in zip(shares, sizes, strict=True))))

    kept = extrapolated(run.kept for run in runs)
    # Only one layer works at a time: count the heaviest one, or the loss.
    forward, backward = max(run.forward for run in runs), max(run.backward for run in runs)
    if question.recompute and question.device.dtype != "float32":
        # Autocast holds a 16-bit copy of every adapter until forward ends; without recomputation
        # these copies are kept anyway.
        forward += 2 * max(0, extrapolated(run.adapters for run in runs) - runs[-1].adapters)
    return Activations(
        kept, kept + max(forward, backward), extrapolated(run.in_heap for run in runs)
    )


@dataclass(frozen=True, slots=True)
class _Pass:
    """Bytes of a model of some layers: kept at the end of forward, and the peaks beyond that."""

    kept: int
    forward: int
    backward: int
    in_heap: int
    adapters: int  # elements


def _run(question: _Question, layers: int) -> _Pass:
    """Run one micro-batch through the first `layers` layers."""
    import torch

    recipe, device = question.recipe, question.device
    model = _model(question, layers)
    head = _head(model)
    with fake_pass(model):
        _fake(model, _type(device))
        rows, length = recipe.micro_batch_size, recipe.cutoff_len
        ids = torch.zeros(rows, length, dtype=torch.long)
        targets = torch.zeros(rows * (length - 1), dtype=torch.long)
        live = _live()
        held = [*model.parameters(), *model.buffers(), ids, targets]
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
                held.append(parameter.grad)
        for tensor in held:
            live.add(tensor)
        before, small_before = live.bytes, live.small()
        with live:
            with _autocast(device):
                loss = _loss(model, head, ids, targets)
            kept, in_heap = live.bytes - before, live.small() - small_before
            forward, live.peak = live.peak, live.bytes
            loss.backward()
        # The copies of experts' adapters are not autocast's.
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        adapters = sum(p.numel() for n, p in trained.items() if ".experts." not in n)
        base = before + kept
        return _Pass(kept, forward - base, live.peak - base, in_heap, adapters)


def _head(model: Any) -> Any:
    """The head of `train.loss`; `frozen` is determined here because fake tensors have no values."""
    from lorakit.train.loss import SupervisedHead

    class Head(SupervisedHead):
        frozen = SupervisedHead(model.get_base_model()).frozen_weight is not None

        @property
        def frozen_weight(self) -> Any:
            # Not `.data`: on a fake tensor it is another storage, which would be counted.
            return self.base.get_output_embeddings().weight if self.frozen else None

    return Head(model.get_base_model())


def _loss(model: Any, head: Any, ids: Any, targets: Any) -> Any:
    """The loss of `train.loss`: the decoder, then the head over supervised tokens."""
    import torch

    from lorakit.ops.cross_entropy import summed_cross_entropy

    hidden = text_decoder(model.get_base_model())(input_ids=ids, use_cache=False)[0]
    picked = hidden.flatten(0, 1).index_select(0, torch.arange(len(targets)))
    return summed_cross_entropy(picked, targets, head)


def _model(question: _Question, layers: int) -> Any:
    """The PEFT model on the meta device, `layers` deep, in training mode."""
    import torch
    from peft import get_peft_model

    from lorakit.model.lora_config import lora_config

    recipe = question.recipe
    model = empty_base(question.config, dtype=_type(question.device))
    decoder_config = text_decoder(model).config
    if decoder_config._attn_implementation == "sdpa":
        decoder_config._attn_implementation = _unmasked_attention()
    all_layers = decoder_layers(model)
    if all_layers is not None:
        del all_layers[layers:]
    if recipe.method == "qlora":
        _mark_four_bit(model)
        group_experts(model, _type(question.device))
    plain = recipe.model_copy(update={"init_lora_weights": True})
    settings = lora_config(plain, model)
    _plan_experts(model, recipe.method == "qlora")
    set_dense_bytes(model, recipe.memory_limit_bytes or question.device.rank_bytes)
    peft_model: Any = get_peft_model(model, settings, low_cpu_mem_usage=True)
    for module in list(peft_model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__ == "Linear4bit" and not hasattr(child, "lora_A"):
                setattr(module, name, _dequantizing(child))
            elif isinstance(child, torch.nn.Dropout) and question.device.kind == "cuda":
                setattr(module, name, _cuda_dropout(child.p))
    if question.recompute:
        peft_model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    return peft_model.train()


def _type(device: Device) -> Any:
    """The dtype of the base; bfloat16 replaces float16, which fewer CPU operations support."""
    import torch

    return torch.float32 if device.dtype == "float32" else torch.bfloat16


def _unmasked_attention() -> str:
    """Register sdpa without a mask, as used for full rows, and return its name.

    On fake tensors transformers materializes the causal mask because it may be tracing: 1 GiB at
    32,768 tokens, which real runs do not allocate.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def forward(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **more: Any
    ) -> Any:
        return sdpa_attention_forward(module, query, key, value, None, **more)

    AttentionInterface.register("lorakit_unmasked", forward)
    AttentionMaskInterface.register("lorakit_unmasked", lambda *_, **__: None)
    return "lorakit_unmasked"


def _fake(model: Any, dtype: Any) -> None:
    """Replace meta tensors by fake ones; trainable ones in float32, as `add_adapter` does."""
    import torch

    shared: dict[int, Any] = {}  # a tied head stays one tensor
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                param_dtype = torch.float32 if old.requires_grad else dtype
                parameter = torch.nn.Parameter(
                    torch.empty(old.shape, dtype=param_dtype), old.requires_grad
                )
                module._parameters[name] = shared.setdefault(id(old), parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextlib.contextmanager
def _autocast(device: Device) -> Iterator[None]:
    """Autocast as the trainer does; float16 and bfloat16 have the same size."""
    import torch

    half = device.dtype == "bfloat16" or (device.kind == "cuda" and device.dtype == "float16")
    if device.kind in ("cuda", "cpu") and half:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            yield
    else:
        yield


def _live() -> Any:
    """A dispatch mode that counts the bytes of all live storages."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes = self.peak = 0
            self.sizes: dict[int, int] = {}

        def add(self, tensor: Tensor) -> None:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.sizes:
                return
            self.sizes[key] = storage.nbytes()
            self.bytes += self.sizes[key]
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.drop, key)

        def small(self) -> int:
            return sum(size for size in self.sizes.values() if size < MAPPED_BYTES)

        def drop(self, key: int) -> None:
            self.bytes -= self.sizes.pop(key, 0)

        def __torch_dispatch__(
            self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = operation(*args, **(kwargs or {}))
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.add(leaf)
            return result

    return Live()


def _mark_four_bit(model: Any) -> None:
    """Replace linear layers by bitsandbytes' 4-bit ones, so that PEFT takes its path for them."""
    import torch
    from bitsandbytes.nn import Linear4bit

    kept = kept_in_16_bits(model)
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            full_name = f"{path}.{name}".removeprefix(".")
            if type(child) is torch.nn.Linear and not is_inside(full_name, kept):
                size = (child.in_features, child.out_features, child.bias is not None)
                setattr(module, name, Linear4bit(*size, quant_type="nf4", device="meta"))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.is_loaded_in_4bit = True


def _dequantizing(layer: Any) -> Any:
    """A linear layer that builds its 16-bit weight for each product and does not keep it."""
    import torch

    class Dequantized(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, rows: int) -> Any:
            ctx.rows = rows
            return x @ x.new_empty(x.shape[-1], rows)

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad @ grad.new_empty(ctx.rows, layer.in_features), None

    class FourBit(torch.nn.Module):
        in_features, out_features = layer.in_features, layer.out_features
        weight = bias = None  # Mamba's layers hand them to a kernel that is not used

        def forward(self, x: Any) -> Any:
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            return Dequantized.apply(x.to(dtype), self.out_features)

    return FourBit()


def _plan_experts(model: Any, four_bit: bool) -> None:
    """Make grouped experts count instead of compute: rows spread evenly, 4-bit weights made."""
    import torch

    for module in model.modules():
        if not isinstance(module, GroupedExperts):
            continue
        planned: dict[str, Any] = {
            "tokens_per_expert": functools.partial(_even_counts, module.number)
        }
        if four_bit:
            planned["dense"] = functools.partial(_made_weights, module)
        for name, function in planned.items():
            setattr(module, name, function)
        for name, shape in module.expert_shapes.items() if four_bit else ():
            meta = torch.empty(shape[0], 1, dtype=torch.uint8, device="meta")
            setattr(module, name, torch.nn.Parameter(meta, requires_grad=False))


def _even_counts(number: int, experts: Any) -> list[int]:
    """All rows spread evenly over as many experts as that is possible for."""
    rows = experts.numel()
    used = next(count for count in range(number, 0, -1) if rows % count == 0)
    return [rows // used] * used + [0] * (number - used)


def _made_weights(module: Any, name: str, experts: Any) -> Any:
    import torch

    return torch.empty(len(experts), *module.sizes(name), dtype=module.compute_dtype)


def _cuda_dropout(share: float) -> Any:
    """Dropout as on CUDA: a mask of one byte per element; the CPU kernel keeps the scale."""
    import torch

    class CudaDropout(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return torch.native_dropout(x, share, True)[0]

    return CudaDropout()
