"""Where one micro-batch's time goes on a card: the kernels by their total, and the launch time.

python benchmarks/profile_step.py --shape llama-2-7b --method lora --layers 8 --rows 1
"""

import argparse
import json
import time

import torch
from torch.profiler import ProfilerActivity, profile

from lorakit.engine.cuda_graphs import GraphedMicroSteps
from lorakit.engine.decoder_layer import SavedActivations
from lorakit.hardware import detect_device
from lorakit.model.lora_config import add_adapter, resolve_targets
from lorakit.model.random_init import random_model
from lorakit.planning.known_models import shape_config
from lorakit.recipe.loader import load_recipe
from lorakit.train.loss import attach_loss


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="llama-2-7b")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--keep", type=int, default=0)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--output")
    a = parser.parse_args()
    config = shape_config(a.shape)
    config.num_hidden_layers = a.layers
    flags = {"model": a.shape, "data": "random", "method": a.method}
    resolved = resolve_targets(load_recipe(None, a.set, flags), config)
    recipe = resolved.recipe
    device = detect_device(recipe.dtype)
    base = random_model(config, device, recipe.method == "qlora")
    model = add_adapter(base, recipe).train()
    attached = attach_loss(model, a.engine)
    print(attached.layers)
    if attached.engine:
        attached.engine.keep([SavedActivations(a.keep)] * a.layers)
    ids = torch.randint(10, config.vocab_size, (a.rows, a.seq), device=device.kind)
    positions = torch.arange(a.rows * a.seq, device=device.kind).view(a.rows, a.seq)[:, :-1]
    batch = {
        "input_ids": ids,
        "positions": positions.flatten(),
        "targets": ids[:, 1:].flatten(),
    }

    def run(batch, scale):
        with torch.autocast(device.kind, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss_sum * scale
        loss.backward()
        return loss.detach()

    def step():
        with torch.autocast(device.kind, torch.bfloat16):
            loss = model(**batch, use_cache=False).loss_sum / ids.numel()
        loss.backward()

    first = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - first
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(5):
        step()
    launched = (time.perf_counter() - start) / 5
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / 5
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as prof:
        step()
        torch.cuda.synchronize()
    rows = [
        (e.self_device_time_total / 1e3, e.count, e.key)
        for e in prof.key_averages()
        if e.self_device_time_total > 0 and not e.key.startswith(("aten::", "autograd::", "Memcpy"))
    ]
    rows = [r for r in sorted(rows, reverse=True) if "Backward" not in r[2] and "##" not in r[2]]
    total = sum(r[0] for r in rows)
    print(
        f"first {first:.1f} s; wall {wall * 1e3:.2f} ms, launched in {launched * 1e3:.2f} ms, "
        f"kernels {total:.2f} ms, peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    )
    for ms, count, name in rows[:38]:
        print(f"{ms:8.3f} ms {count:5d} x {1e3 * ms / count:8.1f} us  {name[:110]}")
    graphs = GraphedMicroSteps(
        lambda batch, scale: run(batch, scale), [p for p in model.parameters() if p.requires_grad]
    )
    graphs.begin(1e-4)
    for _ in range(3):
        graphs(batch)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        graphs(batch)
    torch.cuda.synchronize()
    graphed = (time.perf_counter() - start) / 20
    print(
        f"as a graph: {graphed * 1e3:.2f} ms a micro-batch, {ids.numel() / graphed:.0f} tok/s "
        f"({graphs.failed or 'captured'}); reserved {torch.cuda.memory_reserved() / 2**30:.2f} GiB"
    )
    if a.output:
        with open(a.output, "w") as file:
            json.dump({"wall_ms": wall * 1e3, "launched_ms": launched * 1e3, "kernels": rows}, file)


main()
