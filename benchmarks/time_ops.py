"""Time the engine's kernels and the products beside them at the Llama-2-7B shape, config by config.

python benchmarks/time_ops.py --rows 2048 --rank 16
"""

import argparse
import itertools

import torch
import triton

from lorakit.ops import glu_triton, lora_output_triton, lora_triton, rope_triton
from lorakit.ops.dropout_mask import draw_keys
from lorakit.ops.lora import InputGrad, Update
from lorakit.ops.lora_output import lora_output_grads_reference

D, INNER = 4096, 11008


def ms(function):
    return 1e3 * triton.testing.do_bench(function, warmup=5, rep=30, return_mode="median")


def best(name, choices, choose, function):
    """The fastest three of `choices`; the best stays chosen."""
    found = []
    for choice in choices:
        choose(choice)
        try:
            found.append((ms(function), choice))
        except Exception as error:  # a choice that does not fit the card
            found.append((float("inf"), (*choice, type(error).__name__)))
    found.sort(key=lambda pair: pair[0])
    print(f"{name:24s} " + "; ".join(f"{t:.1f} {c}" for t, c in found[:4]), flush=True)
    choose(found[0][1])


def lora_kernels(rows, rank):
    device = torch.device("cuda")
    which = "many" if rows >= lora_triton.MANY_ROWS else "few"
    blocks = list(itertools.product([16, 32, 64], [64, 128, 256]))
    for width, modules in ((D, 3), (D, 1), (INNER, 1)):
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        a = torch.randn(modules * rank, width, device=device, dtype=torch.bfloat16)
        ds = torch.randn(rows, modules * rank, device=device, dtype=torch.bfloat16)
        keys = draw_keys(modules, device)
        label = f"{width}x{modules}"
        best(
            "down " + label,
            blocks,
            lambda c: lora_triton.DOWN[which].update(BLOCK_M=c[0], BLOCK_K=c[1]),
            lambda: lora_triton.lora_down_triton(x, a, keys, 0.05),
        )
        best(
            "input_grad " + label,
            blocks[3:],
            lambda c: lora_triton.INPUT_GRAD[which].update(BLOCK_M=c[0], BLOCK_K=c[1]),
            lambda: lora_triton.lora_input_grad_triton_(x, ds, a, keys, 0.05),
        )


def elementwise(rows, rank):
    """The gated activation with its adapters' part, both ways, by block sizes."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    gu, dh = make(rows, 2 * INNER), make(rows, INNER)
    update = Update(make(rows, 2 * rank), make(2 * INNER, rank), (0, 1))
    qkv = make(rows, 3 * D)
    angles = (make(1, rows, 128), make(1, rows, 128))
    update3 = Update(make(rows, 3 * rank), make(3 * D, rank), (0, 1, 2))
    choices = list(itertools.product([16, 32, 64], [64, 128, 256], [4, 8]))

    def gated_choice(settings):
        return lambda c: settings.update(BLOCK_M=c[0], BLOCK_N=c[1], num_warps=c[2])

    best(
        "gated",
        choices,
        gated_choice(glu_triton.FORWARD),
        lambda: glu_triton.gated_triton(gu, "silu", update),
    )
    down = InputGrad(make(rows, rank), make(rank, INNER), draw_keys(1, torch.device("cuda")), 0.05)
    best(
        "gated backward",
        choices,
        gated_choice(glu_triton.BACKWARD),
        lambda: glu_triton.gated_backward_triton(dh, gu, "silu", update, down),
    )
    best(
        "rotate qkv",
        list(itertools.product([16, 32, 64, 128], [2, 4, 8])),
        lambda c: rope_triton.ROTATE.update(BLOCK_M=c[0], num_warps=c[1]),
        lambda: rope_triton.rotate_qkv_triton_(qkv, (32, 32, 32), 128, angles, update3),
    )


def outputs(rows, rank):
    """The gradients at all four groups' outputs, and the update of a single module, by blocks."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    groups = []
    for widths in ([D] * 3, [D], [INNER] * 2, [D]):
        ends = [sum(widths[: i + 1]) for i in range(len(widths))]
        columns = [slice(e - w, e) for e, w in zip(ends, widths, strict=True)]
        update = Update(
            make(rows, rank * len(widths)), make(ends[-1], rank), tuple(range(len(widths)))
        )
        groups.append((make(rows, ends[-1]), update, columns, torch.zeros(ends[-1], rank).cuda()))

    def grads_choice(c):
        lora_output_triton.GRADS.update(
            BLOCK_M=c[0], BLOCK_N=c[1], CHUNK=c[2], num_warps=c[3], num_stages=c[4]
        )

    choices = list(itertools.product([128, 256], [64, 128], [256, 512, 1024], [4, 8], [3]))
    apart = ms(lambda: [lora_output_grads_reference(*g) for g in groups])
    print(f"{'output grads apart':24s} {apart:.1f}")
    one_pass = lambda: [lora_output_triton.lora_output_grads_triton(*g) for g in groups]  # noqa: E731
    best("output grads", choices, grads_choice, one_pass)
    best(
        "output grads, sums",
        list(itertools.product([256, 512, 1024], [1, 4, 8])),
        lambda c: lora_output_triton.SUM.update(BLOCK=c[0], UNROLL=c[1]),
        one_pass,
    )
    start, update = groups[1][0], groups[1][1]
    print(f"{'addmm':24s} {ms(lambda: torch.addmm(start, update.s, update.b.t())):.1f}")
    best(
        "add",
        list(itertools.product([16, 32, 64], [64, 128, 256], [4, 8])),
        lambda c: lora_output_triton.ADD.update(BLOCK_M=c[0], BLOCK_N=c[1], num_warps=c[2]),
        lambda: lora_output_triton.lora_add_triton(start, update),
    )


def products(rows, rank):
    """Skinny products apart and together, and the base product with its rank folded in."""
    make = lambda *shape: torch.randn(*shape, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    for name, outs, inner in (
        ("qkv", [D] * 3, D),
        ("o", [D], D),
        ("gate_up", [INNER] * 2, D),
        ("down", [D], INNER),
    ):
        n, r = sum(outs), rank * len(outs)
        dy, s, x, w = make(rows, n), make(rows, r), make(rows, inner), make(n, inner)
        b, block = make(outs[0], rank), make(n, r)
        y = make(rows, n)
        cols = [slice(i * outs[0], (i + 1) * outs[0]) for i in range(len(outs))]
        ranks = [slice(i * rank, (i + 1) * rank) for i in range(len(outs))]
        f32 = torch.float32
        wide = make(rows, inner + r)
        bordered = make(n, inner + r)
        times = {
            "S B apart": lambda: [
                torch.mm(s[:, q], b.t(), out=y[:, c]) for q, c in zip(ranks, cols)
            ],
            "S B together": lambda: torch.mm(s, block.t(), out=y),
            "dS apart": lambda: [dy[:, c] @ b for c in cols],
            "dS together": lambda: dy @ block,
            "dB apart": lambda: [
                torch.mm(dy[:, c].t(), s[:, q], out_dtype=f32) for q, c in zip(ranks, cols)
            ],
            "dB together": lambda: torch.mm(dy.t(), s, out_dtype=f32),
            "x W": lambda: torch.mm(x, w.t(), out=y),
            "y += x W": lambda: y.addmm_(x, w.t()),
            "[x S][W B]": lambda: torch.mm(wide, bordered.t(), out=y),
            "x W, wide strides": lambda: torch.mm(wide[:, :inner], bordered[:, :inner].t(), out=y),
            "dy W": lambda: dy @ w,
            "dy W, wide stride": lambda: dy @ bordered[:, :inner],
        }
        print(name, "; ".join(f"{k} {ms(f):.1f}" for k, f in times.items()), flush=True)


PARTS = {"lora": lora_kernels, "elementwise": elementwise, "outputs": outputs, "products": products}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", default="", choices=["", *PARTS])
    a = parser.parse_args()
    print(f"rows {a.rows}, rank {a.rank}; microseconds, best first")
    for name, part in PARTS.items():
        if a.only in ("", name):
            part(a.rows, a.rank)


if __name__ == "__main__":
    main()
