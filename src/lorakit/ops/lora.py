"""Low-rank parts of a LoRA linear layer's forward and backward.

LoRA (arXiv 2106.09685, eq. 3) with PEFT's dropout, for the modules i of a group that share x:

    S_i = (m_i * x) A_i^T        y_i = x W_i^T + S_i B_i^T          m_i: 0/1 dropout mask [M, K]
    dS_i = dy_i B_i              dB_i = dy_i^T S_i
    dA_i = dS_i^T (m_i * x)      dx  = dy W + sum_i m_i * (dS_i A_i)

The caller includes the scale alpha/r and dropout's 1/(1-p) in `a`, and multiplies dA by them. As in
PEFT every module has a separate mask, which is recomputed from its key.
Shapes: M tokens, K inputs, n modules of rank R each; a [n*R, K], S and dS [M, n*R], keys [n, 2].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.ops.backend import has_kernels, has_matrix_kernels
from lorakit.ops.dropout_mask import keep_mask


@dataclass(frozen=True, slots=True)
class Update:
    """The adapters' part of a group's product: y_i += S_j B_i^T for module i with slot j >= 0.

    `s` [M, n*R], `b` [N, R] with the rows of all modules, `slots` one index per module.
    """

    s: Tensor
    b: Tensor
    slots: tuple[int, ...]

    @property
    def rank(self) -> int:
        return self.b.shape[1]

    def of(self, module: int, rows: slice) -> tuple[Tensor, Tensor] | None:
        """(S_j [M, R], B_i [N_i, R]) of a module whose rows of `b` are given; None if plain."""
        slot = self.slots[module]
        if slot < 0:
            return None
        return self.s[:, slot * self.rank : (slot + 1) * self.rank], self.b[rows]


@dataclass(frozen=True, slots=True)
class InputGrad:
    """The adapter's part of its input's gradient: m * (dS A); `keys` None or p 0 means m = 1."""

    ds: Tensor
    a: Tensor
    keys: Tensor | None
    p: float


def lora_down(x: Tensor, a: Tensor, keys: Tensor | None, p: float) -> Tensor:
    """S [M, n*R] from x [M, K] and a [n*R, K]; `keys` None or p 0 means no dropout."""
    if keys is None or p == 0.0:
        return x @ a.t()
    if has_matrix_kernels(x):
        from lorakit.ops.lora_triton import lora_down_triton

        return lora_down_triton(x, a, keys, p)
    return lora_down_reference(x, a, keys, p)


def lora_input_grad_(dx: Tensor, ds: Tensor, a: Tensor, keys: Tensor | None, p: float) -> Tensor:
    """Add sum_i m_i * (dS_i A_i) to dx [M, K], in place; returns dx."""
    if keys is None or p == 0.0:
        return dx.addmm_(ds, a)
    if has_matrix_kernels(dx):
        from lorakit.ops.lora_triton import lora_input_grad_triton_

        return lora_input_grad_triton_(dx, ds, a, keys, p)
    return lora_input_grad_reference_(dx, ds, a, keys, p)


def lora_a_grad(
    ds: Tensor,
    x: Tensor,
    keys: Tensor | None,
    p: float,
    factor: float,
    into: Tensor | None = None,
) -> Tensor:
    """dA [n*R, K] float32, times `factor`; added to `into` if given."""
    if keys is not None and p > 0.0 and has_matrix_kernels(x):
        from lorakit.ops.lora_triton import lora_a_grad_triton

        return lora_a_grad_triton(ds, x, keys, p, factor, into)
    if keys is not None and p > 0.0:
        product = lora_a_grad_reference(ds, x, keys, p)
    else:
        product = matmul_float32(ds.t(), x)
    if into is None:
        return product.mul_(factor)
    return into.add_(product, alpha=factor)


def matmul_float32(left: Tensor, right: Tensor, into: Tensor | None = None) -> Tensor:
    """left @ right in float32, added to `into` if given; on CUDA without intermediate rounding."""
    if not left.is_cuda or left.dtype not in (torch.bfloat16, torch.float16):
        product = (left @ right).float()
        return product if into is None else into.add_(product)
    if into is None:
        return torch.mm(left, right, out_dtype=torch.float32)
    return torch.ops.aten.addmm.dtype_out(into, left, right, torch.float32, out=into)


# -- the definition -------------------------------------------------------------------------------


def lora_down_reference(x: Tensor, a: Tensor, keys: Tensor, p: float) -> Tensor:
    """`lora_down` with explicit masks."""
    parts = a.chunk(len(keys))
    return torch.cat([_masked(x, k, p) @ part.t() for k, part in zip(keys, parts, strict=True)], 1)


def lora_input_grad_reference_(dx: Tensor, ds: Tensor, a: Tensor, keys: Tensor, p: float) -> Tensor:
    """`lora_input_grad_` with explicit masks."""
    count = len(keys)
    for key, ds_part, a_part in zip(keys, ds.chunk(count, 1), a.chunk(count), strict=True):
        dx += _masked(ds_part @ a_part, key, p)
    return dx


def lora_a_grad_reference(ds: Tensor, x: Tensor, keys: Tensor, p: float) -> Tensor:
    """`lora_a_grad` with explicit masks, without its factor."""
    parts = ds.chunk(len(keys), 1)
    return torch.cat(
        [(part.t() @ _masked(x, key, p)).float() for key, part in zip(keys, parts, strict=True)]
    )


def _masked(x: Tensor, key: Tensor, p: float) -> Tensor:
    if has_kernels(x):
        from lorakit.ops.dropout_mask_triton import masked_triton

        return masked_triton(x, key, p)
    return x * keep_mask(key, x.shape[0], x.shape[1], p).to(x.dtype)
