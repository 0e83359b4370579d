"""Time the engine's kernels and the products beside them at the Llama-2-7B shape, config by config.

python benchmarks/kernels.py --rows 2048 --rank 16
"""

import argparse
import itertools

import torch
import triton

from lorakit.ops import lora_triton as fast
from lorakit.ops.hash_mask import draw_keys

D, INNER = 4096, 11008


def ms(function):
    return 1e3 * triton.testing.do_bench(function, warmup=5, rep=30, return_mode="median")


def best(name, configs, settings, function):
    found = []
    for config in configs:
        settings.clear()
        settings.update(config)
        try:
            found.append((ms(function), config))
        except Exception as error:  # a config that does not fit the card
            found.append((float("inf"), {**config, "error": type(error).__name__}))
    found.sort(key=lambda pair: pair[0])
    text = "; ".join(f"{t:.1f} {tuple(c.values())}" for t, c in found[:3])
    print(f"{name:28s} {text}", flush=True)
    settings.clear()
    settings.update(found[0][1])


def grid(**choices):
    return [
        dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())
    ]


def lora_kernels(rows, rank):
    device = torch.device("cuda")
    for width, modules in ((D, 3), (D, 2), (D, 1), (INNER, 1)):
        x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
        a = torch.randn(modules * rank, width, device=device, dtype=torch.bfloat16)
        ds = torch.randn(rows, modules * rank, device=device, dtype=torch.bfloat16)
        keys = draw_keys(modules, device)
        label = f"{width}x{modules}"
        print(
            label,
            f"cuBLAS without mask: S {ms(lambda: x @ a.t()):.1f}, "
            f"dx {ms(lambda: x.addmm_(ds, a)):.1f}, "
            f"dA {ms(lambda: torch.mm(ds.t(), x, out_dtype=torch.float32)):.1f} us",
        )
        best(
            "down " + label,
            grid(BLOCK_M=[16, 32, 64], BLOCK_K=[64, 128, 256], num_warps=[4, 8], num_stages=[3, 5]),
            fast.DOWN,
            lambda: fast.lora_down_triton(x, a, keys, 0.05),
        )
        best(
            "input_grad " + label,
            grid(BLOCK_M=[32, 64, 128], BLOCK_K=[64, 128, 256], num_warps=[4, 8], num_stages=[1]),
            fast.INPUT_GRAD,
            lambda: fast.lora_input_grad_triton_(x, ds, a, keys, 0.05),
        )
        for splits in (4, 8, 16):
            fast.A_GRAD_SPLITS = splits
            best(
                f"a_grad/{splits} " + label,
                grid(BLOCK_M=[64, 128], BLOCK_K=[64, 128], num_warps=[4, 8], num_stages=[3, 4]),
                fast.A_GRAD,
                lambda: fast.lora_a_grad_triton(ds, x, keys, 0.05),
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
            ],  # noqa: B023, B905, E501
            "S B together": lambda: torch.mm(s, block.t(), out=y),  # noqa: B023
            "dS apart": lambda: [dy[:, c] @ b for c in cols],  # noqa: B023
            "dS together": lambda: dy @ block,  # noqa: B023
            "dB apart": lambda: [
                torch.mm(dy[:, c].t(), s[:, q], out_dtype=f32) for q, c in zip(ranks, cols)
            ],  # noqa: B023, B905, E501
            "dB together": lambda: torch.mm(dy.t(), s, out_dtype=f32),  # noqa: B023
            "x W": lambda: torch.mm(x, w.t(), out=y),  # noqa: B023
            "y += x W": lambda: y.addmm_(x, w.t()),  # noqa: B023
            "[x S][W B]": lambda: torch.mm(wide, bordered.t(), out=y),  # noqa: B023
            "x W, wide strides": lambda: torch.mm(wide[:, :inner], bordered[:, :inner].t(), out=y),  # noqa: B023, E501
            "dy W": lambda: dy @ w,  # noqa: B023
            "dy W, wide stride": lambda: dy @ bordered[:, :inner],  # noqa: B023
        }
        print(name, "; ".join(f"{k} {ms(f):.1f}" for k, f in times.items()), flush=True)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--only", default="")
    a = parser.parse_args()
    print(f"rows {a.rows}, rank {a.rank}; microseconds, best first")
    if a.only != "products":
        lora_kernels(a.rows, a.rank)
    if a.only != "lora":
        products(a.rows, a.rank)


main()
