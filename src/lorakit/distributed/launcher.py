"""A command line and a number of GPUs enter; so many processes of it run; its exit code leaves.

torchrun starts and watches them, inside this process. Ctrl-C and SIGTERM are handed on, and the
ranks finish their step, save and stop.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import signal
import sys
import uuid
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

import psutil

from lorakit.errors import WorkError


def launched() -> bool:
    """Whether torchrun started this process already."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1


def launch_processes(arguments: Sequence[str], gpus: int) -> int:
    """Run `lorakit ARGUMENTS` in `gpus` processes on this machine; the exit code of the first end.

    Raises:
        WorkError: fewer cards here; or a process was killed.
    """
    _check_cards(gpus)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its own words would stand around those of the run.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if "lo" in psutil.net_if_addrs():
        # A host name that leads nowhere is common; the processes of one machine need none.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // gpus)))
    config: dict[str, Any] = {
        "min_nodes": 1,
        "max_nodes": 1,
        "nproc_per_node": gpus,
        "rdzv_backend": "c10d",
        "rdzv_endpoint": "localhost:0",
        "run_id": uuid.uuid4().hex,
        "max_restarts": 0,
    }
    # torchrun gives its processes 30 s from a signal on; a step and a checkpoint may take longer.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    if "signals_to_handle" in {field.name for field in dataclasses.fields(LaunchConfig)}:
        config["signals_to_handle"] = "SIGQUIT"
    before = {s: signal.signal(s, _hand_on) for s in (signal.SIGINT, signal.SIGTERM)}
    before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as one process has it
    try:
        elastic_launch(LaunchConfig(**config), sys.executable)("-m", "lorakit", *arguments)
    except ChildFailedError as failed:
        # A rank that saw another one die has told it, and ended with a code of its own.
        told = [f.exitcode for f in failed.failures.values() if f.exitcode > 0]
        rank, first = failed.get_first_failure()
        if told:
            return first.exitcode if first.exitcode > 0 else told[0]
        return _killed(rank, first, again(arguments, gpus))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def without_gpus(arguments: Sequence[str]) -> list[str]:
    """A command line without its `--gpus N`."""
    left, skip = [], False
    for word in arguments:
        if not skip and word != "--gpus" and not word.startswith("--gpus="):
            left.append(word)
        skip = word == "--gpus"
    return left


def again(arguments: Sequence[str], gpus: int) -> str:
    """What to type after a sudden end; by the same words a training finds its folder again."""
    more = ["--resume"] if arguments[0] == "train" and "--resume" not in arguments else []
    return shlex.join(["lorakit", *arguments, *more, "--gpus", str(gpus)])


def _killed(rank: int, failure: Any, command: str) -> int:
    """The exit code of ranks that all ended by a signal: said here, for none of them could."""
    number = signal.Signals(-failure.exitcode)
    if number in (signal.SIGINT, signal.SIGTERM):
        return 128 + number
    raise WorkError(
        f"rank {rank} was ended by {number.name}",
        hint="the kernel kills what takes too much memory (dmesg tells); "
        f"start again with: {command}",
    )


def _hand_on(number: int, _frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            child.send_signal(number)


def _check_cards(gpus: int) -> None:
    import torch

    count = torch.cuda.device_count()
    on_purpose = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if count < gpus and not (count == 0 and on_purpose):
        cards = f"{count} CUDA card{'s' * (count != 1)}"
        raise WorkError(
            f"--gpus {gpus}: this machine has {cards if count else 'no CUDA card'}",
            hint=f"--gpus {count}, or leave it out"
            if count
            else 'processes that share the CPU are had with CUDA_VISIBLE_DEVICES="" before the '
            "command; they are no faster than one",
        )
