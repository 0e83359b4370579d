"""Checks that the tensors and results of an export are finite.

A model with one NaN predicts NaN everywhere, and NaN is neither below nor above any limit, so every
check of an export calls these functions before it compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorakit.errors import WorkError

DAMAGED = "the adapter or its base is damaged: restore it from a copy, or train again"


def require_finite(
    values: Any,
    what: str,
    hint: str | None = None,
    place: Callable[[int], str] = lambda index: f"element {index}",
) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Args:
        what: start of the message: the tensor's name, or the computed value's.
        place: describes the element at a flat index.

    Raises:
        WorkError: names the first such element.
    """
    if is_finite(values):
        return
    flat = values.detach().flatten()
    index = int((~flat.isfinite()).nonzero()[0])
    raise WorkError(f"{what}: {float(flat[index])} at {place(index)}; nothing was kept", hint=hint)


def is_finite(values: Any) -> bool:
    """Return True if no element is NaN or infinite."""
    if not values.is_floating_point() or not values.numel():
        return True
    # `isfinite` on a 128,256 x 4,096 embedding would make 0.5 GB of booleans. `aminmax` keeps NaN.
    low, high = values.aminmax()
    return bool(low.isfinite() and high.isfinite())


def cast(name: str, value: Any, dtype: Any, hint: str) -> Any:
    """Convert floating-point `value` to `dtype`; integers keep their type.

    Args:
        hint: hint of the error for values beyond `dtype`.

    Raises:
        WorkError: `value` holds NaN or infinity, or numbers beyond the range of `dtype`.
    """
    if not value.is_floating_point():
        return value
    converted = value.to(dtype)
    if is_finite(converted):
        return converted
    import torch

    require_finite(value, name, DAMAGED)
    largest = float(value.float().abs().max())
    short = str(dtype).removeprefix("torch.")
    raise WorkError(
        f"{name}: holds {largest:.4g}, but {short} ends at {torch.finfo(dtype).max:.5g}; "
        "nothing was kept",
        hint=hint,
    )
