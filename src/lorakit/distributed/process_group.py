"""torchrun's environment enters; this process's place among those that share each step leaves.

Each rank runs a whole trainer over the same order of steps, computes its share of a step's
examples, and adds its gradients to the others' once (`train/gradient_sync.py`). To transformers and
accelerate each is alone: they see one device and no environment of torchrun's.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import itertools
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, TypeVar

from lorakit.distributed.heartbeat import GRACE_SECONDS, SILENT_SECONDS, Beat, Heartbeat, key
from lorakit.errors import WorkError
from lorakit.types import Device

T = TypeVar("T")
# What hangs is found by the heartbeat; rank 0 may well evaluate for an hour meanwhile.
COLLECTIVE_TIMEOUT = datetime.timedelta(days=30)
RENDEZVOUS_TIMEOUT_S = 120.0
COMPARED = ("lorakit", "torch", "transformers", "peft")
_OWN_ENV = "LORAKIT_CARD_OF_RANK"
_RENDEZVOUS_COUNT = (
    itertools.count()
)  # a script may train twice: each run has its own part of the store
# Read by transformers, accelerate and trl, which would divide the work a second time.
TORCHRUN_ENV_VARS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class DistributedContext:
    """The processes that share each step; alone by default.

    Args:
        number: this one's, from 0. `per_node`: so many on each machine.
    """

    def __init__(
        self, number: int = 0, count: int = 1, per_node: int = 1, heartbeat: Any = None
    ) -> None:
        self.number, self.count, self.per_node = number, count, per_node
        self.heartbeat: Heartbeat | None = heartbeat
        self.store: Any = None
        self.of_node: Any = None
        self.of_host: Any = None

    @property
    def first(self) -> bool:
        """Whether this one writes and speaks for all."""
        return self.number == 0

    @property
    def nodes(self) -> int:
        """Machines."""
        return self.count // self.per_node

    def add(self, tensor: Any) -> None:
        """Sum `tensor` over all ranks, in place; each gets the same bits."""
        if self.count > 1:
            import torch.distributed as dist

            group = self.of_host if tensor.device.type == "cpu" else None
            self._together(lambda: dist.all_reduce(tensor, group=group))

    def gather(self, thing: T) -> list[T]:
        """Every rank's `thing`, by rank."""
        if self.count == 1:
            return [thing]
        import torch.distributed as dist

        found: list[Any] = [None] * self.count
        self._together(lambda: dist.all_gather_object(found, thing, group=self.of_host))
        return found

    def told(self, work: Callable[[], T]) -> T:
        """What `work` gives on rank 0, on every rank; the others wait for it."""
        if self.count == 1:
            return work()
        import torch.distributed as dist

        box: list[Any] = [work() if self.first else None]
        self._together(lambda: dist.broadcast_object_list(box, src=0, group=self.of_host))
        return box[0]

    @contextmanager
    def one_ahead(self) -> Iterator[None]:
        """Rank 0 does what follows before the others do: downloads and caches are made once."""
        if not self.first:
            self.told(lambda: None)
        yield
        if self.first:
            self.told(lambda: None)

    def take_baton(self) -> None:
        """Wait until the ranks of this machine before this one have passed the baton on."""
        before = self.number - 1
        while self.number % self.per_node and not self.store.check([f"baton/{before}"]):
            time.sleep(0.2)

    def pass_baton(self) -> None:
        """What `take_baton` held back may begin on the next rank."""
        if self.count > 1:
            self.store.set(f"baton/{self.number}", "")

    def at(self, step: int, kept: Callable[[], str], folder: Any = None) -> None:
        """For the message at a sudden end: the last step, and who says what is kept."""
        if self.heartbeat is not None:
            self.heartbeat.at(step, kept, folder)

    def _together(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except RuntimeError:
            # A rank is gone: the heartbeat names it, and ends this process.
            time.sleep(SILENT_SECONDS + 5 * GRACE_SECONDS)
            raise


SINGLE_PROCESS = DistributedContext()


def shared_device(device: Device, ranks: DistributedContext) -> Device:
    """The device that every rank plans for: memory is that of the smallest.

    Raises:
        WorkError: the base would have another type on some ranks.
    """
    if ranks.count == 1:
        return device
    found = ranks.gather(device)
    types = {other.dtype for other in found}
    if len(types) > 1:
        told = ", ".join(f"rank {n}: {d.dtype} on {d.name}" for n, d in enumerate(found))
        raise WorkError(
            f"the ranks would hold the base in different types ({told})",
            hint="set dtype to one that all of them have: float16 or float32",
        )
    names = [f"{sum(d.name == name for d in found)} x {name}" for name in {d.name for d in found}]
    on = f" on {ranks.nodes} machines" if ranks.nodes > 1 else ""
    return replace(
        min(found, key=lambda other: other.memory_bytes),
        ranks=ranks.count,
        nodes=ranks.nodes,
        reasons={**device.reasons, "ranks": ", ".join(sorted(names)) + on},
    )


@contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """The ranks of this process: those that torchrun started, or itself alone.

    Raises:
        WorkError: one does not come, or its card cannot be reached; it is named.
    """
    set_cuda_device_from_local_rank()
    found = {name: os.environ.pop(name) for name in TORCHRUN_ENV_VARS if name in os.environ}
    try:
        if int(found.get("WORLD_SIZE", "1")) == 1:
            yield SINGLE_PROCESS
        else:
            with _ranks(found) as ranks:
                yield ranks
    finally:
        os.environ.update(found)  # for another run of the same processes


@contextmanager
def _ranks(found: dict[str, str]) -> Iterator[DistributedContext]:
    import torch.distributed as dist

    ranks, store = _rendezvous(found)
    assert ranks.heartbeat is not None
    try:
        _init_groups(ranks, store)
        yield ranks
    except BaseException:
        ranks.heartbeat.leave("failed")
        raise
    ranks.told(lambda: None)  # the store stays until all are through
    ranks.heartbeat.leave("left")
    # A group that outlives this call may be taken apart after the interpreter: gloo aborts then.
    ranks.of_host = ranks.of_node = ranks.store = ranks.heartbeat = None
    dist.destroy_process_group()


def _rendezvous(found: dict[str, str]) -> tuple[DistributedContext, Any]:
    """Find all others; from here on the heartbeat watches them. (ranks, the launcher's store)"""
    import torch
    import torch.distributed as dist

    number, count, local, per_node = (
        int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    card = torch.cuda.is_available()
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and number == 0
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])

    meeting = next(_RENDEZVOUS_COUNT)

    def connect(hosts: bool) -> Any:
        wait = datetime.timedelta(seconds=RENDEZVOUS_TIMEOUT_S)
        store = dist.TCPStore(
            *place, world_size=count, is_master=hosts, timeout=wait, wait_for_workers=False
        )
        return dist.PrefixStore(f"lorakit/{meeting}", store)

    store = connect(hosted)
    heartbeat = Heartbeat(
        connect(False), number, count, f"cuda:{local}" if card else f"cpu:{local}"
    )
    _wait_for_all(store, count)
    heartbeat.start()
    return DistributedContext(number, count, per_node, heartbeat), store


def _init_groups(ranks: DistributedContext, store: Any) -> None:
    """Make the groups that add and gather, and try them."""
    import torch
    import torch.distributed as dist

    assert ranks.heartbeat is not None
    ranks.store = store
    _same_kind(ranks.heartbeat.read())
    card = torch.cuda.is_available()
    dist.init_process_group(
        "nccl" if card else "gloo",
        store=store,
        rank=ranks.number,
        world_size=ranks.count,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=torch.device("cuda", 0) if card else None,
    )
    ranks.of_host = (
        dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT) if card else dist.group.WORLD
    )
    for node in range(ranks.nodes):
        members = list(range(node * ranks.per_node, (node + 1) * ranks.per_node))
        group = (
            dist.new_group(members, timeout=COLLECTIVE_TIMEOUT)
            if ranks.nodes > 1
            else dist.group.WORLD
        )
        if ranks.number in members:
            ranks.of_node = group
    _preflight(ranks, "cuda" if card else "cpu")


def _preflight(ranks: DistributedContext, device: str) -> None:
    """One all-reduce and the versions of all; what hangs here is named by the heartbeat."""
    import torch

    probe = torch.full((1,), float(ranks.number), device=device)
    ranks.add(probe)
    expected = ranks.count * (ranks.count - 1) / 2
    if float(probe) != expected:
        raise WorkError(
            f"an all-reduce over {ranks.count} ranks gave {float(probe):g} instead of {expected:g}",
            hint="a card or a link between cards computes wrong: NCCL_P2P_DISABLE=1 goes round it",
        )
    found = ranks.gather([f"{name} {_version(name)}" for name in COMPARED])
    for number, versions in enumerate(found):
        if versions != found[0]:
            raise WorkError(
                f"rank {number} has {', '.join(versions)}; rank 0 has {', '.join(found[0])}",
                hint="install the same versions on every machine",
            )
    assert ranks.heartbeat is not None
    ranks.heartbeat.own.state = "ready"


def set_cuda_device_from_local_rank() -> None:
    """Show this process one card only, by its place on the machine; before CUDA is asked anything.

    A launcher that shows each process its own card already (Ray) is left alone.
    """
    local = os.environ.get("LOCAL_RANK")
    if local is None or int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == 1 or _OWN_ENV in os.environ:
        return
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = shown.split(",") if shown is not None else None
    if names is None:
        os.environ["CUDA_VISIBLE_DEVICES"] = local
    elif len(names) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = names[int(local)] if int(local) < len(names) else ""
    os.environ[_OWN_ENV] = local


def _same_kind(beats: list[Beat]) -> None:
    """Raises:
    WorkError: some ranks have a card, others none.
    """
    without = [beat for beat in beats if not beat.device.startswith("cuda")]
    if without and len(without) < len(beats):
        raise WorkError(
            f"no CUDA card for {', '.join(map(str, without))}; the other ranks have one",
            hint="start as many processes on a machine as it has cards: --gpus, --nproc-per-node",
        )


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):  # a source tree is not installed
        return importlib.metadata.version(package)
    return None


def _wait_for_all(store: Any, count: int) -> None:
    """Wait for every rank's first word.

    Raises:
        WorkError: names those that do not come.
    """
    until = time.monotonic() + RENDEZVOUS_TIMEOUT_S
    while missing := [rank for rank in range(count) if not store.check([key(rank)])]:
        if time.monotonic() > until:
            names = ", ".join(map(str, missing))
            raise WorkError(
                f"rank {names} of {count} did not come within {RENDEZVOUS_TIMEOUT_S:.0f} s",
                hint="was torchrun started on every machine, with the same --nnodes and "
                "--rdzv-endpoint, and do their first words show an error?",
            )
        time.sleep(0.05)
