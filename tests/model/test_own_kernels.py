"""Our operations give what transformers' functions give, document by document."""

import pytest
import torch
from tests.ops.test_gated_delta_rule import inputs
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

from lorakit.model import own_kernels
from lorakit.model.kernel_functions import LENGTHS, KernelFunction, document_arguments
from lorakit.model.own_kernels import documents_of

LENGTHS_OF = (3, 1, 70, 64)
BORDERS = torch.tensor((0, *LENGTHS_OF)).cumsum(0).to(torch.int32)


def plain_of(name):
    bound = getattr(qwen, name)
    return bound.plain if isinstance(bound, KernelFunction) else bound.__wrapped__


def row():
    given = document_arguments(BORDERS, sum(LENGTHS_OF), LENGTHS_OF)
    return {"cu_seqlens": given.pop("cu_seq_lens_q"), **given}


def test_documents_are_numbered_by_their_borders():
    numbers = documents_of({"cu_seqlens": BORDERS}, sum(LENGTHS_OF), torch.device("cpu"))
    assert torch.equal(numbers, row()["seq_idx"])
    assert numbers.dtype == torch.int32
    assert documents_of({}, 4, torch.device("cpu")) is None


@pytest.mark.parametrize("borders", [True, False])
def test_the_delta_rule_of_a_packed_row(borders):
    q, k, v, g, beta = inputs(sum(LENGTHS_OF), batch=1, dtype=torch.float32)
    q, k = (t.repeat_interleave(2, 2) for t in (q, k))  # as transformers 5.17 does
    plain = plain_of("torch_chunk_gated_delta_rule")
    function = KernelFunction(getattr(qwen, plain.__name__), plain)
    more = row()
    if not borders:
        del more["cu_seqlens"]
    calls = {"g": g, "beta": beta, "use_qk_l2norm_in_kernel": True}
    found, state = function(q, k, v, **calls, **more)
    assert state is None
    function.use_own = False
    expected, _ = function(q, k, v, **calls, **more)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_convolution_of_a_packed_row():
    x, weight = torch.randn(1, 6, sum(LENGTHS_OF)), torch.randn(6, 4)
    plain = plain_of("causal_conv1d_fn")
    function = KernelFunction(qwen.causal_conv1d_fn, plain)
    found = function(x, weight, None, activation="silu", **row())
    function.use_own = False
    torch.testing.assert_close(found, function(x, weight, None, activation="silu", **row()))
    assert not torch.allclose(found, plain(x, weight, None, activation="silu"))


def test_what_we_do_not_compute_is_left_to_transformers():
    q, k, v, g, beta = inputs(10, batch=1, dtype=torch.float32)
    given = {"query": q, "key": k, "value": v, "g": g, "beta": beta}
    assert own_kernels.delta_rule(given, False) is None  # plain torch on a CPU, without documents
    packed = given | {"seq_idx": torch.zeros(1, 10, dtype=torch.int32)}
    assert own_kernels.delta_rule(packed, False) is not None
    assert own_kernels.delta_rule(packed, True) is None  # beside a package's kernel
    assert own_kernels.delta_rule(packed | {"output_final_state": True}, False) is None
    assert (
        own_kernels.delta_rule(packed | {"initial_state": torch.zeros(1, 4, 16, 32)}, False) is None
    )
    conv = {"hidden_states": torch.randn(1, 2, 10), "weight": torch.randn(2, 4)}
    conv |= {"seq_idx": torch.zeros(1, 10, dtype=torch.int32), LENGTHS: (10,)}
    assert own_kernels.convolution(conv | {"activation": "silu"}, False) is not None
    assert own_kernels.convolution(conv | {"activation": "gelu"}, False) is None
