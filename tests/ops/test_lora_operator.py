"""Linear layers that share an input as one operator, against the formula in plain torch."""

import pytest
import torch

from lorakit.ops.dropout_mask import draw_keys, keep_mask
from lorakit.ops.lora_operator import LinearSpec, dense_weight, lora_linear, nf4_tensors

ROWS, INPUTS, SIZES, RANK, SCALE = 6, 64, (32, 64, 16), 4, 0.5
SLOTS = (0, -1, 1)  # the second module has no adapter


def case(p, four_bit=False, bias=True):
    """(x, arguments of the operator, dense weight, A and B of the adapted modules)."""
    torch.manual_seed(0)
    weights = [torch.randn(size, INPUTS) for size in SIZES]
    frozen, blocks = [torch.cat(weights)], (0, 0)
    if four_bit:
        import bitsandbytes as bnb

        packed = [
            bnb.nn.Params4bit(w, quant_type="nf4", compress_statistics=True).to("cpu")
            for w in weights
        ]
        frozen = [tensor for weight in packed for tensor in nf4_tensors(weight)]
        state = packed[0].quant_state
        blocks = (state.blocksize, state.state2.blocksize)
        weights = [bnb.functional.dequantize_4bit(w.data, w.quant_state) for w in packed]
    spec = LinearSpec(SIZES, INPUTS, SLOTS, blocks)
    all_a = [torch.randn(RANK, INPUTS, requires_grad=True) for _ in range(2)]
    all_b = [torch.randn(SIZES[i], RANK, requires_grad=True) for i in (0, 2)]
    factor = SCALE / (1 - p)
    a = (torch.cat([t.detach() for t in all_a]) * factor).clone()
    b = torch.zeros(sum(SIZES), RANK)
    b[: SIZES[0]], b[-SIZES[2] :] = all_b[0].detach(), all_b[1].detach()
    keys = draw_keys(2, torch.device("cpu")) if p else None
    added = torch.randn(sum(SIZES)) if bias else None
    x = torch.randn(2, ROWS // 2, INPUTS, requires_grad=True)
    return x, (frozen, added, (a, b), (all_a, all_b), keys, p, factor, spec), torch.cat(weights)


def expected(x, arguments, weight):
    _, bias, _, (all_a, all_b), keys, p, factor, _ = arguments
    rows = x.reshape(-1, INPUTS)
    parts = list((rows @ weight.t() + (0 if bias is None else bias)).split(SIZES, -1))
    for slot, module in enumerate((0, 2)):
        kept = rows if keys is None else rows * keep_mask(keys[slot], ROWS, INPUTS, p)
        parts[module] = parts[module] + factor * (kept @ all_a[slot].t()) @ all_b[slot].t()
    return torch.cat(parts, -1).view(*x.shape[:-1], -1)


def with_gradients(x, arguments, compute):
    y = compute()
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape)
    leaves = [x, *arguments[3][0], *arguments[3][1]]
    return y, torch.autograd.grad((y * weights).sum(), leaves)


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_it_is_the_formula_and_so_are_its_gradients(p, four_bit):
    x, arguments, weight = case(p, four_bit)
    y, found = with_gradients(x, arguments, lambda: lora_linear(x, *arguments))
    reference, right = with_gradients(x, arguments, lambda: expected(x, arguments, weight))
    torch.testing.assert_close(y, reference, rtol=1e-4, atol=1e-4)
    for ours, own in zip(found, right, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)


def test_torch_compile_does_not_look_into_it():
    x, arguments, _ = case(0.25)
    seen = []

    def backend(graph, _):
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(
        lambda x: lora_linear(x, *arguments).relu(), backend=backend, fullgraph=True
    )
    torch.testing.assert_close(compiled(x), lora_linear(x, *arguments).relu())
    assert any("lorakit.lora_linear" in name for name in seen)
    assert not any("matmul" in name or "addmm" in name for name in seen)


def test_layers_without_adapters_have_the_gradient_of_their_input():
    x, (frozen, _, (_, b), _, _, _, _, spec), weight = case(0.0, four_bit=True)
    spec = LinearSpec(SIZES, INPUTS, (-1, -1, -1), spec.blocks)
    y = lora_linear(x, frozen, None, (x.new_empty(0, INPUTS), b), ((), ()), None, 0.0, 1.0, spec)
    torch.testing.assert_close(y, x @ weight.t(), rtol=1e-4, atol=1e-4)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx[0, 0], weight.sum(0), rtol=1e-4, atol=1e-4)


def test_a_16_bit_weight_is_used_as_it_is():
    weight = torch.randn(4, 8)
    assert dense_weight([weight], [4], 8, (0, 0), weight) is weight
