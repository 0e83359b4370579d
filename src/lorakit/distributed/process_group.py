"""Process group of a run: rank, world size and collective operations.

Each rank runs a complete trainer over the same order of steps, computes its share of a step's
examples, and adds its gradients to the others' once (`train/gradient_sync.py`). Each rank hides
torchrun's environment variables so that transformers and accelerate behave as single-process.
"""

from __future__ import annotations

import datetime
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from lorakit.dependencies import installed_version
from lorakit.distributed.heartbeat import GRACE_SECONDS, SILENT_SECONDS, Beat, Heartbeat, key
from lorakit.distributed.launch_env import hidden_launch_variables, launch_environment
from lorakit.errors import WorkError
from lorakit.types import Device

T = TypeVar("T")
# Hung ranks are detected by the heartbeat; rank 0 may evaluate for an hour in the meantime.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=30)
RENDEZVOUS_TIMEOUT_S = 120.0
COMPARED = ("lorakit", "torch", "transformers", "peft")
_OWN_ENV = "LORAKIT_CARD_OF_RANK"
# A script may train several times: each run has its own prefix in the store.
_RENDEZVOUS_COUNT = itertools.count()


class DistributedContext:
    """The processes that share each step; a single one by default.

    Args:
        number: rank of this process. `count`: world size. `per_node`: ranks on each machine.
    """

    def __init__(
        self, number: int = 0, count: int = 1, per_node: int = 1, heartbeat: Any = None
    ) -> None:
        self.rank, self.world_size, self.local_world_size = number, count, per_node
        self.heartbeat: Heartbeat | None = heartbeat
        self.store: Any = None
        self.node_group: Any = None
        self.cpu_group: Any = None

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
            import torch.distributed as dist

            group = self.cpu_group if tensor.device.type == "cpu" else None
            self._run_collective(lambda: dist.all_reduce(tensor, group=group))

    def all_gather_object(self, thing: T) -> list[T]:
        """Gather `thing` from every rank, in order of rank."""
        if self.world_size == 1:
            return [thing]
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.world_size
        self._run_collective(lambda: dist.all_gather_object(gathered, thing, group=self.cpu_group))
        return gathered

    def run_on_main_and_broadcast(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 and broadcast its result."""
        if self.world_size == 1:
            return work()
        import torch.distributed as dist

        box: list[Any] = [work() if self.is_main else None]
        self._run_collective(lambda: dist.broadcast_object_list(box, src=0, group=self.cpu_group))
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
        previous = self.rank - 1
        while self.rank % self.local_world_size and not self.store.check([f"load_turn/{previous}"]):
            time.sleep(0.2)

    def release_load_turn(self) -> None:
        """Give the turn to load the base to the next rank of this machine."""
        if self.world_size > 1:
            self.store.set(f"load_turn/{self.rank}", "")

    def at(self, step: int, kept: Callable[[], str], folder: Any = None) -> None:
        """Record the last step and kept work for the message at a sudden end."""
        if self.heartbeat is not None:
            self.heartbeat.set_step(step, kept, folder)

    def _run_collective(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except RuntimeError:
            # A rank is dead: the heartbeat names it, and ends this process.
            time.sleep(SILENT_SECONDS + 5 * GRACE_SECONDS)
            raise


SINGLE_PROCESS = DistributedContext()


def shared_device(device: Device, ranks: DistributedContext) -> Device:
    """The device that every rank plans for, with the smallest memory of all.

    Raises:
        WorkError: the base would have different dtypes on the ranks.
    """
    if ranks.world_size == 1:
        return device
    devices = ranks.all_gather_object(device)
    dtypes = {other.dtype for other in devices}
    if len(dtypes) > 1:
        listed = ", ".join(f"rank {n}: {d.dtype} on {d.name}" for n, d in enumerate(devices))
        raise WorkError(
            f"the base would have different dtypes on the ranks: {listed}",
            hint="set dtype to one that all of them support: float16 or float32",
        )
    names = [
        f"{sum(d.name == name for d in devices)} x {name}" for name in {d.name for d in devices}
    ]
    on = f" on {ranks.nodes} machines" if ranks.nodes > 1 else ""
    return replace(
        min(devices, key=lambda other: other.memory_bytes),
        ranks=ranks.world_size,
        nodes=ranks.nodes,
        reasons={**device.reasons, "ranks": ", ".join(sorted(names)) + on},
    )


@contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Join the ranks that torchrun started, or a single-process context.

    Raises:
        WorkError: a rank does not join, or its GPU cannot be reached; the message names it.
        RunError: the environment holds a part of a launcher's variables.
    """
    set_cuda_device_from_local_rank()
    env = launch_environment(strict=True)
    with hidden_launch_variables():
        if not env:
            yield SINGLE_PROCESS
        else:
            with _ranks(env) as ranks:
                yield ranks


@contextmanager
def _ranks(env: dict[str, str]) -> Iterator[DistributedContext]:
    import torch.distributed as dist

    ranks, store = _rendezvous(env)
    assert ranks.heartbeat is not None
    try:
        _init_groups(ranks, store)
        yield ranks
    except BaseException:
        ranks.heartbeat.shutdown("failed")
        raise
    ranks.run_on_main_and_broadcast(lambda: None)  # the store must outlive all ranks
    ranks.heartbeat.shutdown("left")
    # A group that outlives this call may be destroyed after the interpreter: gloo aborts then.
    ranks.cpu_group = ranks.node_group = ranks.store = ranks.heartbeat = None
    dist.destroy_process_group()


def _rendezvous(env: dict[str, str]) -> tuple[DistributedContext, Any]:
    """Find all ranks and start the heartbeat; return (ranks, the launcher's store)."""
    import torch
    import torch.distributed as dist

    rank, world_size, local, per_node = (
        int(env[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    on_gpu = torch.cuda.is_available()
    is_host = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and rank == 0
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    rendezvous = next(_RENDEZVOUS_COUNT)

    def connect(hosts: bool) -> Any:
        wait = datetime.timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
        store = dist.TCPStore(
            *address, world_size=world_size, is_master=hosts, timeout=wait, wait_for_workers=False
        )
        return dist.PrefixStore(f"lorakit/{rendezvous}", store)

    store = connect(is_host)
    heartbeat = Heartbeat(
        connect(False), rank, world_size, f"cuda:{local}" if on_gpu else f"cpu:{local}"
    )
    _wait_for_all(store, world_size)
    heartbeat.start()
    return DistributedContext(rank, world_size, per_node, heartbeat), store


def _init_groups(ranks: DistributedContext, store: Any) -> None:
    """Create the groups of collective operations, and test them."""
    import torch
    import torch.distributed as dist

    assert ranks.heartbeat is not None
    ranks.store = store
    _require_same_device_type(ranks.heartbeat.read())
    on_gpu = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=store,
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=torch.device("cuda", 0) if on_gpu else None,
    )
    ranks.cpu_group = (
        dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if on_gpu else dist.group.WORLD
    )
    for node in range(ranks.nodes):
        members = list(range(node * ranks.local_world_size, (node + 1) * ranks.local_world_size))
        group = (
            dist.new_group(members, timeout=COLLECTIVE_TIMEOUT)
            if ranks.nodes > 1
            else dist.group.WORLD
        )
        if ranks.rank in members:
            ranks.node_group = group
    _preflight(ranks, "cuda" if on_gpu else "cpu")


def _preflight(ranks: DistributedContext, device: str) -> None:
    """Run one all-reduce and compare versions; the heartbeat names ranks that hang here."""
    import torch

    probe = torch.full((1,), float(ranks.rank), device=device)
    ranks.all_reduce_(probe)
    expected = ranks.world_size * (ranks.world_size - 1) / 2
    if float(probe) != expected:
        raise WorkError(
            f"an all-reduce over {ranks.world_size} ranks gave {float(probe):g}, expected "
            f"{expected:g}",
            hint="faulty GPU or interconnect; try NCCL_P2P_DISABLE=1",
        )
    all_versions = ranks.all_gather_object(
        [f"{name} {installed_version(name)}" for name in COMPARED]
    )
    for rank, versions in enumerate(all_versions):
        if versions != all_versions[0]:
            raise WorkError(
                f"rank {rank} has {', '.join(versions)}; rank 0 has {', '.join(all_versions[0])}",
                hint="install the same versions on every machine",
            )
    assert ranks.heartbeat is not None
    ranks.heartbeat.own_beat.state = "ready"


def set_cuda_device_from_local_rank() -> None:
    """Make only one GPU visible to this process, by its local rank, before CUDA is initialized.

    Launchers that already show each process one GPU (Ray) are left alone.
    """
    env = launch_environment()
    if not env or int(env["LOCAL_WORLD_SIZE"]) == 1 or _OWN_ENV in os.environ:
        return
    local = env["LOCAL_RANK"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible is not None else None
    if names is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = local
    elif len(names) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(local)] if int(local) < len(names) else ""
    os.environ[_OWN_ENV] = local


def _require_same_device_type(beats: list[Beat]) -> None:
    """Check that all ranks or none have a GPU.

    Raises:
        WorkError: some ranks have a GPU and others do not.
    """
    without = [beat for beat in beats if not beat.device.startswith("cuda")]
    if without and len(without) < len(beats):
        raise WorkError(
            f"no CUDA GPU for {', '.join(map(str, without))}; the other ranks have one",
            hint="start as many processes on a machine as it has GPUs: --gpus, --nproc-per-node",
        )


def _wait_for_all(store: Any, count: int) -> None:
    """Wait for every rank's first heartbeat.

    Raises:
        WorkError: names the ranks that do not join in time.
    """
    until = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while missing := [rank for rank in range(count) if not store.check([key(rank)])]:
        if time.monotonic() > until:
            names = ", ".join(map(str, missing))
            raise WorkError(
                f"rank {names} of {count} did not join within {RENDEZVOUS_TIMEOUT_S:.0f} s",
                hint="check its log for an earlier error, and that torchrun was started on every "
                "machine with the same --nnodes and --rdzv-endpoint",
            )
        time.sleep(0.05)
