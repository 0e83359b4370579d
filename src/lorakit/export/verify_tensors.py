"""A merged folder, its base and its adapter enter; whether each tensor is their sum leaves.

    W' = cast(float32(W) + s B A)
    DoRA (arXiv 2402.09353, equation 5): its rows times m / ||W + s B A||

For memory that does not hold the two models whose predictions are compared otherwise: each sum is
formed here anew, by these formulas, one tensor at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorakit.errors import WorkError
from lorakit.export.merge_weights import (
    base_tensors,
    four_bit_modules,
    nf4_round_trip,
    skeleton,
    trained_whole,
)
from lorakit.export.tuned_run import TunedRun, scale_of
from lorakit.model.safetensors_io import stored_tensors

PREFIX = "base_model.model."
# Of a sum's largest element: float32 sums in another order.
NOISE = 2e-6
# Elements of a 16-bit tensor that lie so near the middle of two values that this order decides.
LARGEST_SHARE = 1e-3
PIECE = 2**24  # elements compared at once


def compare_tensors(source: TunedRun, folder: Path, merge_base: str) -> dict[str, Any]:
    """Read every written tensor again and form it once more from base and adapter.

    Returns:
        `tensors`: how many; `update_kept`: what part of the update is left after the cast,
        <W' - cast(W), s B A> / <s B A, s B A> over all of them.

    Raises:
        WorkError: names a tensor that is missing, or something else than the sum.
    """
    sums = ExpectedTensors(source, merge_base)
    written = stored_tensors(folder)
    lost = sums.base.keys() ^ written.keys()
    if lost:
        raise _differs(min(lost))
    moved = asked = 0.0
    for name, stored in written.items():
        base, expected = sums.of(name)
        found = stored.read()
        if found.shape != expected.shape:
            raise _differs(name)
        noise = NOISE * max(float(expected.max()), -float(expected.min()))
        # An embedding of 128,256 x 4,096 is 2.1 GB in float32, and several are at work here.
        parts = (t.flatten().split(PIECE) for t in (found, expected, base))
        for part, wanted, before in zip(*parts, strict=True):
            if not _same(part, wanted, noise):
                raise _differs(name)
            if expected is not base:
                update = wanted.float() - before.float()
                moved += float((part.float() - before.to(part.dtype).float()) @ update)
                asked += float(update @ update)
    return {"tensors": len(written), "update_kept": moved / asked if asked else 1.0}


def _differs(name: str) -> WorkError:
    return WorkError(
        f"{name} is not in the written files as base and adapter sum to; nothing was kept",
        hint="check the disk, then export again",
    )


def _same(found: Any, expected: Any, noise: float) -> bool:
    """Whether `found` is `expected` in its own type, rounded once."""
    import torch

    if not found.is_floating_point():
        return bool(torch.equal(found, expected))
    unit = torch.finfo(found.dtype)
    cast, expected = expected.to(found.dtype), expected.float()
    bound = expected.abs() * (0.51 * unit.eps) + (noise + unit.smallest_normal)
    if not bool(((found.float() - expected).abs() <= bound).all()):
        return False
    otherwise = int((found != cast).sum())
    return found.dtype == torch.float32 or otherwise <= 4 + LARGEST_SHARE * found.numel()


class ExpectedTensors:
    """What each merged tensor has to be."""

    def __init__(self, source: TunedRun, merge_base: str) -> None:
        import torch

        empty = skeleton(source)
        self.base = base_tensors(source, empty)
        self.whole = trained_whole(source)
        self.parts = {n.removeprefix(PREFIX): t for n, t in source.adapter_tensors().items()}
        self.config = source.adapter
        self.compute = getattr(torch, source.device.dtype)
        self.four_bit = four_bit_modules(source, empty, merge_base)

    def of(self, name: str) -> tuple[Any, Any]:
        """(base, sum in float32) of this name; twice the base where nothing is added."""
        base = self.base[name].read()
        if name in self.whole:
            return base, self.whole[name].float()
        if not base.is_floating_point():
            return base, base
        base = base.to(self.compute)
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in self.four_bit:
            base = nf4_round_trip(base)
        update = self._update(module) if leaf == "weight" else None
        if update is None:
            return base, base
        merged = base.float() + update
        magnitude = self.parts.get(f"{module}.lora_magnitude_vector")
        if magnitude is not None:
            merged = merged * (magnitude.float() / merged.norm(dim=1))[:, None]
        return base, merged

    def _update(self, module: str) -> Any:
        """S B A of one module [D_out, D_in]; an embedding's [V, D]; None where it has none."""
        for a, b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if f"{module}.{a}" in self.parts:
                down, up = (self.parts[f"{module}.{part}"].float() for part in (a, b))
                update = scale_of(self.config, f"{PREFIX}{module}.{a}", len(down)) * (up @ down)
                return update.T if "embedding" in a else update
        return None
