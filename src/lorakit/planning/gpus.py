"""The name of a GPU enters; what is known of it leaves: memory, types, rates, and their source.

Rates are data sheets': dense tensor-core TFLOP/s with float32 sums, GB/s of the card's memory.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from lorakit.errors import RecipeError
from lorakit.hardware import KERNELS_FROM
from lorakit.recipe.loader import suggest
from lorakit.types import Device

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Gpu:
    """One kind of GPU.

    `memory_gib` is what CUDA offers, less than the box says. `share` is the part of `tflops` that
    large products reach: 0.77 was measured on the H100; the others are estimates (a card held to
    70 W reaches less). `link_gbs` is what page-locked copies over its PCIe slot reach.
    `nvlink_gbs` is what a ring over NVLink carries each way (NCCL's "bus bandwidth"): two H100
    gathered at 240 GB/s and added up at 274 (benchmarks/results/time_ranks.json), of the data
    sheet's 450 one way; the others are estimates, as much of theirs, on the board that has it.
    """

    name: str
    memory_gib: float
    capability: tuple[int, int]
    tflops: float
    memory_gbs: float
    link_gbs: float
    share: float = 0.7
    nvlink_gbs: float = 0

    @property
    def ring_gbs(self) -> float:
        """What a ring over the cards of one machine carries each way.

        Without NVLink every byte crosses two slots, through host memory on many boards: an
        estimate, half a slot's rate.
        """
        return self.nvlink_gbs or self.link_gbs / 2

    @property
    def ring(self) -> str:
        """What that ring runs over."""
        return "NVLink" if self.nvlink_gbs else "PCIe"

    @property
    def bf16(self) -> bool:
        """Whether it multiplies bfloat16."""
        return self.capability >= (8, 0)

    @property
    def measured(self) -> bool:
        """Whether lorakit's own figures were taken on it."""
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
GPUS: dict[str, Gpu] = {card.name: card for card in _TABLE}
# What people write, and what drivers say ("NVIDIA GeForce RTX 3060").
ALIASES = {"a100": "a100-40", "a10g": "a10"}


def find_card(asked: str) -> Gpu:
    """The card of this name: `t4`, `RTX 4090`, `NVIDIA A100-SXM4-80GB`.

    Raises:
        RecipeError: no such card in the table.
    """
    card = match_gpu(asked)
    if card is None:
        raise RecipeError(
            f"--gpu {asked}: not in the table{suggest(asked.lower(), GPUS)}",
            hint=f"known: {', '.join(GPUS)}; for another card give its memory: --memory 12GB",
        )
    return card


def match_gpu(name: str, memory_bytes: int | None = None) -> Gpu | None:
    """The card that `name` speaks of, if one does; memory tells the two A100 apart."""
    words = re.findall(r"[a-z0-9]+", name.lower())
    if "a100" in words:
        large = "80gb" in words or "80" in words or (memory_bytes or 0) > 45 * GIB
        return GPUS["a100-80" if large else "a100-40"]
    for word in words:
        found = GPUS.get(ALIASES.get(word, word))
        # A laptop's 4090 is another chip, a 3060 Ti another card.
        if found is not None and not {"laptop", "ti", "super"} & set(words):
            return found
    return None


def card_device(card: Gpu | None, memory_bytes: int | None, dtype: str) -> Device:
    """The Device that `hardware.py` would find with this card in the machine."""
    name = card.name.upper() if card else "a card"
    memory = memory_bytes or int((card.memory_gib if card else 0) * GIB)
    bf16 = card is None or card.bf16
    chosen = dtype
    if dtype == "auto" or (dtype == "bfloat16" and not bf16):
        chosen = "bfloat16" if bf16 else "float16"
    reasons = {"kind": "asked for", "dtype": "the card"}
    kernels = card is None or card.capability >= KERNELS_FROM
    return Device("cuda", name, memory, chosen, "sdpa", reasons, kernels=kernels)


def with_gpu_count(
    device: Device, gpus: int | None, nodes: int | None, network: float | None
) -> Device:
    """`gpus` such devices on each of `nodes` machines, joined by `network` Gbit/s a machine.

    Raises:
        RecipeError: a network that is none, or one without several machines.
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
    """Bytes of `12GB`, `15GiB`.

    Raises:
        RecipeError: another form.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(GiB|GB|MiB|MB)", text.strip())
    if match is None or not float(match[1]):
        raise RecipeError(f"--memory {text}: not a size", hint="such as 12GB or 15GiB")
    return int(float(match[1]) * {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}[match[2]])
