"""Interface of objectives that are functions of the log-probabilities of tokens."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lorakit.data.batching import Batch


class TokenObjective(Protocol):
    """A loss computed from the losses of a micro-batch's tokens, such as DPO's.

    Attributes:
        inputs: names of the tensors of a micro-batch that the model does not take.
        metrics: number of metrics.
    """

    inputs: frozenset[str]
    metrics: int

    def __call__(self, token_losses: Tensor, micro: Batch) -> tuple[Tensor, Tensor]:
        """Compute the loss of a micro-batch.

        Args:
            token_losses: -log p of each target, float32 [N]; 0 for padding.
            micro: the micro-batch, with `inputs`.

        Returns:
            The loss, summed over the examples, with its gradient, and the sums of metrics [K].
            Neither synchronizes with the host.
        """


def loss_and_sums(result: Tensor, objective: TokenObjective | None) -> tuple[Tensor, Tensor | None]:
    """Divide the result of a step into its loss and the sums of metrics.

    A rank without micro-batches has no vector of sums.
    """
    if objective is None:
        return result, None
    if not result.dim():
        return result, torch.zeros(objective.metrics, device=result.device)
    return result[0], result[1:].clone()


def model_inputs(objective: TokenObjective, micro: Batch) -> dict[str, Any]:
    """The micro-batch without what only the objective reads."""
    return {name: value for name, value in micro.items() if name not in objective.inputs}
