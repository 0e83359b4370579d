"""Run a command line in one process per GPU on this machine.

torchrun starts and watches the processes from inside this one. Ctrl-C and SIGTERM are forwarded,
and the ranks finish their step, save and stop.
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

from lorakit.distributed.launch_env import launch_environment
from lorakit.errors import WorkError


def launched() -> bool:
    """True if torchrun has already started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or bool(launch_environment())


def launch_processes(arguments: Sequence[str], gpus: int) -> int:
    """Run `lorakit ARGUMENTS` in `gpus` processes on this machine.

    Returns:
        The exit code of the rank that ended first.

    Raises:
        WorkError: the machine has fewer GPUs, or a process was killed.
    """
    _check_gpus(gpus)
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # torchrun's messages would surround those of the run.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    if "lo" in psutil.net_if_addrs():
        # Host names often do not resolve; processes of one machine do not need one.
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
    # torchrun kills its processes 30 s after a signal; a step and a checkpoint may take longer.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
    if "signals_to_handle" in {field.name for field in dataclasses.fields(LaunchConfig)}:
        config["signals_to_handle"] = "SIGQUIT"
    before: dict[Any, Any] = {
        s: signal.signal(s, _forward_signal) for s in (signal.SIGINT, signal.SIGTERM)
    }
    if hasattr(signal, "SIGHUP"):  # not on Windows
        # As in a single process.
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        elastic_launch(LaunchConfig(**config), sys.executable)("-m", "lorakit", *arguments)
    except ChildFailedError as failed:
        # A rank that detected a dead one has reported it, and ended with a positive exit code.
        reported = [f.exitcode for f in failed.failures.values() if f.exitcode > 0]
        rank, first = failed.get_first_failure()
        if reported:
            return first.exitcode if first.exitcode > 0 else reported[0]
        return _killed(rank, first, again(arguments, gpus))
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
    return 0


def without_gpus(arguments: Sequence[str]) -> list[str]:
    """The command line without its `--gpus N`."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument != "--gpus" and not argument.startswith("--gpus="):
            kept.append(argument)
        skip = argument == "--gpus"
    return kept


def again(arguments: Sequence[str], gpus: int) -> str:
    """Command that continues after a sudden end; training finds its folder by the arguments."""
    more = ["--resume"] if arguments[0] == "train" and "--resume" not in arguments else []
    return shlex.join(["lorakit", *arguments, *more, "--gpus", str(gpus)])


def _killed(rank: int, failure: Any, command: str) -> int:
    """The exit code of a signal; raise for a kill, which no rank could report.

    Raises:
        WorkError: the signal was not SIGINT or SIGTERM.
    """
    signum = signal.Signals(-failure.exitcode)
    if signum in (signal.SIGINT, signal.SIGTERM):
        return 128 + signum
    raise WorkError(
        f"rank {rank} was ended by {signum.name}",
        hint="check dmesg: the kernel kills processes that take too much memory; "
        f"start again with: {command}",
    )


def _forward_signal(signum: int, _frame: FrameType | None) -> None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            child.send_signal(signum)


def _check_gpus(gpus: int) -> None:
    import torch

    count = torch.cuda.device_count()
    on_purpose = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if count < gpus and not (count == 0 and on_purpose):
        gpus_here = f"{count} CUDA GPU{'s' * (count != 1)}"
        raise WorkError(
            f"--gpus {gpus}: this machine has {gpus_here if count else 'no CUDA GPU'}",
            hint=f"--gpus {count}, or leave it out"
            if count
            else 'set CUDA_VISIBLE_DEVICES="" before the command for processes that share the CPU; '
            "they are not faster than one",
        )
