"""Kernel-bound functions: found, switched, and called with one document at a time."""

import functools
import sys
import types

import pytest
import torch
from tests.families import declared_class, tiny_config
from transformers.integrations import hub_kernels
from transformers.models.lfm2 import modeling_lfm2 as lfm2
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from lorakit.model.kernel_functions import (
    LENGTHS,
    KernelFunction,
    document_arguments,
    kernel_functions,
)

LENGTHS_OF = (3, 1, 8)
BORDERS = torch.tensor([0, 3, 4, 12], dtype=torch.int32)


def model_of(name):
    config = tiny_config(name)
    torch.manual_seed(0)
    return declared_class(config)(config)


def bind(monkeypatch, module, name, package, kernel):
    """Let `package` bring `kernel`, as transformers finds it at import."""
    plain = getattr(module, name).__wrapped__
    given = types.ModuleType(package)
    short = name.removeprefix("torch_")
    rules = types.SimpleNamespace(**{short: kernel})
    given.ops = types.SimpleNamespace(gated_delta_rule=rules)
    setattr(given, short, kernel)
    monkeypatch.setitem(sys.modules, package, given)
    make = hub_kernels.use_kernel_func_from_hub_with_fallback(short, package)
    monkeypatch.setattr(module, name, make(plain))
    return plain


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", set()),
        ("lfm2", {"causal_conv1d_fn", "causal_conv1d_update"}),
        ("qwen3_5", {"causal_conv1d_fn", "torch_chunk_gated_delta_rule"}),
        ("nemotron_h", {"causal_conv1d_fn", "mamba2_chunk_scan"}),
    ],
)
def test_functions_are_found_once_and_stay_replaced(name, expected):
    model = model_of(name)
    found = kernel_functions(model)
    assert expected <= {function.__name__ for function in found}
    assert bool(found) == bool(expected)
    assert set(kernel_functions(model)) == set(found)


def test_a_model_on_the_cpu_runs_no_kernel(monkeypatch):
    """On a machine with a GPU and fla they are bound, and cannot read its tensors."""

    def kernel(*_args, **_kwargs):
        raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")

    name = "torch_chunk_gated_delta_rule"
    bind(monkeypatch, qwen, name, "fla", kernel)
    model = model_of("qwen3_5_text")
    with pytest.raises(ValueError, match="Pointer argument"):
        model(torch.arange(8).unsqueeze(0))
    kernel_functions(model)
    assert model(torch.arange(8).unsqueeze(0)).logits.isfinite().all()
    # A model that is loaded on a GPU later in this process keeps its kernels.
    on_gpu = [torch.zeros(1, 4, 2, 8, device="meta")] * 3
    with pytest.raises(ValueError, match="Pointer argument"):
        getattr(qwen, name)(*on_gpu, g=on_gpu[0], beta=on_gpu[0])


def test_a_kernel_past_out_proj_is_never_called(monkeypatch):
    from transformers.models.falcon_h1 import modeling_falcon_h1 as falcon

    kernel_functions(model_of("falcon_h1"))
    function = falcon.mamba2_split_conv1d_scan_combined
    assert isinstance(function, KernelFunction)
    assert not KernelFunction(with_kernel(function.bound), function.plain).use_kernel
    other = falcon.mamba2_chunk_scan
    assert KernelFunction(with_kernel(other.bound), other.plain).use_kernel


def with_kernel(bound):
    """A wrapper like transformers', around a kernel."""
    is_new_implementation = True

    @functools.wraps(bound)
    def wrapped(*_args, **_kwargs):
        assert is_new_implementation

    return wrapped


def test_a_kernel_gets_the_borders_and_isolates_by_itself(monkeypatch):
    seen = []

    def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, activation=None):
        seen.append(seq_idx)
        return torch.cat([plain(part, weight, bias) for part in x.split(LENGTHS_OF, dim=2)], dim=2)

    plain = bind(monkeypatch, lfm2, "causal_conv1d_fn", "causal_conv1d", causal_conv1d_fn)
    monkeypatch.setattr(KernelFunction, "plain_on", ())
    model = model_of("lfm2")
    assert kernel_functions(model)
    arguments = document_arguments(BORDERS, 12, LENGTHS_OF)
    model.model(torch.arange(12).unsqueeze(0), use_cache=False, **arguments)
    assert [s.tolist() for s in seen] == [[[0, 0, 0, 1] + [2] * 8]] * 3


def test_the_arguments_of_a_packed_row():
    given = document_arguments(BORDERS, 12, LENGTHS_OF)
    assert given[LENGTHS] == LENGTHS_OF
    assert given["cu_seq_lens_q"] is BORDERS
    assert given["seq_idx"].dtype == torch.int32
    assert given["seq_idx"].tolist() == [[0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2]]
    # Without lengths on the host, and with documents of no tokens that fill up the borders.
    filled = document_arguments(torch.nn.functional.pad(BORDERS, (0, 2), value=12), 12)
    assert LENGTHS not in filled
    assert filled["seq_idx"].tolist() == given["seq_idx"].tolist()


def test_documents_are_known_by_their_numbers_alone():
    """LFM2's layers in transformers 5.17 hand down `seq_idx` and nothing else."""
    kernel_functions(model_of("lfm2"))
    x, weight = torch.randn(1, 4, 12), torch.randn(4, 3)
    numbers = document_arguments(BORDERS, 12, LENGTHS_OF)["seq_idx"]
    found = lfm2.causal_conv1d_fn(x, weight, None, seq_idx=numbers)
    parts = [lfm2.causal_conv1d_fn(part, weight) for part in x.split(LENGTHS_OF, dim=2)]
    torch.testing.assert_close(found, torch.cat(parts, dim=2))
    assert not torch.allclose(found, lfm2.causal_conv1d_fn(x, weight))
