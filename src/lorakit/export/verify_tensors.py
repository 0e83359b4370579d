"""Check that each tensor of a merged folder is the sum of base and adapter.

    W' = cast(float32(W) + s B A)
    DoRA (arXiv 2402.09353, equation 5): its rows times m / ||W + s B A||

Used if memory does not hold the two models for a comparison of predictions: each sum is computed
again with these formulas, one tensor at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import WorkError
from lorakit.export.expert_tensors import ExpertPart, wrapper_of
from lorakit.export.merge_weights import (
    base_tensors,
    expert_weights,
    four_bit_modules,
    nf4_round_trip,
    skeleton,
    trained_in_full,
    with_adapter,
)
from lorakit.export.tuned_run import TunedRun, scale_of
from lorakit.model.safetensors_io import stored_tensors

PREFIX = "base_model.model."
# Fraction of a sum's largest element, for float32 sums in another order.
NOISE = 2e-6
# Share of elements of a 16-bit tensor whose rounding may depend on this order.
LARGEST_SHARE = 1e-3
CHUNK = 2**24  # elements compared at once


def compare_tensors(source: TunedRun, folder: Path, merge_base: str) -> dict[str, Any]:
    """Read every written tensor and compare it with the sum of base and adapter.

    Returns:
        `tensors`: their number; `update_kept`: the fraction of the update that is left after the
        cast, <W' - cast(W), s B A> / <s B A, s B A> over all tensors.

    Raises:
        WorkError: names a tensor that is missing or differs.
    """
    sums = ExpectedTensors(source, merge_base)
    written = stored_tensors(folder)
    mismatched = sums.base.keys() ^ written.keys()
    if mismatched:
        raise _differs(min(mismatched))
    kept_dot = update_dot = 0.0
    for name, stored in written.items():
        base, expected = sums.of(name)
        actual = stored.read()
        if actual.shape != expected.shape:
            raise _differs(name)
        noise = NOISE * max(float(expected.max()), -float(expected.min()))
        # An embedding of 128,256 x 4,096 is 2.1 GB in float32, and several are in memory here.
        chunks = (t.flatten().split(CHUNK) for t in (actual, expected, base))
        for actual_chunk, sum_chunk, base_chunk in zip(*chunks, strict=True):
            if not _same(actual_chunk, sum_chunk, noise):
                raise _differs(name)
            if expected is not base:
                update = sum_chunk.float() - base_chunk.float()
                kept_dot += float(
                    (actual_chunk.float() - base_chunk.to(actual_chunk.dtype).float()) @ update
                )
                update_dot += float(update @ update)
    return {"tensors": len(written), "update_kept": kept_dot / update_dot if update_dot else 1.0}


def _differs(name: str) -> WorkError:
    return WorkError(
        f"{name} is not in the written files as the sum of base and adapter; nothing was kept",
        hint="check the disk, then export again",
    )


def _same(found: Any, expected: Any, noise: float) -> bool:
    """Return True if `found` is `expected` rounded once to its dtype."""
    import torch

    if not found.is_floating_point():
        return bool(torch.equal(found, expected))
    if torch.equal(found, expected.to(found.dtype)):
        return True
    unit = torch.finfo(found.dtype)
    rounded, expected = expected.to(found.dtype), expected.float()
    bound = expected.abs() * (0.51 * unit.eps) + (noise + unit.smallest_normal)
    if not bool(((found.float() - expected).abs() <= bound).all()):
        return False
    different = int((found != rounded).sum())
    return found.dtype == torch.float32 or different <= 4 + LARGEST_SHARE * found.numel()


def _all_experts(wrapper: Any) -> Any:
    """s B A of every expert [E, ., .], by the formula of PEFT's `ParamWrapper`."""
    import torch

    number, rank = wrapper.num_experts, wrapper.r["default"]
    a = wrapper.lora_A["default"].weight.float().cpu()
    b = wrapper.lora_B["default"].weight.float().cpu()
    transposed = getattr(wrapper.get_base_layer(), "is_transposed", False)
    update = torch.einsum(
        f"ore,eri->e{'io' if transposed else 'oi'}",
        b.view(len(b), rank, number),
        a.view(number, rank, -1),
    )
    return update * wrapper.scaling["default"]


class ExpectedTensors:
    """Compute the expected value of each merged tensor."""

    def __init__(self, source: TunedRun, merge_base: str) -> None:
        import torch

        empty = skeleton(source)
        self.base = base_tensors(source, empty)
        self.whole = trained_in_full(source)
        self.parts = {n.removeprefix(PREFIX): t for n, t in source.adapter_tensors().items()}
        self.config = source.adapter
        self.compute, self.device = getattr(torch, source.device.dtype), source.device.kind
        self.four_bit = four_bit_modules(source, empty, merge_base)
        self.experts = expert_weights(source, self.base, empty, merge_base)
        adapted = self.experts is not None and source.adapter.get("target_parameters")
        self.model = with_adapter(empty, source).get_base_model() if adapted else None
        self.updates: dict[str, Any] = {}  # of the last raw tensor of experts

    def of(self, name: str) -> tuple[Any, Any]:
        """Return (base, float32 sum) of this name; (base, base) if nothing is added."""
        found = self.base[name]
        base, module = found.stored.read(), found.module
        if found.place in self.whole:
            return base, self.whole[found.place].float()
        if self.experts is not None and found.part is not None:
            return self._expert(name, found.part)
        if not base.is_floating_point():
            return base, base
        base = base.to(self.compute)
        if module in self.four_bit:
            # Where training quantized it: a sum in another order moves a block's scale by one code.
            base = nf4_round_trip(base.to(self.device)).cpu()
        update = self._update(module) if module else None
        if update is None:
            return base, base
        merged = base.float() + update
        magnitude = self.parts.get(f"{module}.lora_magnitude_vector")
        if magnitude is not None:
            merged = merged * (magnitude.float() / merged.norm(dim=1))[:, None]
        return base, merged

    def _expert(self, name: str, part: ExpertPart) -> tuple[Any, Any]:
        """As `of`, for experts; their update is computed for all at once, as PEFT does."""
        assert self.experts is not None
        base = self.experts.read(name, part, None).cpu()
        if self.model is None:
            return base, base
        if part.place not in self.updates:
            self.updates = {part.place: _all_experts(wrapper_of(self.model, part.place))}
        update = self.updates[part.place]
        return base, base.float() + (update if part.expert < 0 else update[part.expert, part.rows])

    def _update(self, module: str) -> Any:
        """Compute s B A of a module [D_out, D_in] or an embedding [V, D]; None without one."""
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if f"{module}.{a}" in self.parts:
                down, up = (self.parts[f"{module}.{part}"].float() for part in (a, b))
                update = scale_of(self.config, f"{PREFIX}{module}.{a}", len(down)) * (up @ down)
                return update.T if "embedding" in a else update
        return None
