"""Fused layers under any Hugging Face + PEFT model, for training scripts that are not lorakit's.

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(...), LoraConfig(...))
    lorakit.accelerate(model)              # then SFTTrainer(model=model, ...) or a loop, as before

Only the decoder's forward of this one instance changes. The head, the loss, the logits and every
file stay those of transformers and PEFT.
"""

from __future__ import annotations

import itertools
import types
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPast

from lorakit.engine.attach import Engine, attach_engine, unfused_reason
from lorakit.engine.attention import Segments
from lorakit.engine.decoder_layer import SavedActivations
from lorakit.errors import ModelError
from lorakit.model.eval_mode import device_of


def accelerate(model: Any, fused_layers: str = "auto") -> str:
    """Run the decoder layers of a PEFT model fused in training; return what is used and why.

    Call it after the model is on its device and has its adapters. A forward pass in training goes
    through the fused layers if its rows are padded on the right or packed (one row whose
    `position_ids` begin again at 0); any other call, such as generation, uses the model's own
    layers. The fused layers are compared with the model's own before they are used.

    Args:
        model: a PEFT model with LoRA adapters; changed in place.
        fused_layers: "auto" uses them on GPUs with kernels, "on" on any device.

    Returns:
        One line, such as "32 fused layers, Triton kernels; probe differs by 0.11% ..." or the
        reason why the model keeps its own layers.

    Raises:
        ModelError: not a PEFT model, or `fused_layers` is neither "auto" nor "on".
    """
    if fused_layers not in ("auto", "on"):
        raise ModelError(
            f"fused_layers={fused_layers!r}: expected 'auto' or 'on'",
            hint="do not call accelerate for the model's own layers",
        )
    if not hasattr(model, "get_base_model"):
        raise ModelError(
            f"accelerate: expected a PEFT model, found {type(model).__name__}",
            hint="add adapters first: peft.get_peft_model(model, LoraConfig(...))",
        )
    base = model.get_base_model()
    device = device_of(base)
    unfused = unfused_reason(fused_layers, device)
    if unfused is not None:
        return unfused
    engine, path = attach_engine(base, device)
    if engine is not None:
        decoder = engine.decoder
        decoder.forward = types.MethodType(_forward(type(decoder).forward, engine), decoder)
    return path


def _forward(own_forward: Any, engine: Engine) -> Any:
    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        either = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        inputs = {name: value for name, value in either.items() if value is not None}
        served = (
            self.training
            and torch.is_grad_enabled()
            and len(inputs) == 1
            and past_key_values is None
            and not kwargs.get("output_hidden_states")
            and not kwargs.get("output_attentions")
            and engine.supports(next(iter(inputs.values())).shape[1])
            and _padded_on_the_right(attention_mask)
        )
        packed = _documents(position_ids) if served else None
        if not served or packed is _SEVERAL_ROWS:
            return own_forward(
                self,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **kwargs,
            )
        (rows,) = inputs.values()
        if rows.device != engine.device:
            raise ModelError(
                f"accelerate: the model was on {engine.device}, the batch is on {rows.device}",
                hint="call lorakit.accelerate after the model is on its device",
            )
        _follow_checkpointing(self, engine)
        if position_ids is not None:
            inputs["position_ids"] = position_ids
        return BaseModelOutputWithPast(last_hidden_state=engine(inputs, packed))

    return forward


_SEVERAL_ROWS = object()


def _padded_on_the_right(mask: Any) -> bool:
    """True without a mask, or if it is 1 up to the end of each row's text and 0 after it."""
    if mask is None:
        return True
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return False
    return bool((mask[:, 1:] <= mask[:, :-1]).all())


def _documents(position_ids: Tensor | None) -> Any:
    """Borders of the documents of one packed row; None where rows hold one document each."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return None
    starts = position_ids == 0
    if not bool(starts[:, 1:].any()):
        return None
    if position_ids.shape[0] > 1:
        return _SEVERAL_ROWS
    length = position_ids.shape[1]
    begins = [0, *(int(i) for i in starts[0].nonzero().flatten() if int(i) > 0), length]
    lengths = tuple(b - a for a, b in itertools.pairwise(begins))
    borders = torch.tensor(begins, dtype=torch.int32, device=position_ids.device)
    return Segments.of(borders, lengths, max(lengths))


def _follow_checkpointing(decoder: Any, engine: Engine) -> None:
    """Keep only each layer's input where activation checkpointing is enabled on the model."""
    asked = any(getattr(m, "gradient_checkpointing", False) for m in (decoder, *decoder.layers))
    level = SavedActivations.INPUT if asked else SavedActivations.ALL
    engine.set_checkpointing([level] * len(engine.layers))
