"""The ranks of a run: accelerate's state, and collective operations between them.

torchrun or `accelerate launch` starts the processes, accelerate's `PartialState` makes the process
group. Each rank runs a complete trainer over the same order of steps, computes its share of a
step's examples, and adds its gradients to the others' once (`train/gradient_sync.py`).
"""

from __future__ import annotations

import atexit
import functools
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from lorakit.dependencies import installed_version
from lorakit.distributed.launch_env import (
    hidden_launch_variables,
    launch_environment,
    prepare_rank,
)
from lorakit.distributed.rank_watch import LOST_SECONDS, Member, RankWatch
from lorakit.errors import WorkError

T = TypeVar("T")
# Rank 0 may evaluate for an hour while the others wait on the host; `RankWatch` finds lost ranks.
HOST_TIMEOUT = timedelta(days=30)
# On GPUs the ranks meet only in steps, the latest after a checkpoint of rank 0.
DEVICE_TIMEOUT = timedelta(hours=1)
# For all ranks to join and to add one number, which takes seconds.
JOIN_SECONDS = 120.0
COMPARED = ("lorakit", "torch", "transformers", "peft")
NO_ANSWER = (
    f"error: the ranks do not answer each other within {JOIN_SECONDS:.0f} s\nhint: set NCCL_DEBUG="
    "INFO for details; GPUs of one machine without peer access need NCCL_P2P_DISABLE=1, several "
    "machines an open network (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)\n"
)


class DistributedContext:
    """The processes that share each step; a single one by default.

    Args:
        number: rank of this process. `count`: world size. `per_node`: ranks on each machine.
    """

    watch: RankWatch | None = None
    node_group: Any = None
    cpu_group: Any = None

    def __init__(self, number: int = 0, count: int = 1, per_node: int = 1) -> None:
        self.rank, self.world_size, self.local_world_size = number, count, per_node

    @property
    def is_main(self) -> bool:
        """True for the rank that writes files and prints."""
        return self.rank == 0

    @property
    def nodes(self) -> int:
        """Number of machines."""
        return self.world_size // self.local_world_size

    def all_reduce_(self, tensor: Any) -> None:
        """Sum `tensor` over all ranks in place; the result is bit-identical on each."""
        if self.world_size > 1:
            group = self.cpu_group if tensor.device.type == "cpu" else None
            _collective("all_reduce", tensor, group=group)

    def all_gather_object(self, thing: T) -> list[T]:
        """Gather `thing` from every rank, in order of rank."""
        gathered: list[Any] = [thing] * self.world_size
        if self.world_size > 1:
            _collective("all_gather_object", gathered, thing, group=self.cpu_group)
        return gathered

    def run_on_main_and_broadcast(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and broadcast its result."""
        box: list[Any] = [work() if self.is_main else None]
        if self.world_size > 1:
            _collective("broadcast_object_list", box, src=0, group=self.cpu_group)
        return box[0]

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0 before the others, so that downloads and caches are made once."""
        if not self.is_main:
            self.run_on_main_and_broadcast(lambda: None)
        yield
        if self.is_main:
            self.run_on_main_and_broadcast(lambda: None)

    def wait_for_load_turn(self) -> None:
        """Wait until the preceding rank of this machine has released its turn to load the base."""
        import torch

        if self.rank % self.local_world_size:
            _collective("recv", torch.empty(1), src=self.rank - 1, group=self.cpu_group)

    def release_load_turn(self) -> None:
        """Give the turn to load the base to the next rank of this machine."""
        import torch

        if (self.rank + 1) % self.local_world_size:
            _collective("send", torch.zeros(1), dst=self.rank + 1, group=self.cpu_group)

    def at(self, step: int, kept: Callable[[], str], folder: Any = None) -> None:
        """Record the last step and kept work for the message at a sudden end."""
        if self.watch is not None:
            self.watch.step, self.watch.checkpoint_summary, self.watch.folder = step, kept, folder


SINGLE_PROCESS = DistributedContext()


def _collective(name: str, *arguments: Any, **more: Any) -> None:
    import torch.distributed as dist

    getattr(dist, name)(*arguments, **more)


def _of_a_collective(error: BaseException) -> bool:
    """True if a collective operation raised the error, ours or the trainer's: a rank is lost."""
    frames = traceback.walk_tb(error.__traceback__)
    names = (frame.f_globals.get("__name__", "") for frame, _ in frames)
    return isinstance(error, RuntimeError) and any(n.startswith("torch.distributed") for n in names)


@contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Join the ranks that torchrun started, or a single-process context.

    Raises:
        WorkError: a rank does not join, or its GPU cannot be reached; the message names it.
        RunError: the environment holds a part of a launcher's variables.
    """
    prepare_rank()
    if not launch_environment(strict=True):
        with hidden_launch_variables():
            yield SINGLE_PROCESS
        return
    ranks = _join()
    try:
        yield ranks
    except BaseException as error:
        if ranks.watch is not None:
            if _of_a_collective(error):
                time.sleep(LOST_SECONDS)  # the watch names the lost rank, and ends this process
            ranks.watch.fail()
        raise
    ranks.run_on_main_and_broadcast(lambda: None)  # no rank ends before the others


@functools.cache
def _join() -> DistributedContext:
    """Join the other ranks, once for all runs of this process."""
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    env, on_gpu = launch_environment(), torch.cuda.is_available()
    rank, count, per_node = (int(env[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    ranks = DistributedContext(rank, count, per_node)
    alarm = threading.Timer(JOIN_SECONDS, lambda: os.write(2, NO_ANSWER.encode()) and os._exit(1))
    alarm.daemon = True
    alarm.start()
    PartialState(cpu=not on_gpu, timeout=DEVICE_TIMEOUT if on_gpu else HOST_TIMEOUT)
    ranks.cpu_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    members = ranks.all_gather_object(_this_member(rank))
    check_members(members)
    nodes = [list(range(first, first + per_node)) for first in range(0, count, per_node)]
    ranks.node_group, _ = dist.new_subgroups_by_enumeration(nodes)
    address, waits = (env["MASTER_ADDR"], int(env["MASTER_PORT"])), timedelta(seconds=LOST_SECONDS)
    store = dist.TCPStore(*address, timeout=waits, wait_for_workers=False)
    watched = dist.new_group(backend="gloo", timeout=waits)
    ranks.watch = RankWatch(members, rank, watched, dist.PrefixStore("lorakit", store))
    ranks.watch.start()
    probe = torch.full((1,), float(rank), device="cuda" if on_gpu else "cpu")
    ranks.all_reduce_(probe)
    if float(probe) != count * (count - 1) / 2:
        raise WorkError(
            f"an all-reduce of the numbers of {count} ranks gave {float(probe):g}",
            hint="faulty GPU or interconnect; try NCCL_P2P_DISABLE=1",
        )
    alarm.cancel()
    atexit.register(_leave, ranks)
    return ranks


def _leave(ranks: DistributedContext) -> None:
    """End the watch and the groups: a group that outlives the interpreter may abort it."""
    import torch.distributed as dist

    if ranks.watch is not None and ranks.watch.is_alive():
        ranks.watch.finish(ranks.all_gather_object)
        dist.destroy_process_group()


def _this_member(rank: int) -> Member:
    import torch

    namespace = os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else ""
    on_gpu = torch.cuda.is_available()
    device = f"cuda:{launch_environment()['LOCAL_RANK']}" if on_gpu else f"cpu:{rank}"
    versions = ", ".join(f"{name} {installed_version(name)}" for name in COMPARED)
    return Member(rank, device, socket.gethostname(), namespace, os.getpid(), versions)


def check_members(members: Sequence[Member]) -> None:
    """Check that all ranks have a GPU or none has, and the same versions.

    Raises:
        WorkError: names the ranks that differ.
    """
    without = [m for m in members if not m.device.startswith("cuda")]
    if without and len(without) < len(members):
        raise WorkError(
            f"no CUDA GPU for {', '.join(map(str, without))}; the other ranks have one",
            hint="start as many processes on a machine as it has GPUs: --gpus, --nproc-per-node",
        )
    for member in members:
        if member.versions != members[0].versions:
            raise WorkError(
                f"{member} has {member.versions}; rank 0 has {members[0].versions}",
                hint="install the same versions on every machine",
            )
