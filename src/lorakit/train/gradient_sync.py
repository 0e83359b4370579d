"""Each rank's gradients, loss and wishes enter; on every rank the sums leave.

A step's loss is divided by the supervised tokens of all its examples, which every rank knows, so
gradients just add up: they do not depend on how many ranks share the step. Only adapters' gradients
travel. What a rank wishes (stop after a signal, save by the clock) travels with them, so that all
do the same after the same step.
"""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lorakit.distributed.process_group import DistributedContext
from lorakit.errors import WorkError
from lorakit.train.signals import StopRequest
from lorakit.types import Example

# Attention takes as long as all products of a 7B layer where a document has so many tokens.
ATTENTION_EQUALS = 16384
SEED_STEP = 1_000_003


def partition_examples(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Which examples of a step each of `count` ranks computes, so that all take equally long.

    The longest go first, each to the rank with the least work so far (LPT, Graham 1969).

    Returns:
        Places in `lengths`, ascending; every place once. A rank may have none.
    """
    work = [0.0] * count
    given: list[list[int]] = [[] for _ in range(count)]
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(count), key=lambda r: (work[r], len(given[r]), r))
        work[rank] += lengths[place] * (1 + lengths[place] / ATTENTION_EQUALS)
        given[rank].append(place)
    return [sorted(places) for places in given]


def local_examples(examples: Sequence[Example], ranks: DistributedContext) -> list[Example]:
    """Those of a step's examples that this rank computes."""
    if ranks.count == 1:
        return list(examples)
    lengths = [len(example.input_ids) for example in examples]
    return [examples[i] for i in partition_examples(lengths, ranks.count)[ranks.number]]


def seed_per_rank(seed: int, ranks: DistributedContext) -> None:
    """Other dropout masks on each rank; rank 0 keeps those it would draw alone."""
    if not ranks.first:
        torch.manual_seed(seed + ranks.number * SEED_STEP)


def assert_parameters_in_sync(
    ranks: DistributedContext, parameters: Sequence[nn.Parameter], step: int
) -> None:
    """Compare the adapters of all ranks, bit by bit.

    Raises:
        WorkError: they have drifted apart.
    """
    if ranks.count == 1:
        return
    found = hashlib.sha256()
    for parameter in parameters:
        found.update(parameter.detach().cpu().numpy().tobytes())
    for number, other in enumerate(ranks.gather(found.hexdigest())):
        if other != found.hexdigest():
            raise WorkError(
                f"step {step}: rank {number} holds other adapters than rank {ranks.number}; "
                "nothing was saved",
                hint="a card or its memory computes wrong: which one, a run with --gpus 1 on each "
                "shows; go on with --resume from the last checkpoint",
            )


class GradientSync:
    """What the ranks of a run do as one.

    Args:
        stop: set by a signal to this process.
    """

    def __init__(self, ranks: DistributedContext, stop: StopRequest) -> None:
        self.ranks, self.stop = ranks, stop
        self.save_wished = self.save_agreed = False
        self.agreed: Tensor | None = None
        self.stopping: signal.Signals | None = None

    def saves(self, due: bool) -> bool:
        """Whether all save after this step, where this rank's clock says that it is time, or not.

        With several ranks it is rank 0's clock, and the step after that in which it rang.
        """
        if self.ranks.count == 1:
            return due
        self._settle()
        self.save_wished = due and self.ranks.first and not self.save_agreed
        return self.save_agreed

    @property
    def stop_agreed(self) -> bool:
        """All stop after this step."""
        if self.ranks.count == 1:
            return self.stop.asked
        self._settle()
        return self.stopping is not None

    @property
    def exit_code(self) -> int:
        """128 + signal number: this process's, or SIGTERM's where another one had it."""
        if self.ranks.count == 1:
            return self.stop.exit_code
        return 0 if self.stopping is None else 128 + int(self.stop.signal or self.stopping)

    def add(self, buffers: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Sum gradients over the ranks, in place; returns the summed loss.

        Args:
            buffers: float32, each gradient in one of them; as many and as long on every rank.
        """
        if self.ranks.count == 1:
            return loss
        for buffer in buffers:
            self.ranks.add(buffer)
        # Filled on the card: a copy from the host would wait for all that is queued there, and what
        # follows (norm, clipping) would be launched while the card has no work.
        tail = torch.empty(3, device=loss.device)
        tail[0] = loss.detach()
        tail[1].fill_(float(self.stop.asked))
        tail[2].fill_(float(self.save_wished))
        self.ranks.add(tail)
        # Read when it is needed: a wait here would leave the card without work.
        self.agreed = tail[1:]
        return tail[0]

    def _settle(self) -> None:
        if self.agreed is None:
            return
        stop, save = self.agreed.tolist()
        self.agreed = None
        if stop:
            self.stopping = self.stop.signal or signal.SIGTERM
        self.save_agreed = bool(save)
