"""Sum gradients, loss and control flags over all ranks.

A step's loss is divided by the supervised tokens of all its examples, which every rank knows, so
gradients are simply added: they do not depend on the number of ranks. Only the adapters' gradients
are sent. Requests of a rank (stop after a signal, save by the clock) are summed with them, so that
all ranks act after the same step.
"""

from __future__ import annotations

import functools
import hashlib
import signal
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import Tensor, nn

from lorakit.data.batching import tokens_of
from lorakit.distributed.process_group import DistributedContext
from lorakit.errors import WorkError
from lorakit.train.signals import StopRequest
from lorakit.types import Example

# At this document length attention takes as long as all products of a 7B layer.
ATTENTION_EQUALS = 16384
SEED_STEP = 1_000_003


def partition_examples(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Divide a step's examples among `count` ranks so that all take equally long.

    The longest go first, each to the rank with the least work so far (LPT, Graham 1969).

    Returns:
        Indices into `lengths` per rank, ascending; every index once. A rank may have none.
    """
    work = [0.0] * count
    assigned: list[list[int]] = [[] for _ in range(count)]
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        rank = min(range(count), key=lambda r: (work[r], len(assigned[r]), r))
        work[rank] += lengths[index] * (1 + lengths[index] / ATTENTION_EQUALS)
        assigned[rank].append(index)
    return [sorted(indices) for indices in assigned]


def local_examples(examples: Sequence[Example], ranks: DistributedContext) -> list[Example]:
    """The examples of a step that this rank computes."""
    if ranks.world_size == 1:
        return list(examples)
    lengths = [tokens_of(example) for example in examples]
    return [examples[i] for i in partition_examples(lengths, ranks.world_size)[ranks.rank]]


def keep_steps_complete(accelerator: Any, ranks: DistributedContext) -> None:
    """Let accelerate hand each rank every row of a step, and the model without a DDP wrapper.

    Ranks divide a step by tokens (`local_examples`) and sum its gradients once (`GradientSync`).
    """
    if ranks.world_size == 1:
        return
    settings = accelerator.dataloader_config

    def every_row(loader: Any, device_placement: bool | None = None) -> Any:
        return prepare_data_loader(
            loader,
            num_processes=1,
            process_index=0,
            use_seedable_sampler=settings.use_seedable_sampler,
            data_seed=settings.data_seed,
            non_blocking=settings.non_blocking,
        )

    accelerator.prepare_data_loader = every_row
    # "Evaluation" prepares autocast alone.
    accelerator.prepare_model = functools.partial(accelerator.prepare_model, evaluation_mode=True)


def seed_per_rank(seed: int, ranks: DistributedContext) -> None:
    """Seed different dropout masks on each rank; rank 0 keeps those of a single process."""
    if not ranks.is_main:
        torch.manual_seed(seed + ranks.rank * SEED_STEP)


def assert_parameters_in_sync(
    ranks: DistributedContext, parameters: Sequence[nn.Parameter], step: int
) -> None:
    """Compare the adapters of all ranks, bit by bit.

    Raises:
        WorkError: the adapters of two ranks differ.
    """
    if ranks.world_size == 1:
        return
    digest = hashlib.sha256()
    for parameter in parameters:
        digest.update(parameter.detach().cpu().numpy().tobytes())
    for rank, other in enumerate(ranks.all_gather_object(digest.hexdigest())):
        if other != digest.hexdigest():
            raise WorkError(
                f"step {step}: the adapters of rank {rank} differ from those of rank {ranks.rank}; "
                "nothing was saved",
                hint="a GPU or its memory computes wrong: run with --gpus 1 on each to find it, "
                "then resume from the last checkpoint with --resume",
            )


class GradientSync:
    """Collective operations of a training step.

    Args:
        stop: set by a signal to this process.
    """

    def __init__(self, ranks: DistributedContext, stop: StopRequest) -> None:
        self.ranks, self.stop = ranks, stop
        self.save_requested = self.save_agreed = False
        self.agreed: Tensor | None = None
        self.stopping: signal.Signals | None = None

    def agree_to_save(self, due: bool) -> bool:
        """Decide whether all ranks save after this step, given that it is due on this rank.

        With several ranks rank 0's clock decides, with a delay of one step.
        """
        if self.ranks.world_size == 1:
            return due
        self._read_flags()
        self.save_requested = due and self.ranks.is_main and not self.save_agreed
        return self.save_agreed

    @property
    def should_stop(self) -> bool:
        """True if all ranks stop after this step."""
        if self.ranks.world_size == 1:
            return self.stop.asked
        self._read_flags()
        return self.stopping is not None

    @property
    def exit_code(self) -> int:
        """128 + signal number: of this process's signal, or SIGTERM if another rank got one."""
        if self.ranks.world_size == 1:
            return self.stop.exit_code
        return 0 if self.stopping is None else 128 + int(self.stop.signal or self.stopping)

    def add(self, buffers: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Sum gradients over the ranks, in place; returns the summed loss.

        Args:
            buffers: float32, each gradient in one of them; equal number and sizes on every rank.
        """
        if self.ranks.world_size == 1:
            return loss
        for buffer in buffers:
            self.ranks.all_reduce_(buffer)
        # Filled on the GPU: a copy from the host would wait for all queued work, and the following
        # operations (norm, clipping) would be launched while the GPU is idle.
        tail = torch.empty(3, device=loss.device)
        tail[0] = loss.detach()
        tail[1].fill_(float(self.stop.asked))
        tail[2].fill_(float(self.save_requested))
        self.ranks.all_reduce_(tail)
        # Read later, when needed: waiting here would leave the GPU idle.
        self.agreed = tail[1:]
        return tail[0]

    def _read_flags(self) -> None:
        if self.agreed is None:
            return
        stop, save = self.agreed.tolist()
        self.agreed = None
        if stop:
            self.stopping = self.stop.signal or signal.SIGTERM
        self.save_agreed = bool(save)
