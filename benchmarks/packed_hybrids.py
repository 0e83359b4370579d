"""Packed against padded micro-batches of a hybrid model: losses, gradients, tokens/s.

    python benchmarks/packed_hybrids.py --shape qwen3.5-4b --out result.json

Random weights and ids, activations recomputed; lengths like those of instruction data. One
step's gradient is compared with that of padded rows, in nats and as a relative norm. "rounding" is
the same comparison of two padded layouts: packing should be no further off. With kernels of
flash-linear-attention or causal-conv1d installed, "plain" repeats both layouts without them.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from lorakit.bench import _random_examples, provenance
from lorakit.data.batching import Layout, step_batches
from lorakit.engine.attach import to_device
from lorakit.hardware import detect_device
from lorakit.model.kernel_functions import kernel_functions
from lorakit.model.lora_config import add_adapter, resolve_targets
from lorakit.model.random_init import random_model
from lorakit.planning.known_models import shape_config
from lorakit.recipe.loader import load_recipe
from lorakit.train import packing
from lorakit.train.loss import attach_loss, base_of


def gradient(model, step, scale):
    """The step's loss and its gradient, as one vector of float32."""
    device = next(model.parameters()).device
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    for micro in step.micro:
        loss = model(**to_device(micro, device), use_cache=False).loss_sum * scale
        loss.backward()
        total += loss.detach()
    trained = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return float(total), torch.cat(trained)


def seconds(model, step, repeats):
    """Median seconds of forward and backward of one step."""
    found = []
    for _ in range(repeats + 1):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        gradient(model, step, 1e-6)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def measure(model, examples, options):
    """Compare packed with padded micro-batches of the same examples."""
    tokens = sum(len(e.input_ids) for e in examples)
    scale = 1 / sum(e.trained_tokens for e in examples)
    rows, capacity = options.rows, options.rows * options.seq
    padded = step_batches(examples, Layout(0, rows, capacity, packed=False))
    packed = step_batches(examples, Layout(0, rows, capacity, packed=True))
    other = step_batches(examples, Layout(0, max(1, rows // 2), capacity, packed=False))
    loss, expected = gradient(model, padded, scale)
    result = {"loss": loss, "tokens": tokens}
    for name, step in (("packed", packed), ("rounding", other)):
        its_loss, its_gradient = gradient(model, step, scale)
        apart = (its_gradient - expected).norm() / expected.norm()
        result[name] = {"loss_difference": its_loss - loss, "gradient_difference": float(apart)}
    for name, step in (("padded", padded), ("packed", packed)):
        took = seconds(model, step, options.repeats)
        row = {"tokens_per_second": round(tokens / took), "micro_batches": len(step.micro)}
        result[name] = result.get(name, {}) | row
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="qwen3.5-4b")
    parser.add_argument("--examples", type=int, default=32)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seq", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tiny", help="a row of tests/families.py instead of the shape")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    if options.tiny:
        from tests.families import tiny_config

        config = tiny_config(options.tiny).get_text_config()
    else:
        config = shape_config(options.shape).get_text_config()
    device = detect_device(options.dtype)
    resolved = load_recipe(None, [], {"model": "m", "data": "d", "lora_dropout": 0.0})
    recipe = resolve_targets(resolved, config).recipe
    model = add_adapter(random_model(config, device, four_bit=False), recipe).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    base_of(model).gradient_checkpointing_enable({"use_reentrant": False})
    distances, own = [], packing._distance
    packing._distance = lambda *given: distances.append(own(*given)) or distances[-1]
    attached = attach_loss(model)
    result = {"shape": options.tiny or options.shape, "packing": attached.packing}
    result["packed_against_alone"] = distances
    print("packing:", attached.packing, "| states, gradient against alone:", distances, flush=True)
    functions = kernel_functions(model)
    result["kernels"] = sorted(f.name for f in functions if f.use_kernel)
    print("kernels:", ", ".join(result["kernels"]) or "none", flush=True)

    examples = _random_examples(options.examples, options.seq, config.vocab_size, "mixed")
    variants = {"kernels": True, "plain": False} if result["kernels"] else {"plain": False}
    if attached.packs:
        for variant, with_kernels in variants.items():
            for function in functions:
                function.use_kernel = with_kernels and function.name in result["kernels"]
            result[variant] = found = measure(model, examples, options)
            print(variant, json.dumps(found), flush=True)
    result["examples"] = {"count": len(examples), "rows": options.rows, "seq": options.seq}
    result |= {"gpu": device.name, "dtype": options.dtype, **provenance(device)}
    result["command"] = "python benchmarks/packed_hybrids.py"
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
