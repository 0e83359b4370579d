"""Compile every kernel for GPUs of these capabilities and this much shared memory, without a GPU.

    python tests/ops/compile_kernels.py FOLDER 75:65536 90:232448

Writes what each launch settled on to FOLDER/<capability>.json, or the fault to <capability>.txt.
Each GPU has a forked process: Triton keeps one target. A program that asks for more shared memory
than the GPU has is refused here as Triton refuses it there: when it is loaded, before it runs.
"""

import itertools
import json
import os
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction
from undefined_descriptors import undefined_descriptors

from lorakit.ops import (
    causal_conv_triton,
    cross_entropy_triton,
    dropout_mask_triton,
    expert_rows_triton,
    gated_delta_rule_triton,
    glu_triton,
    lora_output_triton,
    lora_triton,
    nf4_triton,
    rms_norm_triton,
    rope_triton,
)
from lorakit.ops.backend import MATRIX_KERNELS_FROM
from lorakit.ops.lora import InputGrad, Update
from lorakit.ops.lora_output import LARGEST_RANK

RANKS = (8, 64, 256)
ROWS = (512, 8192)
# Llama-2-7B's widths; only strides and types are read from these tensors.
MODEL, INNER, HEADS, HEAD = 4096, 11008, 32, 128


def compile_only(capability, shared):
    """Every launch from here on compiles for this card and loads nothing; the list of them."""
    made, checked = [], set()
    target = GPUTarget("cuda", capability, 32)
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda _: 0,
        )
    )
    run = JITFunction.run

    def compiled(self, *args, grid, warmup, **options):
        program = run(self, *args, grid=grid, warmup=True, **options)
        found = program.metadata
        if found.shared > shared:
            raise OutOfResources(found.shared, shared, "shared memory")
        name = f"{self.fn.__module__}.{self.fn.__qualname__}"
        # Disassembling takes most of the time, and only products of Hopper have descriptors.
        if "wgmma" in program.asm["ptx"] and program.hash not in checked:
            checked.add(program.hash)
            if undefined := undefined_descriptors(program.asm["cubin"]):
                raise AssertionError(f"{name} {options}: undefined addresses in {undefined}")
        made.append({"kernel": name, "shared": found.shared})

    JITFunction.run = compiled
    return made


def launch_products(kind, rank, rows):
    """Every kernel with a matrix product, of one layer of a 7B model."""
    make = lambda *shape: torch.empty(shape, dtype=kind, device="meta")  # noqa: E731
    x, inner, both = make(rows, MODEL), make(rows, INNER), make(rows, 2 * INNER)
    keys = torch.empty(3, 2, dtype=torch.int32, device="meta")
    a, s = make(3 * rank, MODEL), make(rows, 3 * rank)
    lora_triton.lora_down_triton(x, a, keys, 0.1)
    lora_triton.lora_input_grad_triton_(x, s, a, keys, 0.1)
    lora_triton.lora_a_grad_triton(s, x, keys, 0.1)
    one = Update(make(rows, rank), make(MODEL, rank), (0,))
    lora_output_triton.lora_add_triton(x, one)
    three = Update(s, make(3 * MODEL, rank), (0, 1, 2))
    if rank <= LARGEST_RANK:
        columns = [slice(i * MODEL, (i + 1) * MODEL) for i in range(3)]
        lora_output_triton.lora_output_grads_triton(make(rows, 3 * MODEL), three, columns)
    two = Update(make(rows, 2 * rank), make(2 * INNER, rank), (0, 1))
    down = InputGrad(make(rows, rank), make(rank, INNER), keys, 0.1)
    glu_triton.gated_triton(both, "silu", two)
    glu_triton.gated_backward_triton(inner, both, "silu", two, down)
    angles = (make(1, rows, HEAD),) * 2
    rope_triton.rotate_qkv_triton_(make(rows, 3 * MODEL), (HEADS,) * 3, HEAD, angles, three)


def launch_delta_rule(kind, tokens):
    """Both ways, at the widths of Qwen3.5-9B."""
    make = lambda *shape: torch.empty(shape, dtype=kind, device="meta")  # noqa: E731
    q, v, beta = make(1, tokens, 16, 128), make(1, tokens, 32, 128), make(1, tokens, 32)
    g = torch.empty(beta.shape, device="meta")
    packed = torch.empty(1, tokens, dtype=torch.int32, device="meta")
    _, saved = gated_delta_rule_triton.delta_rule_triton(q, q, v, g, beta, packed, True)
    gated_delta_rule_triton.delta_rule_backward_triton(v, v, beta, packed, True, saved)


def launch_rest(kind):
    """Kernels that no rank goes into: all that a T4 runs."""
    make = lambda *shape: torch.empty(shape, dtype=kind, device="meta")  # noqa: E731
    float32 = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    x, weight = make(512, MODEL), make(MODEL)
    both, inner = make(512, 2 * INNER), make(512, INNER)
    glu_triton.gated_triton(both, "silu")
    glu_triton.gated_backward_triton(inner, both, "silu")
    dropout_mask_triton.masked_triton(x, torch.empty(2, dtype=torch.int32, device="meta"), 0.1)
    order = torch.empty(512, dtype=torch.int64, device="meta")
    expert_rows_triton.sum_rows_triton(x, order, make(64, 8), 8)
    expert_rows_triton.sum_rows_triton(x, order, None, 8)
    expert_rows_triton.weighted_rows_triton(make(64, MODEL), x, make(64, 8), order)
    angles, heads = (make(1, 512, HEAD),) * 2, make(1, 512, HEADS, HEAD)
    rope_triton.rope_triton(heads, *angles, heads)
    rope_triton.rotate_qkv_triton_(make(512, 3 * MODEL), (HEADS,) * 3, HEAD, angles, None)
    rope_triton.unrotate_qkv_triton(heads, heads, heads, angles)
    rms_norm_triton.rms_norm_triton(x, weight, 1e-5)
    rms_norm_triton.rms_norm_backward_triton(x, x, weight, float32(512), residual=x)
    rows, packed = make(1, 512, MODEL), torch.empty(1, 512, dtype=torch.int32, device="meta")
    causal_conv_triton.causal_conv_triton(rows, make(MODEL, 4), None, True, packed)
    causal_conv_triton.causal_conv_backward_triton(rows, rows, make(MODEL, 4), None, True, packed)
    targets = torch.empty(64, dtype=torch.int64, device="meta")
    cross_entropy_triton.cross_entropy_triton_(make(64, 32000), targets, True)
    bytes_of = lambda *shape: torch.empty(shape, dtype=torch.uint8, device="meta")  # noqa: E731
    nested = SimpleNamespace(code=float32(256), absmax=float32(1024), blocksize=256)
    state = SimpleNamespace(
        state2=nested, absmax=bytes_of(2**18), offset=float32(1), code=float32(16), blocksize=64
    )
    nf4_triton.dequantize_nf4_triton(bytes_of(2**23, 1), state, make(MODEL, MODEL))


def compile_all(capability, shared):
    """Every kernel for one GPU; the list of what each launch settled on."""
    made = compile_only(capability, shared)
    products = divmod(capability, 10) >= MATRIX_KERNELS_FROM
    kind = torch.bfloat16 if products else torch.float16
    for rank, rows in itertools.product(RANKS, ROWS) if products else ():
        launch_products(kind, rank, rows)
    if products:
        launch_delta_rule(kind, 2048)
        launch_delta_rule(kind, 64)
    launch_rest(kind)
    return made


def main():
    folder = Path(sys.argv[1])
    for asked in sys.argv[2:]:
        capability, shared = (int(word) for word in asked.split(":"))
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            continue
        try:
            made = compile_all(capability, shared)
            (folder / f"{capability}.json").write_text(json.dumps(made))
        except BaseException:
            (folder / f"{capability}.txt").write_text(traceback.format_exc())
        finally:
            os._exit(0)


if __name__ == "__main__":
    main()
