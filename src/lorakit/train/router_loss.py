"""The loss that balances tokens over experts, of a micro-batch: off unless the recipe asks for it.

    aux = E sum_e f_e P_e        (Switch Transformer, arXiv 2101.03961, equations 4 to 6)

f_e: how often a token's k choices are expert e; P_e: mean router probability of e; over the tokens
of all layers, as transformers computes it. It is not a sum over tokens, so that unlike the rest of
the loss it depends on the micro-batches. While the router is frozen, it trains the adapters before
it to send tokens elsewhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lorakit.model.grouped_experts import expert_modules


class RouterLoss:
    """Collect the router logits of a forward pass, and compute the loss of their balance."""

    def __init__(self, base: Any, coefficient: float) -> None:
        self.coefficient = coefficient
        self.routers = find_routers(base)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[list[Tensor]]:
        """Collect the logits [T, E] of every router that runs inside, without recomputation."""
        logits: list[Tensor] = []
        hooks = [
            router.register_forward_hook(lambda _, __, output: logits.append(output[0]))
            for router in self.routers
        ]
        try:
            yield logits
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, logits: list[Tensor], mask: Tensor | None) -> Tensor:
        """The weighted loss of a micro-batch; tokens with mask 0 do not count."""
        chosen = self.routers[0].top_k
        rows = [layer.reshape(-1, layer.shape[-1]) for layer in logits]
        if mask is not None:
            real = mask.reshape(-1).bool()
            rows = [layer[real] for layer in rows]
        return self.coefficient * balance(torch.cat(rows), chosen)


def balance(logits: Tensor, chosen: int) -> Tensor:
    """E sum_e f_e P_e of router logits [N, E] from which each token takes the `chosen` largest."""
    probabilities = logits.float().softmax(dim=-1)
    experts = logits.shape[-1]
    picked = probabilities.topk(chosen, dim=-1).indices.flatten()
    counts = torch.zeros(experts, device=logits.device).index_add_(
        0, picked, torch.ones_like(picked, dtype=torch.float32)
    )
    return experts * (counts / len(logits) * probabilities.mean(dim=0)).sum()


def find_routers(base: Any) -> list[Any]:
    """The modules that choose experts, one per layer with experts."""
    modules = dict(base.named_modules())
    routers = []
    for path, _ in expert_modules(base):
        plain = path.removesuffix(".base_layer").removesuffix(".base_layer")
        parent = modules[plain.rpartition(".")[0]]
        routers += [
            module
            for name, module in parent.named_children()
            if name in ("gate", "router") and hasattr(module, "top_k")
        ]
    return routers
