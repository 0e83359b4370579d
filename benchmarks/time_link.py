"""What streaming rests on: the link between host and card, page-locking, Adam on the host, context.

python benchmarks/time_link.py [--output FILE]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from lorakit.bench import provenance
from lorakit.hardware import detect_device

GB = 1e9
SIZE = 404_750_336  # one layer of Llama-2-7B in bf16


def locked(size):
    """Page-locked bytes, and the seconds that locking took."""
    made = torch.zeros(size, dtype=torch.uint8)
    start = time.perf_counter()
    assert int(torch.cuda.cudart().cudaHostRegister(made.data_ptr(), size, 0)) == 0
    return made, time.perf_counter() - start


def rate(copy, size, repeats=12):
    """Bytes a second of `copy()`, median of repeats."""
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        copy()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return size / statistics.median(times) / GB


def links():
    host, seconds = locked(SIZE)
    back, _ = locked(SIZE)
    card, other = (torch.empty(SIZE, dtype=torch.uint8, device="cuda") for _ in range(2))
    up, down = torch.cuda.Stream(), torch.cuda.Stream()

    def both():
        with torch.cuda.stream(up):
            card.copy_(host, non_blocking=True)
        with torch.cuda.stream(down):
            back.copy_(other, non_blocking=True)

    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))

    def products():
        for _ in range(20):
            left @ right

    def products_and_copies():
        with torch.cuda.stream(up):
            for _ in range(3):
                card.copy_(host, non_blocking=True)
        products()

    pageable = torch.zeros(SIZE, dtype=torch.uint8)
    flops = 20 * 2 * 8192**3
    return {
        "lock_seconds_per_gb": round(seconds / SIZE * GB, 3),
        "to_card_gb_s": round(rate(lambda: card.copy_(host, non_blocking=True), SIZE), 1),
        "to_host_gb_s": round(rate(lambda: back.copy_(card, non_blocking=True), SIZE), 1),
        "both_ways_gb_s": round(rate(both, 2 * SIZE), 1),
        "pageable_gb_s": round(rate(lambda: card.copy_(pageable), SIZE, 4), 1),
        "products_tflops": round(rate(products, flops) / 1000, 1),
        "products_beside_copies_tflops": round(rate(products_and_copies, flops) / 1000, 1),
    }


def adam(count=160_000_000):
    """Seconds of one optimizer step over `count` float32 parameters on the host."""
    parameters = [torch.zeros(count // 8, requires_grad=True) for _ in range(8)]
    for p in parameters:
        p.grad = torch.ones_like(p)
    found = {"threads": torch.get_num_threads()}
    for fused in (True, False):
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=fused)
        optimizer.step()
        start = time.perf_counter()
        for _ in range(3):
            optimizer.step()
        found["fused" if fused else "foreach"] = round((time.perf_counter() - start) / 3, 4)
        del optimizer
    start = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    return found | {"clip": round(time.perf_counter() - start, 4), "parameters": count}


def attention(length, heads, keys):
    """Milliseconds forward and backward of causal attention, head width 128."""
    shapes = [(1, n, length, 128) for n in (heads, keys, keys)]
    q, k, v = (
        torch.randn(s, device="cuda", dtype=torch.bfloat16, requires_grad=True) for s in shapes
    )

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=heads != keys
        )

    out = forward()
    grad = torch.randn_like(out)
    made = {}
    flops = 2 * length**2 * heads * 128
    for name, call, factor in (
        ("forward", forward, 1),
        ("backward", lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True), 2.5),
    ):
        made[name + "_tflops"] = round(rate(call, flops * factor, 3) / 1000, 1)
    return {"length": length, "heads": heads, "keys": keys, **made}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    a = parser.parse_args()
    before = torch.cuda.mem_get_info()[0]
    torch.zeros(1, device="cuda") @ torch.zeros(1, device="cuda")
    result = {
        "link": links(),
        "adam_on_host": adam(),
        "attention": [attention(n, *h) for n in (16384, 65536) for h in ((32, 8), (4, 1), (8, 8))],
        "free_at_start_gib": round(before / 2**30, 2),
        **provenance(detect_device("auto"), "python benchmarks/time_link.py"),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if a.output:
        Path(a.output).write_text(text + "\n")


if __name__ == "__main__":
    main()
