"""Read the environment variables of a launcher; hide leftovers of one from other libraries.

Shells and batch jobs often keep variables of an earlier launcher (torchrun, MPI, `accelerate
launch`). A process is a rank only if all variables of torchrun are there; other ones are ignored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lorakit.errors import RunError

NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
REQUIRED = (*NUMBERS, "MASTER_ADDR", "MASTER_PORT")
_SHOWN = "LORAKIT_GPU_OF_RANK"
# Read by transformers, accelerate and trl, which would divide the work again or change its numbers.
_HIDDEN = (*NUMBERS, "GROUP_RANK")
_HIDDEN_PREFIXES = ("ACCELERATE_", "FSDP_", "MV2_", "OMPI_", "PARALLELISM_CONFIG_", "PMI_")


def launch_environment(strict: bool = False) -> dict[str, str]:
    """Return torchrun's variables of this process; empty if it is not one of several ranks.

    Args:
        strict: refuse the variables of an incomplete launch instead of ignoring them.

    Raises:
        RunError: `strict`, and WORLD_SIZE asks for several ranks without the other variables.
    """
    found = {name: os.environ[name] for name in REQUIRED if os.environ.get(name)}
    if found.get("WORLD_SIZE", "1") in ("0", "1"):
        return {}
    missing = [name for name in REQUIRED if name not in found]
    odd = [name for name in (*NUMBERS, "MASTER_PORT") if not found.get(name, "0").isdecimal()]
    if not missing and not odd:
        return found
    if not strict:
        return {}
    fault = f"{odd[0]} is {found[odd[0]]!r}" if odd else f"{', '.join(missing)} not set"
    raise RunError(
        f"WORLD_SIZE={found['WORLD_SIZE']} is in the environment, but {fault}: a leftover of "
        "another launcher, or one that lorakit does not know",
        hint=f"unset {' '.join(name for name in NUMBERS if name in found)}; to use several GPUs "
        "start with --gpus N or torchrun",
    )


def launched_rank() -> int:
    """Rank of this process; 0 if it is not one of several."""
    return int(launch_environment().get("RANK", "0"))


def prepare_rank() -> None:
    """Make only one GPU visible to this process, by its local rank, before torch is imported.

    Threads that load weights start on the first visible GPU. Launchers that already show each
    process one GPU (Ray) are left alone.
    """
    env = launch_environment()
    if env:
        # Stacks of C++ would surround the message that names a lost rank; read at torch's import.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if not env or int(env["LOCAL_WORLD_SIZE"]) == 1 or _SHOWN in os.environ:
        return
    local = os.environ[_SHOWN] = env["LOCAL_RANK"]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [local] if visible is None else visible.split(",")
    if len(names) > 1:
        names = names[int(local) : int(local) + 1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)


@contextmanager
def hidden_launch_variables() -> Iterator[None]:
    """Remove launchers' variables from the environment for the duration of a block."""
    names = [n for n in os.environ if n in _HIDDEN or n.startswith(_HIDDEN_PREFIXES)]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)  # for another run in the same process
