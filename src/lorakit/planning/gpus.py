"""Table of GPUs: memory, dtypes, rates and their sources.

Rates are from data sheets: dense tensor-core TFLOP/s with float32 sums, GB/s of the GPU's memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lorakit.errors import RecipeError
from lorakit.hardware import KERNELS_FROM
from lorakit.recipe.loader import suggest
from lorakit.storage.units import GIB, parse_size
from lorakit.types import Device


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU.

    `memory_gib` is the memory that CUDA offers, which is less than advertised. `utilization` is the
    fraction of `tflops` that large products reach: 0.77 was measured on the H100; the others are
    estimates (a GPU limited to 70 W reaches less). `link_gbs` is the rate of pinned copies over
    PCIe. `nvlink_gbs` is the rate of a ring over NVLink in each direction (NCCL's "bus bandwidth"):
    two H100 gathered at 240 GB/s and reduced at 274 (benchmarks/results/time_ranks.json), of the
    data sheet's 450 one way; the others are estimates, the same fraction of theirs, for the board
    that has NVLink.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]
    tflops: float
    memory_gbs: float
    link_gbs: float
    utilization: float = 0.7
    nvlink_gbs: float = 0

    @property
    def ring_gbs(self) -> float:
        """Rate of a ring over the GPUs of one machine in each direction.

        Without NVLink every byte crosses two PCIe slots, through host memory on many boards; half
        a slot's rate is an estimate.
        """
        return self.nvlink_gbs or self.link_gbs / 2

    @property
    def ring(self) -> str:
        """Link that the ring uses."""
        return "NVLink" if self.nvlink_gbs else "PCIe"

    @property
    def bf16(self) -> bool:
        """True if the GPU multiplies bfloat16 matrices."""
        return self.capability >= (8, 0)

    @property
    def measured(self) -> bool:
        """True if lorakit's own figures were measured on this GPU."""
        return self.name == "h100"


_TABLE = [
    Gpu("t4", 14.6, (7, 5), 65, 320, 12, 0.4),
    Gpu("v100", 15.8, (7, 0), 125, 900, 12, 0.6, 80),
    Gpu("l4", 22.0, (8, 9), 121, 300, 25, 0.5),
    Gpu("a10", 22.0, (8, 6), 125, 600, 25, 0.55),
    Gpu("3060", 11.6, (8, 6), 25.5, 360, 12),
    Gpu("3090", 23.6, (8, 6), 71, 936, 25),
    Gpu("4070", 11.6, (8, 9), 58, 504, 25),
    Gpu("4080", 15.6, (8, 9), 97.5, 717, 25),
    Gpu("4090", 23.5, (8, 9), 165, 1008, 25),
    Gpu("5090", 31.3, (12, 0), 209, 1792, 50),
    Gpu("a100-40", 39.4, (8, 0), 312, 1555, 25, nvlink_gbs=160),
    Gpu("a100-80", 79.1, (8, 0), 312, 2039, 25, nvlink_gbs=160),
    Gpu("l40s", 44.4, (8, 9), 362, 864, 25, 0.55),
    Gpu("h100", 79.1, (9, 0), 989, 3350, 50, 0.77, 240),
    Gpu("h200", 139.7, (9, 0), 989, 4800, 50, 0.77, 240),
    Gpu("b200", 178.3, (10, 0), 2250, 8000, 50, nvlink_gbs=480),
]
GPUS: dict[str, Gpu] = {gpu.name: gpu for gpu in _TABLE}
# Common short names, and names in drivers' reports ("NVIDIA GeForce RTX 3060").
ALIASES = {"a100": "a100-40", "a10g": "a10"}


def find_gpu(asked: str) -> Gpu:
    """Find the GPU of this name: `t4`, `RTX 4090`, `NVIDIA A100-SXM4-80GB`.

    Raises:
        RecipeError: the name is not in the table.
    """
    gpu = match_gpu(asked)
    if gpu is None:
        raise RecipeError(
            f"--gpu {asked}: not in the table{suggest(asked.lower(), GPUS)}",
            hint=f"known: {', '.join(GPUS)}; for another GPU give its memory: --memory 12GB",
        )
    return gpu


def match_gpu(name: str, memory_bytes: int | None = None) -> Gpu | None:
    """Match a GPU name against the table; memory distinguishes the two A100."""
    tokens = re.findall(r"[a-z0-9]+", name.lower())
    if "a100" in tokens:
        large = "80gb" in tokens or "80" in tokens or (memory_bytes or 0) > 45 * GIB
        return GPUS["a100-80" if large else "a100-40"]
    for token in tokens:
        gpu = GPUS.get(ALIASES.get(token, token))
        # The 4090 of a laptop and the 3060 Ti are different chips.
        if gpu is not None and not {"laptop", "ti", "super"} & set(tokens):
            return gpu
    return None


def gpu_device(gpu: Gpu | None, memory_bytes: int | None, dtype: str) -> Device:
    """The Device that `hardware.py` would detect with this GPU in the machine."""
    name = gpu.name.upper() if gpu else "a GPU"
    memory = memory_bytes or int((gpu.memory_gib if gpu else 0) * GIB)
    bf16 = gpu is None or gpu.bf16
    chosen = dtype
    if dtype == "auto" or (dtype == "bfloat16" and not bf16):
        chosen = "bfloat16" if bf16 else "float16"
    reasons = {"kind": "asked for", "dtype": "the GPU"}
    kernels = gpu is None or gpu.capability >= KERNELS_FROM
    return Device("cuda", name, memory, chosen, reasons, kernels=kernels)


def with_gpu_count(
    device: Device, gpus: int | None, nodes: int | None, network: float | None
) -> Device:
    """Multiply `device`: `gpus` on each of `nodes` machines, `network` Gbit/s per machine.

    Raises:
        RecipeError: `network` is not positive, or given for one machine.
    """
    if network is not None and (network <= 0 or (nodes or 1) == 1):
        raise RecipeError(
            f"--network {network:g}: " + ("not a rate" if network <= 0 else "there is one node"),
            hint="Gbit/s of a node's network, such as --nodes 4 --network 400",
        )
    ranks = (gpus or 1) * (nodes or 1)
    joined = network or device.network_gbits
    return replace(device, ranks=ranks, nodes=nodes or 1, network_gbits=joined)


def parse_memory(text: str) -> int:
    """Parse sizes such as `12GB` or `15GiB` to bytes.

    Raises:
        RecipeError: the text has another form.
    """
    size = parse_size(text)
    if size is None:
        raise RecipeError(f"--memory {text}: not a size", hint="such as 12GB or 15GiB")
    return size
