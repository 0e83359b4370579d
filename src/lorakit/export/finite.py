"""Tensors and figures of an export enter; they leave, or an error that names the NaN or infinity.

A model with one NaN predicts NaN everywhere, and a comparison with NaN is neither below nor above
any limit: every check of an export comes through here before it compares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorakit.errors import WorkError

DAMAGED = "the adapter or its base is damaged: take it from a copy, or train again"


def require_finite(
    values: Any,
    what: str,
    hint: str | None = None,
    place: Callable[[int], str] = lambda at: f"element {at}",
) -> None:
    """Refuse a tensor that holds NaN or infinity.

    Args:
        what: the start of the message: the tensor's name, or what was computed.
        place: what the element at a flat index is.

    Raises:
        WorkError: names the first such element.
    """
    if is_finite(values):
        return
    flat = values.detach().flatten()
    at = int((~flat.isfinite()).nonzero()[0])
    raise WorkError(f"{what}: {float(flat[at])} at {place(at)}; nothing was kept", hint=hint)


def is_finite(values: Any) -> bool:
    """True where no element is NaN or infinite."""
    if not values.is_floating_point() or not values.numel():
        return True
    # Of a 128,256 x 4,096 embedding `isfinite` would make 0.5 GB of booleans. NaN gets through.
    low, high = values.aminmax()
    return bool(low.isfinite() and high.isfinite())


def cast(name: str, value: Any, dtype: Any, hint: str) -> Any:
    """`value` in `dtype`; integers stay what they are.

    Args:
        hint: what to do where `dtype` is too small.

    Raises:
        WorkError: `value` holds NaN or infinity, or numbers beyond the range of `dtype`.
    """
    if not value.is_floating_point():
        return value
    found = value.to(dtype)
    if is_finite(found):
        return found
    import torch

    require_finite(value, name, DAMAGED)
    largest = float(value.float().abs().max())
    short = str(dtype).removeprefix("torch.")
    raise WorkError(
        f"{name}: holds {largest:.4g}, but {short} ends at {torch.finfo(dtype).max:.5g}; "
        "nothing was kept",
        hint=hint,
    )
