"""Frozen products of several runs in one: are the bits those of each run, and is it faster?

    python benchmarks/shared_products.py --out benchmarks/results/shared_products_cpu.json

Rows of several runs, one below the other, times each weight of a layer (forward) and its transpose
(backward): [A; B] W against A W and B W. Bits are compared, and both ways are timed.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch

from lorakit.bench import provenance
from lorakit.hardware import detect_device
from lorakit.planning.known_models import shape_config

# Tokens of a run's micro-batch. Rows differ in length, so they are seldom a round number.
TOKENS = (37, 70, 256, 480, 1111)


def weights_of(shape):
    """(out, in) of each kind of linear layer."""
    if shape == "demo":
        return {"qo": (576, 576), "kv": (192, 576), "gate/up": (1536, 576), "down": (576, 1536)}
    config = shape_config(shape)
    model, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or model // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    return {
        "q": (queries, model),
        "kv": (keys, model),
        "gate/up": (inner, model),
        "down": (model, inner),
    }


def seconds(work, device, repeats):
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times)  # another program on the machine only adds


def measure(shape, runs, device, dtype, repeats):
    rows = []
    for name, (outputs, inputs) in weights_of(shape).items():
        forward = torch.randn(outputs, inputs, device=device, dtype=dtype).t()
        for way, weight in (("forward", forward), ("backward", forward.t())):
            for tokens in TOKENS:
                # Neighboring lengths, as micro-batches of different rows have.
                parts = [
                    torch.randn(tokens + 3 * i, weight.shape[0], device=device, dtype=dtype)
                    for i in range(runs)
                ]
                joint = torch.cat(parts)
                together = (joint @ weight).split([len(p) for p in parts])
                apart = [p @ weight for p in parts]
                different = sum(
                    int((a != b).any(dim=1).sum()) for a, b in zip(together, apart, strict=True)
                )
                alone = seconds(lambda: [p @ weight for p in parts], device, repeats)
                shared = seconds(lambda: torch.cat(parts) @ weight, device, repeats)
                rows.append(
                    {
                        "weight": name,
                        "way": way,
                        "tokens": tokens,
                        "rows_with_other_bits": different,
                        "rows": len(joint),
                        "faster": round(alone / shared, 3),
                    }
                )
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="demo")
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    device = detect_device(given.dtype)
    kind, dtype = device.kind, getattr(torch, given.dtype)
    rows = measure(given.shape, given.runs, kind, dtype, given.repeats)
    result = {
        "shape": given.shape,
        "runs": given.runs,
        "dtype": given.dtype,
        "threads": torch.get_num_threads(),
        "products_with_other_bits": sum(row["rows_with_other_bits"] > 0 for row in rows),
        "products": len(rows),
        "faster_median": statistics.median(row["faster"] for row in rows),
        "rows": rows,
        **provenance(device, shlex.join(["python", *sys.argv])),
    }
    text = json.dumps(result, indent=1)
    if given.out:
        given.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
