"""Compute the loss over supervised tokens of a micro-batch, summed or of each token.

`attach_loss` gives one model instance a forward that, when targets are present, runs the decoder
(the engine's, if supported), takes the hidden states of supervised positions and applies the head
to those only. On SmolLM2 on a CPU the head over every position is 39% of a plain TRL step; on a
prompt-heavy batch most of that is wasted. The attached parts are first compared with the model's
own logits, and left out if they differ.
"""

from __future__ import annotations

import contextlib
import functools
import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from lorakit.distributed.process_group import SINGLE_PROCESS, DistributedContext
from lorakit.engine.attach import Engine, attach_engine, to_device, unfused_reason
from lorakit.engine.attach_compiled import attach_compiled
from lorakit.engine.attention import Segments
from lorakit.engine.compiled_layers import CompiledLayers
from lorakit.engine.expert_streaming import StreamedExperts
from lorakit.errors import WorkError
from lorakit.model.architectures import COMPILED_FAMILIES, changes_logits, transform_logits
from lorakit.model.base_class import text_decoder
from lorakit.model.eval_mode import device_of, evaluating
from lorakit.ops.backend import has_matrix_kernels
from lorakit.ops.cross_entropy import summed_cross_entropy, token_cross_entropy
from lorakit.train.packing import PACKED, PROBE_ERRORS, PackedRows, isolates_documents
from lorakit.train.router_loss import RouterLoss
from lorakit.types import ON_GPU, Placement


@dataclass
class SupervisedLoss(ModelOutput):
    """Losses over the micro-batch's supervised tokens, in nats.

    `loss_sum`: their sum; divide by the step's count. `token_losses`: float32 [N], -log p of each
    of `targets`, and 0 for ignored ones; only if the forward was called with `per_token=True`.
    """

    loss_sum: Tensor | None = None
    token_losses: Tensor | None = None


class SupervisedHead:
    """The output embedding followed by the family's logit transform; D -> V."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.config = base.config.get_text_config()
        self.vocabulary = self.config.vocab_size

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.base.get_output_embeddings()(hidden)
        scaled: Tensor = transform_logits(self.config, logits)
        return scaled

    @property
    def frozen_weight(self) -> Tensor | None:
        """[V, D] if the head is only this product and is frozen."""
        module = self.base.get_output_embeddings()
        plain = type(module) is torch.nn.Linear and module.bias is None
        if not plain or module.weight.requires_grad or changes_logits(self.config):
            return None
        weight: Tensor = module.weight.data
        return weight


@dataclass(frozen=True)
class AttachResult:
    """Parts that `attach_loss` put under a model, each with its reason in words."""

    base: Any
    engine: Engine | None
    layers: str
    loss: str
    head: SupervisedHead | None
    compiled: CompiledLayers | None = None

    @functools.cached_property
    def packing(self) -> str:
        """PACKED or the reason why packing is off; computed (two passes) on first access."""
        return PACKED if self.engine is not None else isolates_documents(self.base, self.compiled)

    @property
    def frozen_head(self) -> bool:
        """True if the loss and its gradient are computed in one pass over the vocabulary."""
        return self.head is not None and self.head.frozen_weight is not None

    @property
    def own_layers(self) -> bool:
        """True if training runs the model's own layers, neither fused nor compiled."""
        return self.engine is None and self.compiled is None

    def place(self, micro: dict[str, Any], device: torch.device) -> dict[str, Any]:
        """Copy a micro-batch to `device`, as the layers need it."""
        return to_device(micro, device) if self.engine is None else self.engine.to_device(micro)

    @property
    def packs(self) -> bool:
        """True if documents packed into one row are isolated."""
        return self.packing == PACKED


def attach_loss(
    model: Any,
    engine: str = "off",
    device: torch.device | None = None,
    placement: Placement = ON_GPU,
    ranks: DistributedContext = SINGLE_PROCESS,
    router_aux_loss_coef: float = 0.0,
    temperature: float = 1.0,
) -> AttachResult:
    """Give `model`'s base instance the supervised forward.

    Calls without targets (generation, plain inference) keep the model's own forward. Only this
    instance changes; `detach_loss` undoes it.

    Args:
        engine: "auto" attaches the engine on GPUs with kernels, "on" wherever it supports the
            model, "off" never.
        device: device of the computation; by default that of the model.
        placement: parts to keep in host memory, or to shard over `ranks`.
        router_aux_loss_coef: weight of the loss that balances experts (`train/router_loss.py`).
        temperature: number by which logits are divided.

    Returns:
        The attached parts and the reason for each.

    Raises:
        WorkError: `placement` needs the engine, which does not support the model.
    """
    base = base_of(model)
    own_forward = type(base).forward
    device = device or device_of(base)
    attached_engine: Engine | None = None
    # A placement that needs the engine overrules what is faster.
    asked = "on" if engine == "auto" and placement.layerwise else engine
    layers = unfused_reason(asked, device)
    compiled: CompiledLayers | None = None
    fusing = layers is None
    if layers is None:
        attached_engine, layers = attach_engine(base, device, placement, ranks)
    if placement.layerwise and attached_engine is None:
        raise WorkError(
            f"this run was planned layer by layer, which needs the fast layers ({layers})",
            hint="raise memory_limit, or lower micro_batch_size or cutoff_len",
        )
    if placement.experts_on_host:
        base.lorakit_experts = StreamedExperts(base, device)
    if fusing and attached_engine is None:
        compiled, layers = compile_layers(base, layers, asked, router_aux_loss_coef)
    head, loss_path = _verified_head(base, own_forward, device)

    replacement = attached_engine or compiled
    balance = RouterLoss(base, router_aux_loss_coef) if router_aux_loss_coef else None
    base.forward = types.MethodType(
        _forward(base, own_forward, head, replacement, balance, temperature), base
    )
    base.lorakit_engine = replacement
    return AttachResult(base, attached_engine, layers, loss_path, head, compiled)


def compile_layers(
    base: Any, unfused: str, asked: str, router_aux_loss_coef: float = 0.0
) -> tuple[CompiledLayers | None, str]:
    """Compile the layers of a model without fused ones; (None, the reasons) if that fails.

    Args:
        asked: "auto" compiles the families that were measured on a GPU, "on" every family.
        router_aux_loss_coef: above 0, router logits are collected from the model's own layers.
    """
    if router_aux_loss_coef:
        return None, f"{unfused}; router_aux_loss_coef needs the model's own layers"
    measured = base.config.get_text_config().model_type in COMPILED_FAMILIES
    if not has_matrix_kernels(torch.empty(0, device=base.device)):
        return None, unfused
    if asked == "auto" and not measured:
        return None, f"{unfused} (fused_layers: on compiles its layers)"
    compiled, layers = attach_compiled(base)
    return compiled, layers if compiled is not None else f"{unfused}; {layers}"


def _forward(
    base: Any,
    own_forward: Any,
    head: SupervisedHead | None,
    engine: Engine | CompiledLayers | None,
    balance: RouterLoss | None = None,
    temperature: float = 1.0,
) -> Any:
    """The forward of one instance: its own without targets, the supervised loss with them."""
    compiled = engine if isinstance(engine, CompiledLayers) else None
    rows = PackedRows(base, compiled)

    def forward(
        self: Any,
        *args: Any,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        borders: Tensor | None = None,
        lengths: tuple[int, ...] = (),
        longest: int | None = None,
        per_token: bool = False,
        **kwargs: Any,
    ) -> Any:
        if targets is None or positions is None:
            return own_forward(self, *args, **kwargs)
        to_logits: Any = head
        if borders is not None and not isinstance(engine, Engine):
            kwargs |= rows.arguments(borders, lengths, kwargs["position_ids"], longest)
        balanced = balance if self.training else None
        mask = kwargs.get("attention_mask") if borders is None else None
        collecting: Any = balanced.collecting() if balanced else contextlib.nullcontext([])
        with collecting as logits:
            if head is None:
                states, to_logits = own_forward(self, *args, **kwargs).logits, torch.nn.Identity()
            else:
                segments = Segments.of(borders, lengths, longest)
                states = _hidden(self, engine, segments, **kwargs)
        picked = states.flatten(0, 1).index_select(0, positions)
        if temperature != 1:
            picked, to_logits = divided_logits(picked, to_logits, temperature)
        losses = token_cross_entropy(picked, targets, to_logits) if per_token else None
        loss = summed_cross_entropy(picked, targets, to_logits) if losses is None else losses.sum()
        if balanced is not None:
            # The step divides the sum by its tokens.
            loss = loss + balanced(logits, mask) * len(targets)
        return SupervisedLoss(loss_sum=loss, token_losses=losses)

    return forward


def divided_logits(hidden: Tensor, head: Any, temperature: float) -> tuple[Tensor, Any]:
    """Hidden states and a head whose logits are divided by `temperature`."""
    if getattr(head, "frozen_weight", None) is not None:  # only a product: divide the shorter side
        return hidden / temperature, head

    def divided(chunk: Tensor) -> Tensor:
        logits: Tensor = head(chunk)
        return logits / temperature

    return hidden, divided


def detach_loss(model: Any) -> None:
    """Restore the class's own forward, and the modules' own weights."""
    base = base_of(model)
    base.__dict__.pop("forward", None)
    engine = base.__dict__.pop("lorakit_engine", None)
    if engine is not None:
        engine.detach()


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _hidden(
    base: Any,
    engine: Engine | CompiledLayers | None,
    segments: Segments | None,
    **inputs: Any,
) -> Tensor:
    """Hidden states [B, T, D]: the engine's if it supports this call, else the model's own."""
    if isinstance(engine, CompiledLayers):
        training = base.training and torch.is_grad_enabled()
        if training and engine.supported:
            return engine(inputs)
        engine = None
    embeds = inputs.get("inputs_embeds")
    length = (inputs["input_ids"] if embeds is None else embeds).shape[1]
    if engine is None or not engine.supports(segments.longest if segments else length):
        hidden: Tensor = text_decoder(base)(**inputs)[0]
        return hidden
    # Rows are padded on the right: causal attention never reads the padding, so no mask is needed.
    return engine(inputs, segments)


def _verified_head(
    base: Any, own_forward: Any, device: torch.device
) -> tuple[SupervisedHead | None, str]:
    """The gathered head, if decoder + head give the model's own logits on a probe of 8 tokens."""
    config = base.config.get_text_config()
    probe = torch.arange(8, device=device).unsqueeze(0) % config.vocab_size + 1
    try:
        with evaluating(base):
            own = own_forward(base, input_ids=probe, use_cache=False).logits.float()
            head = SupervisedHead(base)
            ours = head(text_decoder(base)(input_ids=probe, use_cache=False)[0]).float()
            # The same operations on the same numbers: equal except for the order of one reduction.
            same = ours.shape == own.shape and torch.allclose(ours, own, rtol=1e-2, atol=1e-2)
    except PROBE_ERRORS as error:
        return None, f"loss over all positions ({type(error).__name__} in the gathered path)"
    if not same:
        return None, "loss over all positions (this model changes its logits after the head)"
    return head, "loss on supervised tokens only, gathered before the head"
