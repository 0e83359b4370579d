"""The kept tensors cover all chunks, the last one padded, in the dtypes of their use."""

import pytest
import torch

from lorakit.ops.delta_rule_layout import CHUNK, empty_saved, wide_dtype


@pytest.mark.parametrize(("tokens", "chunks"), [(1, 1), (CHUNK, 1), (CHUNK + 1, 2)])
def test_shapes_and_dtypes(tokens, chunks):
    q = torch.empty(2, tokens, 3, 16, dtype=torch.bfloat16)
    v = torch.empty(2, tokens, 6, 32, dtype=torch.bfloat16)
    saved = empty_saved(q, v)
    assert saved.states.shape == (2, 6, chunks, 16, 32)
    assert saved.inverse.shape == (2, 6, chunks, CHUNK, CHUNK)
    assert saved.gates.shape == (4, 2, 6, chunks * CHUNK)
    wide = [name for name, t in saved._asdict().items() if t.dtype == torch.float32]
    assert wide == ["norms", "gates"]
    assert wide_dtype(torch.float64) == torch.float64
