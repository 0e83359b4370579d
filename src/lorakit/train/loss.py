"""A PEFT model and a batch enter; the summed loss over supervised tokens leaves.

`attach_loss` gives one model instance a forward that, when labels are present, runs the decoder,
gathers the supervised positions and applies the head to those alone. On SmolLM2 on a CPU the head
over every position is 39% of a plain TRL step; on a prompt-heavy batch most of that is wasted.
The path is checked once against the model's own logits and falls back to them where they differ.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from lorakit.model.families import transform_logits
from lorakit.ops.cross_entropy import summed_cross_entropy
from lorakit.records import IGNORE


@dataclass
class SupervisedLoss(ModelOutput):
    """`loss_sum`: nats over `tokens` supervised tokens; divide by the whole step's count."""

    loss_sum: Tensor | None = None
    tokens: Tensor | None = None


class _Head:
    """The output embedding followed by the family's logit transform; D -> V."""

    def __init__(self, base: Any) -> None:
        self.base = base
        self.vocabulary = base.config.get_text_config().vocab_size

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self.base.get_output_embeddings()(hidden)
        scaled: Tensor = transform_logits(self.base.config.get_text_config(), logits)
        return scaled


def attach_loss(model: Any) -> str:
    """Give `model`'s base instance the supervised forward; returns which path it took and why.

    Calls without labels (generation, plain inference) keep the model's own forward. Only this
    instance changes; `detach_loss` undoes it.
    """
    base = base_of(model)
    own_forward = type(base).forward
    head, path = _verified_head(base, own_forward)

    def forward(self: Any, *args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return own_forward(self, *args, **kwargs)
        kwargs.pop("num_items_in_batch", None)
        if head is None:
            logits = own_forward(self, *args, **kwargs).logits
            return _from_logits(logits, labels)
        hidden = self.get_decoder()(*args, **kwargs)[0]
        return _from_hidden(hidden, labels, head)

    base.forward = types.MethodType(forward, base)
    return path


def detach_loss(model: Any) -> None:
    """Give the instance its class's own forward back."""
    base_of(model).__dict__.pop("forward", None)


def base_of(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _from_hidden(hidden: Tensor, labels: Tensor, head: Any) -> SupervisedLoss:
    """hidden [B, T, D], labels [B, T]: position t predicts label t + 1."""
    targets = labels[:, 1:]
    chosen = targets != IGNORE  # [B, T-1]
    picked = hidden[:, :-1][chosen]  # [N, D]
    loss = summed_cross_entropy(picked, targets[chosen], head)
    return SupervisedLoss(loss_sum=loss, tokens=chosen.sum())


def _from_logits(logits: Tensor, labels: Tensor) -> SupervisedLoss:
    targets = labels[:, 1:]
    chosen = targets != IGNORE
    loss = summed_cross_entropy(logits[:, :-1][chosen], targets[chosen], torch.nn.Identity())
    return SupervisedLoss(loss_sum=loss, tokens=chosen.sum())


@torch.no_grad()
def _verified_head(base: Any, own_forward: Any) -> tuple[_Head | None, str]:
    """The gathered head, if decoder + head give the model's own logits on a probe of 8 tokens."""
    config = base.config.get_text_config()
    probe = torch.arange(8, device=base.device).unsqueeze(0) % config.vocab_size + 1
    was_training = base.training
    base.eval()
    try:
        own = own_forward(base, input_ids=probe, use_cache=False).logits.float()
        head = _Head(base)
        ours = head(base.get_decoder()(input_ids=probe, use_cache=False)[0]).float()
        # The same operations on the same numbers: equal up to the order of one reduction.
        same = ours.shape == own.shape and torch.allclose(ours, own, rtol=1e-2, atol=1e-2)
    except (AttributeError, TypeError, NotImplementedError, RuntimeError) as error:
        return None, f"loss over all positions ({type(error).__name__} in the gathered path)"
    finally:
        base.train(was_training)
    if not same:
        return None, "loss over all positions (this model changes its logits after the head)"
    return head, "loss on supervised tokens only, gathered before the head"
