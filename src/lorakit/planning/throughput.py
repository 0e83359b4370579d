"""Estimate tokens per second of a plan on a GPU, and the traffic between ranks.

    t/token = products / (share x TFLOP/s) + attention / ... + traffic / (GB/s) + overhead / tokens

The four factors are fitted to the H100 rows of benchmarks/results (engine_*.json: within 7% on rows
of one length; baseline_*.json for PEFT's own layers: within 11%). For another GPU the same sum uses
the rates of its data sheet and is labeled as an estimate.

With several GPUs each works on its part of a step; the step ends when the rank with the largest
part is done and the gradients are summed.

    gradients   2 (N-1)/N * 4 P bytes           a ring over all N ranks, once a step, not hidden
    weights     2 * (n-1)/n * frozen bytes      a ring over the n ranks of a node, forward and
                                                backward, hidden behind the preceding layers: only
                                                the time beyond their work counts

These are the bytes of a ring, which are minimal (Patarasuk and Yuan 2009, J. Parallel Distrib.
Comput. 69); seconds are bytes over the slowest link, without latency. The P trained numbers are
sent in float32. A ring crosses each node's network once, so all GPUs of the node share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lorakit.errors import first_line
from lorakit.model.layer_widths import CHOSEN, LayerWidths, setting
from lorakit.model.param_counts import ParamCounts, adapted_weights, count
from lorakit.planning.gpus import Gpu
from lorakit.planning.memory import engine_supported
from lorakit.planning.rank_workload import NF4_BYTES, RankWorkload, examples_of_rank
from lorakit.recipe.schema import Recipe
from lorakit.types import Device, MemoryPlan

# Slowdown of attention relative to plain products.
ATTENTION = 1.63
# Bytes moved per byte of a layer's activations, and host seconds a layer and micro-batch.
ENGINE_TRAFFIC, ENGINE_OVERHEAD = 11.2, 436e-6
OWN_TRAFFIC, OWN_OVERHEAD = 32.5, 4.4e-3
# GB/s that AdamW on the host reads and writes: an estimate for a desktop's two channels.
HOST_GBS = 20
# Time of a step on two H100 beyond half of one's and beyond the transfers: 9 ms with LoRA, 11 ms
# with QLoRA (scale_*.json), from work that does not divide and waiting for the slower rank.
MEETING_SECONDS = 0.01
# One core: SmolLM2 and Llama-3.2-1B shapes took 60 to 110 GFLOP/s in bfloat16 with AMX.
CPU_CORE_FLOPS = {"bfloat16": 90e9, "float32": 35e9}


@dataclass(frozen=True, slots=True)
class Speed:
    """Speed of all ranks together, seconds of a step, and the part spent waiting for other ranks.

    `basis`: the measurement or estimate behind it.
    """

    tokens_per_second: float
    basis: str
    step_seconds: float
    waited_seconds: float | None = 0.0


def expected_speed(
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan, gpu: Gpu | None
) -> Speed | None:
    """Tokens per second of full rows; None if they cannot be estimated."""
    return estimate_speed(recipe, config, device, plan, gpu)[0]


def estimate_speed(
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan, gpu: Gpu | None
) -> tuple[Speed | None, str]:
    """Estimate tokens per second of full rows, or explain why that is not possible.

    An unusual model may break the estimate, but never the plan or the run.

    Returns:
        (speed, reason): either the speed is None or the reason is empty.
    """
    if device.kind != "cpu" and (device.kind != "cuda" or gpu is None):
        return None, f"{device.name} is not in the table of GPUs (lorakit plan --gpu names one)"
    try:
        return _speed(recipe, config, device, plan, gpu), ""
    except Exception as error:  # from the config or a module of an unknown family
        return None, f"the layers of {config.model_type} cannot be read: {first_line(error)}"


def _speed(recipe: Recipe, config: Any, device: Device, plan: MemoryPlan, gpu: Gpu | None) -> Speed:
    work = _Work(recipe, config.get_text_config(), count(config), plan, device)
    tokens = recipe.examples_per_step * recipe.cutoff_len
    if device.kind == "cpu":
        seconds = _cpu_seconds(work, device) * work.step_tokens
        waited = 0.0 if device.ranks == 1 else None
        return Speed(tokens / seconds, "a rough estimate for a CPU", seconds, waited)
    assert gpu is not None
    sent = traffic(recipe, config, device, plan, gpu)
    worked = _gpu_seconds(work, gpu) * work.step_tokens
    # Without NVLink, layer inputs and gathered weights share the PCIe slot.
    copied, gathered = _copied_bytes(work) / (gpu.link_gbs * 1e9), sent.weights_seconds or 0.0
    wires = max(copied, gathered) if gpu.nvlink_gbs else copied + gathered
    waited = max(worked, wires) - max(worked, copied) + (sent.gradients_seconds or 0.0)
    waited += MEETING_SECONDS if device.ranks > 1 else 0.0
    seconds = max(worked, copied) + _host_seconds(work) + waited
    return Speed(tokens / seconds, _basis(work, gpu), seconds, waited)


def _basis(work: _Work, gpu: Gpu) -> str:
    device, plan = work.device, work.plan
    if plan.placement.layerwise:
        moved = "gathered" if plan.placement.shards > 1 else "streamed"
        return f"an estimate: data sheet, and weights are {moved}"
    if not gpu.measured:
        return "an estimate from its data sheet"
    if not all(layer.plain for layer in work.counted.layers):
        return "an estimate: no such layers were measured"
    if device.ranks > 1:
        return "from rows measured on one and two such GPUs"
    return "from rows measured on this GPU"


def _cpu_seconds(work: _Work, device: Device) -> float:
    """Seconds of one token on a rank's share of the cores."""
    import psutil

    cores = max(1, (psutil.cpu_count(logical=False) or 1) // device.per_node)
    rate = cores * CPU_CORE_FLOPS.get(device.dtype, CPU_CORE_FLOPS["float32"])
    return (work.products + work.attention) / rate


def _gpu_seconds(work: _Work, gpu: Gpu) -> float:
    """GPU seconds per token."""
    passes, overhead = (
        (ENGINE_TRAFFIC, ENGINE_OVERHEAD) if work.engine else (OWN_TRAFFIC, OWN_OVERHEAD)
    )
    rate, bandwidth = gpu.tflops * 1e12, gpu.memory_gbs * 1e9
    seconds = work.products / (rate * gpu.utilization)
    seconds += ATTENTION * work.attention / rate
    seconds += passes * work.traffic / bandwidth
    seconds += overhead * work.layers / work.tokens
    return seconds + work.weights_moved / (0.8 * bandwidth)


def _copied_bytes(work: _Work) -> float:
    """Bytes per step copied from the host: weights twice, inputs of layers once.

    A model's own layers run micro-batch by micro-batch, and so do their experts.
    """
    host = work.plan.host_parts
    micros = -(-work.step_tokens // work.tokens)
    experts = 2 * micros * host.get("experts", 0)
    return 2 * host.get("frozen weights", 0) + host.get("inputs of layers", 0) + experts


def _host_seconds(work: _Work) -> float:
    """Seconds per step of AdamW on the host, which nothing overlaps."""
    if not work.plan.placement.adapters_on_host:
        return 0.0
    return work.plan.host_parts.get("optimizer state", 0) * 3.5 / HOST_GBS / 1e9


@dataclass(frozen=True, slots=True)
class _Work:
    """Operations and bytes of one token, forward and backward, on the rank with most of them."""

    recipe: Recipe
    config: Any
    counted: ParamCounts
    plan: MemoryPlan
    device: Device

    @property
    def engine(self) -> bool:
        """True if the engine's layers run."""
        expected = engine_supported(self.recipe, self.config, self.device.fast)
        return expected or self.plan.placement.layerwise

    @property
    def keep(self) -> Sequence[int]:
        """Level of each layer: `decoder_layer.SavedActivations`."""
        return self.plan.keep

    @property
    def examples(self) -> int:
        return examples_of_rank(self.recipe, self.device.ranks)

    @property
    def step_tokens(self) -> int:
        return self.examples * self.recipe.cutoff_len

    @property
    def layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def tokens(self) -> int:
        """Tokens that pass a layer at once; layer by layer, those of a complete step."""
        if self.plan.placement.layerwise:
            return self.step_tokens
        return min(self.recipe.micro_batch_size, self.examples) * self.recipe.cutoff_len

    @property
    def linear(self) -> float:
        """Weights that a token multiplies: those of its layers, including its selected experts."""
        return sum(layer.products for layer in self.counted.layers)

    @property
    def products(self) -> float:
        """FLOPs of matrix products: forward, gradient of the input, and recomputation."""
        recipe, c = self.recipe, self.config
        model = c.hidden_size
        if self.engine:
            again = sum(map(_made_again, self.counted.layers, self.keep, itertools.repeat(model)))
        else:
            again = self.linear * self._share_again
        adapters = 6 * recipe.lora_r * sum(i + o for _, i, o in self.counted.linear)
        chosen = setting(self.config, CHOSEN) or 1
        for weight in adapted_weights(recipe, self.counted):
            adapters += 6 * recipe.lora_r * chosen * (weight.inputs + weight.outputs)
        return 4 * self.linear + 2 * again + 4 * c.vocab_size * model + adapters

    @property
    def _share_again(self) -> float:
        return sum(level >= 2 for level in self.keep) / max(1, len(self.keep))

    @property
    def attention(self) -> float:
        """FLOPs of causal attention: 2 S per width forward, 2.5 times that backward."""
        queries = sum(layer.queries for layer in self.counted.layers)
        forward = 2 * self.recipe.cutoff_len * queries
        return forward * (3.5 + self._share_again)

    @property
    def traffic(self) -> float:
        """Bytes of activations that elementwise operations read and write."""
        # In a Llama layer norms, rotation, activation and residual sums move two model widths less
        # than the products themselves.
        model = self.config.hidden_size
        again = 1.35 if any(self.keep) else 1.0
        return sum(layer.moved - 2 * model for layer in self.counted.layers) * 2 * again

    @property
    def weights_moved(self) -> float:
        """Bytes besides products: dequantization twice per micro-batch, the optimizer per step."""
        recipe = self.recipe
        trained = recipe.lora_r * sum(i + o for _, i, o in self.counted.linear)
        for weight in adapted_weights(recipe, self.counted):
            trained += recipe.lora_r * weight.number * (weight.inputs + weight.outputs)
        moved = trained * 28 / self.step_tokens
        if recipe.method == "qlora":
            four_bit = self.counted.in_linear + self.counted.grouped_experts
            moved += 2 * four_bit * (2 + NF4_BYTES) / self.tokens
        return moved


def _made_again(layer: LayerWidths, level: int, model: int) -> float:
    """Weights of the products that an engine layer recomputes at a level."""
    gate_up, qkv = 2 * model * layer.inner, model * (layer.queries + layer.keys_values)
    return (0.0, gate_up, gate_up + qkv, gate_up + qkv + layer.queries * model)[level]


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that one GPU sends, and receives, per step; seconds if the links are known.

    `link`: the link that limits the gradients.
    """

    gradients_bytes: int
    weights_bytes: int
    gradients_seconds: float | None
    weights_seconds: float | None
    link: str


NONE = Traffic(0, 0, 0.0, 0.0, "")


def traffic(
    recipe: Recipe, config: Any, device: Device, plan: MemoryPlan, gpu: Gpu | None
) -> Traffic:
    """Traffic per step; zero for one rank."""
    if device.ranks == 1:
        return NONE
    sizes, shards = RankWorkload.of(recipe, config, device), plan.placement.shards
    gradients = int(2 * (device.ranks - 1) / device.ranks * 4 * sizes.adapter)
    weights = int(2 * (shards - 1) / shards * sizes.frozen_bytes)
    if device.kind != "cuda" or gpu is None:
        return Traffic(gradients, weights, None, None, "unknown")
    inside, network = gpu.ring_gbs * 1e9, device.network_gbits / 8 * 1e9
    between = device.nodes > 1 and (device.per_node == 1 or network < inside)
    slowest = network if between else inside
    link = (
        f"network, {device.network_gbits:g} Gbit/s a node"
        if between
        else f"{gpu.ring}, {gpu.ring_gbs:g} GB/s"
    )
    return Traffic(gradients, weights, gradients / slowest, weights / inside, link)
